"""The users in config.toml, edited in place: everything else in the file stays as it is."""

import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from tokenauth.errors import ConfigError
from tokenauth.settings import loader
from tokenauth.settings.model import canonical
from tokenauth.settings.text_file import TextFile

_USER = re.compile(r"""\s*\[\[\s*(users|"users"|'users')\s*\]\]""")
_TABLE = re.compile(r"\s*\[")
_ASIDE = re.compile(r"\s*(#|$)")

Entry = dict[str, Any]
"""A user as the file has it."""


class UserFile:
    """The `[[users]]` of one configuration file.

    Each change is checked before a password is asked for, and again when it is made, on what the file has then: other
    commands and editors may have changed it while somebody typed.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError."""
        self.path = path
        self._file = TextFile(path)
        self._parse(self._file.read())

    def add(self, name: str, password_hash: Callable[[], str], scopes: tuple[str, ...]) -> None:
        """Add a user. Raises ConfigError if there is one of that name."""
        if "${" in name:  # the file would be read with a value of the environment there
            raise ConfigError(f"{name!r}: a name that is added here cannot have '${{' in it")
        self._demand_new(name, self._parse(self._file.read()))
        entry = {"username": name, "password": password_hash()} | ({"scopes": list(scopes)} if scopes else {})

        def change(text: str) -> str:
            users = self._parse(text)
            self._demand_new(name, users)
            return self._checked(text, _added(text, entry), [*users, entry])

        self._file.edit(change)

    def change_password(self, name: str, password_hash: Callable[[], str]) -> None:
        """Change a user's password. Raises ConfigError if there is none of that name."""
        self._number(name, self._parse(self._file.read()))
        hashed = password_hash()

        def change(text: str) -> str:
            users = self._parse(text)
            number = self._number(name, users)
            wanted = [*users[:number], users[number] | {"password": hashed}, *users[number + 1 :]]
            return self._checked(text, _with_password(text, number, hashed), wanted)

        self._file.edit(change)

    def remove(self, name: str) -> None:
        """Take a user out, with the comment right above. Raises ConfigError if there is none of that name."""

        def change(text: str) -> str:
            users = self._parse(text)
            number = self._number(name, users)
            return self._checked(text, _without(text, number), [*users[:number], *users[number + 1 :]])

        self._file.edit(change)

    def _parse(self, text: str) -> list[Entry]:
        """Return the users. Raises ConfigError unless each has a [[users]] table of its own."""
        try:
            users = loader.parse_toml(text).get("users")
        except ConfigError as error:
            raise ConfigError(f"{self.path}: cannot be edited: {error}") from None
        entries: list[Entry] = users if isinstance(users, list) else []
        if (users is not None and not entries) or len(_begins(_lines(text))) != len(entries):
            raise ConfigError(f"{self.path}: users: write each user as a [[users]] table to edit them here")
        return entries

    def _number(self, name: str, users: Sequence[Entry]) -> int:
        number = _find(name, users)
        if number is None:
            raise ConfigError(f"{self.path}: there is no user {name!r}")
        return number

    def _demand_new(self, name: str, users: Sequence[Entry]) -> None:
        if _find(name, users) is not None:
            raise ConfigError(f"{self.path}: there is a user {name!r} already")

    def _checked(self, before: str, after: str, users: Sequence[Entry]) -> str:
        """Return the new text if it is a configuration with these users, and otherwise says what the old one did."""
        with loader.naming(self.path):
            loader.parse(after)
        wanted = tomllib.loads(before) | {"users": users}
        if tomllib.loads(after) | {"users": self._parse(after)} != wanted:
            raise ConfigError(f"{self.path}: users: cannot be told from the rest of the file; edit it by hand")
        return after


def _find(name: str, users: Sequence[Entry]) -> int | None:
    wanted = canonical(name)
    return next((at for at, user in enumerate(users) if canonical(str(user.get("username", ""))) == wanted), None)


def _added(text: str, entry: Entry) -> str:
    """Put a user behind the last one, or at the end."""
    lines = _lines(text)
    begins = _begins(lines)
    end = _end(lines, begins[-1]) if begins else len(lines)
    newline = _newline(text)
    table = tomlkit.dumps({"users": [entry]}).strip().replace("\n", newline)
    parts = ("".join(lines[:end]).rstrip("\r\n"), table, "".join(lines[end:]).strip("\r\n"))
    return (newline * 2).join(part for part in parts if part) + newline


def _with_password(text: str, number: int, hashed: str) -> str:
    """Change a password; only the table of that user is written anew."""
    lines = _lines(text)
    begin = _begins(lines)[number]
    end = _end(lines, begin)
    table: Any = tomlkit.parse("".join(lines[begin:end]))
    table["users"][0]["password"] = hashed
    return "".join([*lines[:begin], tomlkit.dumps(table), *lines[end:]])


def _without(text: str, number: int) -> str:
    """Take the lines of a user out, and the comment right above."""
    lines = _lines(text)
    begin = _begins(lines)[number]
    end = _end(lines, begin)
    while begin and lines[begin - 1].lstrip().startswith("#"):
        begin -= 1
    return "".join(lines[:begin] + lines[end:])


def _lines(text: str) -> list[str]:
    """Split into lines as TOML does: at line feeds only."""
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def _newline(text: str) -> str:
    """Say how the file ends its lines, as far as its first line tells."""
    return "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"


def _begins(lines: Sequence[str]) -> list[int]:
    """List the lines in which users begin."""
    return [at for at, line in enumerate(lines) if _USER.match(line)]


def _end(lines: Sequence[str], begin: int) -> int:
    """Say in which line a table has ended that begins in another; what stands right above the next belongs to that."""
    end = next((at for at in range(begin + 1, len(lines)) if _TABLE.match(lines[at])), len(lines))
    while _ASIDE.match(lines[end - 1]):
        end -= 1
    return end
