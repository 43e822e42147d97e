"""Edits the users in config.toml. The rest of the file, with its comments, is not changed."""

import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from tokenauth.errors import ConfigError
from tokenauth.settings import htpasswd, loader
from tokenauth.settings.model import canonical
from tokenauth.settings.text_file import TextFile

_USER_HEADER = re.compile(r"""\s*\[\[\s*(users|"users"|'users')\s*\]\]""")
_HEADER = re.compile(r"\s*\[")
_COMMENT_OR_BLANK = re.compile(r"\s*(#|$)")

Entry = dict[str, Any]
"""A [[users]] table, parsed."""


class UserEditor:
    """The `[[users]]` of one configuration file.

    Each change is checked before the password is asked for, and again when it is made: other commands and editors may
    have changed the file in between.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError."""
        self.path = path
        self._file = TextFile(path)
        self._parse(self._file.read())

    def add(self, name: str, password_hash: Callable[[], str], scopes: tuple[str, ...]) -> None:
        """Add a user. Raises ConfigError if the name exists."""
        if "${" in name:  # the loader would put a variable's value there
            raise ConfigError(f"{name!r}: a user name cannot contain '${{'")
        self._check_new(name, self._parse(self._file.read()))
        entry = {"username": name, "password": password_hash()} | ({"scopes": list(scopes)} if scopes else {})

        def change(text: str) -> str:
            users = self._parse(text)
            self._check_new(name, users)
            return self._checked(text, with_user(text, entry), [*users, entry])

        self._file.edit(change)

    def change_password(self, name: str, password_hash: Callable[[], str]) -> None:
        """Change a user's password. Raises ConfigError if the name does not exist."""
        self._number(name, self._parse(self._file.read()))
        self._change(name, "password", password_hash())

    def change_scopes(self, name: str, scopes: tuple[str, ...]) -> Sequence[str]:
        """Change a user's scopes. Return what they were. Raises ConfigError if the name does not exist."""
        return _scopes(self._change(name, "scopes", list(scopes)))

    def _change(self, name: str, key: str, value: object) -> Entry:
        """Change a key of a user. Return the user as they were."""
        return self._edit(name, lambda text, at, user: (_with_value(text, at, key, value), [user | {key: value}]))

    def remove(self, name: str) -> Sequence[str]:
        """Remove a user, with the comment right above. Return the scopes. Raises ConfigError if there is none."""
        return _scopes(self._edit(name, lambda text, at, _: (_without(text, at), [])))

    def _edit(self, name: str, edit: Callable[[str, int, Entry], tuple[str, list[Entry]]]) -> Entry:
        """Replace the text of a user, and check that this changes no other. Return the user as they were.

        `edit` gets the text of the file, the number of the user and the user. It returns the new text, and the user as
        it then is, or none.
        """
        before: Entry = {}

        def change(text: str) -> str:
            nonlocal before
            users = self._parse(text)
            number = self._number(name, users)
            before = users[number]
            edited, after = edit(text, number, before)
            return self._checked(text, edited, [*users[:number], *after, *users[number + 1 :]])

        self._file.edit(change)
        return before

    def _parse(self, text: str) -> list[Entry]:
        """Return the users. Raises ConfigError unless each has a [[users]] table of its own."""
        try:
            users = loader.parse_toml(text).get("users")
        except ConfigError as error:
            raise ConfigError(f"{self.path}: cannot be edited: {error}") from None
        entries: list[Entry] = users if isinstance(users, list) else []
        if (users is not None and not entries) or len(_begins(_lines(text))) != len(entries):
            raise ConfigError(f"{self.path}: users: this command needs each user in a [[users]] table")
        return entries

    def _number(self, name: str, users: Sequence[Entry]) -> int:
        number = _find(name, users)
        if number is None:
            self._check_other_file(name)
            raise ConfigError(f"{self.path}: there is no user {name!r}; `tokenauth user list` shows the names")
        return number

    def _check_new(self, name: str, users: Sequence[Entry]) -> None:
        number = _find(name, users)
        if number is not None:
            existing = str(users[number]["username"])
            fix = f"`tokenauth user passwd {shlex.quote(existing)}` changes the password"
            raise ConfigError(f"{self.path}: user {existing!r} exists (upper and lower case are the same); {fix}")
        self._check_other_file(name)

    def _check_other_file(self, name: str) -> None:
        """Raise ConfigError if the user is in the users_file, which the `user` commands do not edit."""
        try:
            user = loader.parse(self._file.read()).users_by_name.get(canonical(name))
        except ConfigError:  # it is said when the edit is checked
            return
        if user is not None and user.origin is not None:
            file, line = user.origin
            renew, remove = htpasswd.how_to_renew(file, user.username), htpasswd.how_to_remove(file, user.username)
            raise ConfigError(
                f"{self.path}: {user.username!r} is in line {line} of the users_file {file}, and `tokenauth user` edits"
                f" this file only; {renew} for a new password, or {remove} to remove the user"
            )

    def _checked(self, before: str, after: str, users: Sequence[Entry]) -> str:
        """Return the new text. Raises ConfigError unless it is valid and differs from the old one only in its users."""
        with loader.naming(self.path):
            loader.parse(after)
        wanted = tomllib.loads(before) | {"users": users}
        if tomllib.loads(after) | {"users": self._parse(after)} != wanted:
            raise ConfigError(f"{self.path}: users: an edit would change the rest of the file; edit it by hand")
        return after


def _scopes(entry: Entry) -> Sequence[str]:
    return [str(scope) for scope in entry.get("scopes", ())]


def _find(name: str, users: Sequence[Entry]) -> int | None:
    wanted = canonical(name)
    return next((at for at, user in enumerate(users) if canonical(str(user.get("username", ""))) == wanted), None)


def with_user(text: str, entry: Entry) -> str:
    """Return the text with one more user, after the last one or at the end."""
    lines = _lines(text)
    begins = _begins(lines)
    end = _end(lines, begins[-1]) if begins else len(lines)
    newline = _newline(text)
    table = tomlkit.dumps({"users": [entry]}).strip().replace("\n", newline)
    parts = ("".join(lines[:end]).rstrip("\r\n"), table, "".join(lines[end:]).strip("\r\n"))
    return (newline * 2).join(part for part in parts if part) + newline


def _with_value(text: str, number: int, key: str, value: object) -> str:
    """Set a key of a user. Only the table of that user is rewritten."""
    lines = _lines(text)
    begin = _begins(lines)[number]
    end = _end(lines, begin)
    table: Any = tomlkit.parse("".join(lines[begin:end]))
    table["users"][0][key] = value
    return "".join([*lines[:begin], tomlkit.dumps(table), *lines[end:]])


def _without(text: str, number: int) -> str:
    """Remove the lines of a user, and the comment right above."""
    lines = _lines(text)
    begin = _begins(lines)[number]
    end = _end(lines, begin)
    while begin and lines[begin - 1].lstrip().startswith("#"):
        begin -= 1
    return "".join(lines[:begin] + lines[end:])


def _lines(text: str) -> list[str]:
    """Split at line feeds only, as TOML does."""
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def _newline(text: str) -> str:
    """Return the line ending of the first line."""
    return "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"


def _begins(lines: Sequence[str]) -> list[int]:
    """Return the numbers of the lines in which users begin."""
    return [at for at, line in enumerate(lines) if _USER_HEADER.match(line)]


def _end(lines: Sequence[str], begin: int) -> int:
    """Return the line after a table. Comments right above the next table belong to that one."""
    end = next((at for at in range(begin + 1, len(lines)) if _HEADER.match(lines[at])), len(lines))
    while _COMMENT_OR_BLANK.match(lines[end - 1]):
        end -= 1
    return end
