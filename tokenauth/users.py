"""The users in config.toml, edited where they stand: comments and order stay."""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Table

from tokenauth import configfile
from tokenauth.config import canonical
from tokenauth.errors import ConfigError

_USER = re.compile(r"\s*\[\[\s*users\s*\]\]")
_TABLE = re.compile(r"\s*\[")
_ASIDE = re.compile(r"\s*(#|$)")


class UserFile:
    """The `[[users]]` of one configuration file."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError."""
        self.path = path
        try:
            self._document = tomlkit.parse(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, TOMLKitError) as error:
            raise ConfigError(f"{path}: cannot be edited: {error}") from None
        users = self._document.get("users", tomlkit.aot())
        if not isinstance(users, AoT):
            raise ConfigError(f"{path}: users: write each user as a [[users]] table to edit them here")
        self._users = users

    def add(self, name: str, password_hash: Callable[[], str], scopes: tuple[str, ...]) -> None:
        """Add a user. Raises ConfigError if there is one of that name."""
        if self._find(name) is not None:
            raise ConfigError(f"{self.path}: there is a user {name!r} already")
        entry = {"username": name, "password": password_hash()} | ({"scopes": list(scopes)} if scopes else {})
        lines = self._lines()
        begins = _begins(lines)
        end = _end(lines, begins[-1]) if begins else len(lines)
        before, after = "".join(lines[:end]).rstrip("\n"), "".join(lines[end:]).lstrip("\n")
        parts = (before, tomlkit.dumps({"users": [entry]}).rstrip("\n"), after)
        self._save("\n\n".join(part for part in parts if part).rstrip("\n") + "\n")

    def change_password(self, name: str, password_hash: Callable[[], str]) -> None:
        """Change a user's password. Raises ConfigError if there is none of that name."""
        entry = self._get(name)
        entry["password"] = password_hash()
        self._save(tomlkit.dumps(self._document))

    def remove(self, name: str) -> None:
        """Take a user out, with the comment right above. Raises ConfigError if there is none of that name.

        It is lines that are taken out: a TOML document has the comment above one table in the table before it.
        """
        number = list(self._users).index(self._get(name))
        lines = self._lines()
        begin = _begins(lines)[number]
        end = _end(lines, begin)
        while begin and lines[begin - 1].lstrip().startswith("#"):
            begin -= 1
        self._save("".join(lines[:begin] + lines[end:]))

    def _lines(self) -> list[str]:
        return tomlkit.dumps(self._document).splitlines(keepends=True)

    def _find(self, name: str) -> Table | None:
        return next((user for user in self._users if canonical(str(user.get("username", ""))) == canonical(name)), None)

    def _get(self, name: str) -> Table:
        user = self._find(name)
        if user is None:
            raise ConfigError(f"{self.path}: there is no user {name!r}")
        return user

    def _save(self, text: str) -> None:
        """Put the new text in place of the old in one step, if it makes a configuration."""
        try:
            configfile.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        target = self.path.resolve()
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            was = target.stat()
            os.fchmod(file.fileno(), was.st_mode & 0o777)
            with suppress(PermissionError):  # only root may give a file away
                os.fchown(file.fileno(), was.st_uid, was.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)


def _begins(lines: Sequence[str]) -> list[int]:
    """List the lines in which users begin."""
    return [at for at, line in enumerate(lines) if _USER.match(line)]


def _end(lines: Sequence[str], begin: int) -> int:
    """Say in which line a table has ended that begins in another; what stands right above the next belongs to that."""
    end = next((at for at in range(begin + 1, len(lines)) if _TABLE.match(lines[at])), len(lines))
    while _ASIDE.match(lines[end - 1]):
        end -= 1
    return end
