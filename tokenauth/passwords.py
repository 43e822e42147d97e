"""Passwords: the only module that knows passlib; hashing runs in a lane of its own."""

import re
from collections.abc import Iterable
from typing import Any

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


_LEAST_ROUNDS = {"bcrypt": 10, "scrypt": 14, "pbkdf2_sha256": 100_000}
"""Costs below which a hash is weak; those of bcrypt and scrypt are powers of two."""


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
        self._lane = Lane(self._verify, terms.lanes, terms.queue, gives_way=True)
        self._terms = terms
        self._dummy = self.hash("nobody has this password")

    def hash(self, password: str) -> str:
        """Hash a password for the configuration: argon2id at the configured cost, PHC string format."""
        return str(self._context.hash(password))

    def check(self, users: Iterable[User]) -> None:
        """Raise ConfigError unless every user's hash is one that `verify` can read."""
        for user in users:
            try:
                self._read(user.password_hash)
            except (ValueError, TypeError, UnknownHashError):
                raise ConfigError(
                    f"users: the password of {user.username!r} is not a hash that can be read"
                    " (argon2, bcrypt, scrypt, pbkdf2_sha256); make one with `tokenauth hash-password`"
                ) from None

    def weak(self, user: User) -> bool:
        """Whether a hash costs an attacker less than the configuration asks for, or than is usual for its scheme."""
        scheme, cost = self._read(user.password_hash)
        if scheme != "argon2":
            return int(cost.rounds) < _LEAST_ROUNDS[scheme]
        less = cost.memory_cost < self._terms.memory_kib or cost.rounds < self._terms.time_cost
        return bool(less) or cost.type != "id"

    async def verify(self, password: str, user: User | None) -> User:
        """Return the user if this is his password; for nobody it takes as long to say that it is not.

        Raises InvalidCredentials, or Overloaded when more passwords wait than `queue` allows.
        """
        hashed = self._dummy if user is None else user.password_hash
        right = await self._lane.run((password, hashed))
        if user is None or not right:
            raise InvalidCredentials
        return user

    async def ready(self) -> str | None:
        """Say what keeps passwords from being verified, if anything does."""
        trouble = self._lane.trouble()
        return None if trouble is None else f"passwords cannot be verified: {trouble}"

    def close(self) -> None:
        """Let the threads go."""
        self._lane.close()

    def _read(self, hashed: str) -> tuple[str, Any]:
        """Take a hash apart: its scheme, and passlib's record of what it costs. Raises ValueError or TypeError."""
        if not re.fullmatch(r"[\x21-\x7e]+", hashed):
            raise ValueError("a hash is printable ASCII without blanks")
        scheme: str = self._context.identify(hashed, required=True)
        return scheme, self._context.handler(scheme).from_string(hashed)

    def _verify(self, job: tuple[str, str]) -> bool:
        try:
            return bool(self._context.verify(*job))
        except (ValueError, TypeError):  # what a scheme cannot hash (NUL, over 72 bytes in bcrypt) nobody has set
            return False
