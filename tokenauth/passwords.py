"""Passwords: the only module that knows passlib; hashing runs in a lane of its own."""

from collections.abc import Iterable

from passlib.context import CryptContext
from passlib.exc import UnknownHashError

from tokenauth import config
from tokenauth.errors import ConfigError, InvalidCredentials
from tokenauth.lane import Lane
from tokenauth.models import User

MIN_LENGTH = 8
"""Characters that a password must have when it is set."""

MAX_LENGTH = 1024
"""Characters of a password; a longer one is refused before any work."""


class Passwords:
    """Verifies passwords a few at a time, in threads that give way to everything else."""

    def __init__(self, terms: config.Passwords) -> None:
        self._context = CryptContext(
            schemes=["argon2", "bcrypt", "scrypt", "pbkdf2_sha256"],
            argon2__type="ID",
            argon2__memory_cost=terms.memory_kib,
            argon2__time_cost=terms.time_cost,
            argon2__parallelism=terms.parallelism,
        )
        self._lane = Lane(self._verify, terms.lanes, terms.queue)
        self._dummy = self.hash("nobody has this password")

    def hash(self, password: str) -> str:
        """Hash a password for the configuration: argon2id at the configured cost, PHC string format."""
        return str(self._context.hash(password))

    def check(self, users: Iterable[User]) -> None:
        """Raise ConfigError unless every user's hash is one that `verify` can read."""
        for user in users:
            try:
                self._context.handler(self._context.identify(user.password_hash, required=True)).from_string(
                    user.password_hash
                )
            except (ValueError, TypeError, UnknownHashError):
                raise ConfigError(
                    f"users: the password of {user.username!r} is not a hash that can be read"
                    " (argon2, bcrypt, scrypt, pbkdf2_sha256); make one with `tokenauth hash-password`"
                ) from None

    def weak(self, user: User) -> bool:
        """Whether a hash costs an attacker less than the configuration asks for."""
        return bool(self._context.needs_update(user.password_hash))

    async def verify(self, password: str, user: User | None) -> User:
        """Return the user if this is his password; for nobody it takes as long to say that it is not.

        Raises InvalidCredentials, or Overloaded when more passwords wait than `queue` allows.
        """
        hashed = self._dummy if user is None else user.password_hash
        right = await self._lane.run((password, hashed))
        if user is None or not right:
            raise InvalidCredentials
        return user

    def close(self) -> None:
        """Let the threads go."""
        self._lane.close()

    def _verify(self, job: tuple[str, str]) -> bool:
        try:
            return bool(self._context.verify(*job))
        except (ValueError, TypeError):  # what a scheme cannot hash (NUL, over 72 bytes in bcrypt) nobody has set
            return False
