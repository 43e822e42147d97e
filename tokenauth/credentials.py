"""Credentials: whose a name and a password are. Every route that takes them asks here; all are throttled alike."""

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from tokenauth.clock import Clock
from tokenauth.errors import InvalidCredentials, InvalidRequest, Overloaded, RetryLater
from tokenauth.login_queue import Gone, here
from tokenauth.logs import log
from tokenauth.models import Instant, User
from tokenauth.passwords import CannotHash, Passwords, impossible, is_text
from tokenauth.settings.model import MAX_NAME, canonical
from tokenauth.throttle import Throttle, network, place

REMEMBERED = 60.0
"""Seconds for which `recall` remembers a password that was right."""

_MAX_REMEMBERED = 10_000
"""Passwords that are remembered at the same time."""


class Claimed(NamedTuple):
    """A name and a password, as somebody sent them."""

    username: str
    password: str


class _Remembered(NamedTuple):
    """The fingerprint of a password that was right, and until when it need not be hashed again."""

    fingerprint: bytes
    until: Instant


class _Trial:
    """A password that is being checked, and who waits for that."""

    def __init__(self, trial: Callable[[Gone], Coroutine[Any, Any, tuple[User, str]]]) -> None:
        self._waiting: list[Gone] = []
        self.task = asyncio.ensure_future(trial(self._gone))

    def join(self, gone: Gone) -> Awaitable[tuple[User, str]]:
        """Wait for it, too."""
        self._waiting.append(gone)
        return asyncio.shield(self.task)

    def _gone(self) -> bool:
        """Whether all who wait have gone."""
        return all(gone() for gone in self._waiting)


class Credentials:
    """The names and passwords of the users that stand in the configuration."""

    def __init__(self, users: Mapping[str, User], passwords: Passwords, throttle: Throttle, clock: Clock) -> None:
        self._users = users
        self._passwords = passwords
        self._throttle = throttle
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._remembered: dict[tuple[str, str], _Remembered] = {}
        self._trials: dict[tuple[object, ...], _Trial] = {}

    async def verify(self, claimed: Claimed, address: str, gone: Gone = here) -> User:
        """Return the user whose name and password these are.

        Raises InvalidRequest, InvalidCredentials, TooManyAttempts, Overloaded, ClientGone or StoreUnavailable.
        """
        user, _ = await self._verify([claimed], address, gone)
        return user

    async def recall(self, readings: Sequence[Claimed], address: str, gone: Gone = here) -> User:
        """Verify, in a way for callers who come all day: a password that was right is not hashed again for a while.

        For REMEMBERED seconds its HMAC under a key of this process is held in memory, for each user and place; calls
        that come while it is hashed wait for the same hash. A wrong password ends that, wherever in this process it
        was sent. `readings` are what the same bytes may mean; together they are one try. Raises what `verify` does.
        """
        now = self._clock()
        known, compared = await self._recollect(readings, address, now)
        if known is not None:
            return known
        sent = (*readings, address)
        trial = self._trials.get(sent)
        if trial is None:
            trial = self._trials[sent] = _Trial(partial(self._verify, readings, address, compared=compared))
            trial.task.add_done_callback(lambda _: self._trials.pop(sent))
        user, password = await trial.join(gone)
        self._remember(user, password, address, now)
        return user

    async def _recollect(self, readings: Sequence[Claimed], address: str, now: Instant) -> tuple[User | None, bool]:
        """Return the user whose password was right here before, and whether the throttle allowed a comparison."""
        compared = False
        claims = [(canonical(name), password) for name, password in readings]
        for name in dict(claims):
            remembered, user = self._remembered.get((name, place(address))), self._users.get(name)
            if remembered is None or user is None or now >= remembered.until:
                continue
            try:
                seen = await self._throttle.take_proof(name, address)
            except RetryLater as refusal:
                log.warning("login_refused", user=name, network=network(address), reason=refusal.code)
                raise
            if seen is None:
                continue
            compared = True
            made = [self._fingerprint(user, password) for claimed, password in claims if claimed == name]
            if any(hmac.compare_digest(remembered.fingerprint, fingerprint) for fingerprint in made):
                self._throttle.give_back(name, address, seen)
                return user, compared
        return None, compared

    def _remember(self, user: User, password: str, address: str, now: Instant) -> None:
        key = user.username, place(address)
        self._remembered.pop(key, None)
        self._remembered[key] = _Remembered(self._fingerprint(user, password), now + REMEMBERED)
        while len(self._remembered) > _MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    async def _verify(
        self, readings: Sequence[Claimed], address: str, gone: Gone, compared: bool = False
    ) -> tuple[User, str]:
        """Return the user, and which password it was."""
        claims = [Claimed(canonical(name), password) for name, password in _possible(readings)]
        names = list(dict.fromkeys(name for name, _ in claims))
        # A name that no user has may be a password in the wrong field: it is not logged.
        shown = " or ".join(name for name in names if name in self._users) or "(unknown)"
        try:
            # Counted under every name that is tried, whether a user has it or not: else the count would tell.
            async with self._throttle.attempt(names, address, gone, compared=compared) as attempt:
                user, password = await self._passwords.verify(
                    [claim for claim in dict.fromkeys(claims) if claim.username in attempt.names]
                )
                attempt.username = user.username
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
