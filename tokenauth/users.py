"""The users in config.toml, edited where they stand: comments and order stay."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Table

from tokenauth import configfile
from tokenauth.config import canonical
from tokenauth.errors import ConfigError


class UserFile:
    """The `[[users]]` of one configuration file."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ConfigError."""
        self.path = path
        try:
            self._document = tomlkit.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, TOMLKitError) as error:
            raise ConfigError(f"{path}: cannot be edited: {error}") from None
        users = self._document.get("users")
        if users is None:
            users = self._document["users"] = tomlkit.aot()
        if not isinstance(users, AoT):
            raise ConfigError(f"{path}: users: write each user as a [[users]] table to edit them here")
        self._users = users

    def add(self, name: str, password_hash: Callable[[], str], scopes: tuple[str, ...]) -> None:
        """Add a user. Raises ConfigError if there is one of that name."""
        if self._find(name) is not None:
            raise ConfigError(f"{self.path}: there is a user {name!r} already")
        entry = tomlkit.table()
        entry["username"] = name
        entry["password"] = password_hash()
        if scopes:
            entry["scopes"] = list(scopes)
        self._users.append(entry)
        self._save()

    def change_password(self, name: str, password_hash: Callable[[], str]) -> None:
        """Change a user's password. Raises ConfigError if there is none of that name."""
        self._get(name)["password"] = password_hash()
        self._save()

    def remove(self, name: str) -> None:
        """Take a user out. Raises ConfigError if there is none of that name."""
        self._users.remove(self._get(name))
        self._save()

    def _find(self, name: str) -> Table | None:
        return next((user for user in self._users if canonical(str(user.get("username", ""))) == canonical(name)), None)

    def _get(self, name: str) -> Table:
        user = self._find(name)
        if user is None:
            raise ConfigError(f"{self.path}: there is no user {name!r}")
        return user

    def _save(self) -> None:
        """Put the new text in place of the old in one step, if it makes a configuration."""
        text = tomlkit.dumps(self._document)
        try:
            configfile.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None
        target = self.path.resolve()
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
