"""Passwords: the only module that knows passlib, and the lane that hashing runs in."""

import asyncio
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from passlib.context import CryptContext
from passlib.exc import UnknownHashError

from tokenauth import config
from tokenauth.errors import ConfigError, InvalidCredentials, Overloaded
from tokenauth.models import User

MIN_LENGTH = 8
"""Characters that a password must have when it is set."""

MAX_LENGTH = 1024
"""Characters of a password; a longer one is refused before any work."""

_LOW_PRIORITY = 10


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
        self._lane = ThreadPoolExecutor(terms.lanes, "password", initializer=_give_way)
        self._room = terms.lanes + terms.queue
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
        if self._room <= 0:
            raise Overloaded
        self._room -= 1
        loop = asyncio.get_running_loop()
        job = self._lane.submit(self._verify, password, self._dummy if user is None else user.password_hash)
        job.add_done_callback(lambda _: self._make_room(loop))
        right = await asyncio.wrap_future(job)
        if user is None or not right:
            raise InvalidCredentials
        return user

    def close(self) -> None:
        """Let the threads go."""
        self._lane.shutdown(wait=False, cancel_futures=True)

    def _verify(self, password: str, hashed: str) -> bool:
        try:
            return bool(self._context.verify(password, hashed))
        except ValueError:  # what a scheme cannot hash (NUL or over 72 bytes in bcrypt) nobody has set
            return False

    def _make_room(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count a job as done when its thread is free, not when whoever asked has gone."""

        def count() -> None:
            self._room += 1

        with suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(count)


def _give_way() -> None:
    """Lower the priority of the calling thread, so that answering comes before hashing."""
    with suppress(OSError, AttributeError):  # where threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
