"""Credentials: whose a name and a password are. Every route that takes them asks here; all are throttled alike."""

import asyncio
import hmac
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from tokenauth.config import MAX_NAME, canonical
from tokenauth.errors import InvalidCredentials, InvalidRequest, RetryLater
from tokenauth.logs import log
from tokenauth.models import Clock, Instant, User
from tokenauth.passwords import MAX_LENGTH, Passwords
from tokenauth.throttle import Throttle, network

REMEMBERED = 60.0
"""Seconds for which `recall` remembers a password that was right."""


class Claimed(NamedTuple):
    """A name and a password, as somebody sent them."""

    username: str
    password: str


class _Remembered(NamedTuple):
    """The fingerprint of a password that was right, and until when it need not be hashed again."""

    fingerprint: bytes
    until: Instant


class Credentials:
    """The names and passwords of the users that stand in the configuration."""

    def __init__(self, users: Mapping[str, User], passwords: Passwords, throttle: Throttle, clock: Clock) -> None:
        self._users = users
        self._passwords = passwords
        self._throttle = throttle
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._remembered: dict[str, _Remembered] = {}
        self._trials: dict[tuple[object, ...], asyncio.Future[tuple[User, str]]] = {}

    async def verify(self, claimed: Claimed, address: str) -> User:
        """Return the user whose name and password these are.

        Raises InvalidRequest, InvalidCredentials, TooManyAttempts, Overloaded or StoreUnavailable.
        """
        user, _ = await self._verify([claimed], address)
        return user

    async def recall(self, readings: Sequence[Claimed], address: str) -> User:
        """Verify, in a way for callers who come all day: a password that was right is not hashed again for a while.

        For REMEMBERED seconds its HMAC under a key of this process is held in memory, one for each user; calls that
        come while it is hashed wait for the same hash. `readings` are what the same bytes may mean; together they are
        one try. Raises what `verify` does.
        """
        now = self._clock()
        known = self._recollect(readings, now)
        if known is not None:
            return known
        sent = (*readings, address)
        trial = self._trials.get(sent)
        if trial is None:
            trial = self._trials[sent] = asyncio.ensure_future(self._verify(readings, address))
            trial.add_done_callback(lambda _: self._trials.pop(sent))
        user, password = await asyncio.shield(trial)
        self._remembered[user.username] = _Remembered(self._fingerprint(user, password), now + REMEMBERED)
        return user

    def _recollect(self, readings: Sequence[Claimed], now: Instant) -> User | None:
        for username, password in readings:
            user = self._users.get(canonical(username))
            if user is not None and user.username in self._remembered:
                fingerprint, until = self._remembered[user.username]
                if now < until and hmac.compare_digest(fingerprint, self._fingerprint(user, password)):
                    return user
        return None

    async def _verify(self, readings: Sequence[Claimed], address: str) -> tuple[User, str]:
        """Return the user, and which password it was."""
        readings = _possible(readings)
        names = [canonical(reading.username) for reading in readings]
        name = next((name for name in names if name in self._users), names[0])
        user = self._users.get(name)
        # A name that nobody has may be a password that went into the wrong field: it is not logged.
        shown = "(unknown)" if user is None else name
        passwords = dict.fromkeys(reading.password for reading in readings if canonical(reading.username) == name)
        try:
            async with self._throttle.attempt(name, address):
                return await self._match(passwords, user)
        except InvalidCredentials:
            log.warning("login_failed", user=shown, network=network(address))
            raise
        except RetryLater as refusal:
            log.warning("login_refused", user=shown, network=network(address), reason=refusal.code)
            raise

    async def _match(self, passwords: Iterable[str], user: User | None) -> tuple[User, str]:
        """Find the password that is right. Raises InvalidCredentials."""
        for password in passwords:
            with suppress(InvalidCredentials):
                return await self._passwords.verify(password, user), password
        raise InvalidCredentials

    def _fingerprint(self, user: User, password: str) -> bytes:
        """Hide a password; a new hash in the configuration makes another fingerprint of it."""
        return hmac.digest(self._key, f"{user.username}\0{user.credential}\0{password}".encode(), "sha256")


def _possible(readings: Sequence[Claimed]) -> Sequence[Claimed]:
    """Return the readings that somebody's name and password may be. Raises InvalidRequest when there is none."""
    possible = [reading for reading in readings if _trouble(reading) is None]
    if not possible:
        raise InvalidRequest(_trouble(readings[0]))
    return possible


def _trouble(claimed: Claimed) -> str | None:
    """Say why nobody can have this name and this password."""
    for field, text, longest in zip(("username", "password"), claimed, (MAX_NAME, MAX_LENGTH), strict=True):
        if len(text) > longest:
            return f"{field}: longer than {longest} characters"
        if "\0" in text:
            return f"{field}: has a NUL character"
    return None
