"""Credentials: whose a name and a password are. Every route that takes them asks here; all are throttled alike."""

import asyncio
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenauth.config import MAX_NAME, canonical
from tokenauth.errors import InvalidCredentials, InvalidRequest, Overloaded, RetryLater
from tokenauth.logs import log
from tokenauth.models import Clock, Instant, User
from tokenauth.passwords import CannotHash, Passwords, impossible, is_text
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
        claims = [Claimed(canonical(name), password) for name, password in _possible(readings)]
        names = list(dict.fromkeys(name for name, _ in claims))
        # A name that no user has may be a password in the wrong field: it is not logged.
        shown = " or ".join(name for name in names if name in self._users) or "(unknown)"
        try:
            # Counted under every name that is tried, whether a user has it or not: else the count would tell.
            async with self._throttle.attempt(names, address) as attempt:
                user, password = await self._passwords.verify(list(dict.fromkeys(claims)))
                attempt.name = user.username
                return user, password
        except InvalidCredentials:
            log.warning("login_failed", user=shown, network=network(address))
            raise
        except CannotHash as error:
            log.error("login_not_checked", user=shown, network=network(address), cost=str(error))
            raise Overloaded("The server cannot check a password at the moment. Try again shortly.") from None
        except RetryLater as refusal:
            log.warning("login_refused", user=shown, network=network(address), reason=refusal.code)
            raise

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
    if len(claimed.username) > MAX_NAME:
        return f"username: longer than {MAX_NAME} characters"
    if "\0" in claimed.username:
        return "username: has a NUL character"
    if not is_text(claimed.username):
        return "username: is not Unicode text"
    return impossible(claimed.password)
