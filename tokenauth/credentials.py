"""Checks names and passwords. Every route that takes them calls this, so all are throttled in the same way."""

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

from tokenauth.addresses import location, network
from tokenauth.clock import Clock
from tokenauth.errors import (
    ClientGone,
    InvalidCredentials,
    InvalidRequest,
    Overloaded,
    Refusal,
    RetryLater,
    StoreUnavailable,
    TooManyAttempts,
)
from tokenauth.login_queue import DisconnectCheck, never_disconnected
from tokenauth.logs import log
from tokenauth.models import Instant, User
from tokenauth.passwords import CannotHash, Passwords, is_text, password_problem
from tokenauth.settings.model import MAX_NAME, canonical
from tokenauth.throttle import Throttle

CACHE_SECONDS = 60.0
"""Seconds for which `verify_cached` accepts a password without hashing it again."""

_CACHE_SIZE = 10_000

_REFUSALS = (InvalidCredentials, TooManyAttempts, Overloaded, ClientGone, StoreUnavailable)


class Candidate(NamedTuple):
    """A name and a password to be checked."""

    username: str
    password: str


class _Cached(NamedTuple):
    fingerprint: bytes
    until: Instant


class _SharedCheck:
    """A password check that several requests wait for. It is abandoned when all of their clients have disconnected."""

    def __init__(self, check: Callable[[DisconnectCheck], Coroutine[Any, Any, tuple[User, str]]]) -> None:
        self._waiting: list[DisconnectCheck] = []
        self.task = asyncio.ensure_future(check(self._all_disconnected))

    def join(self, disconnected: DisconnectCheck) -> Awaitable[tuple[User, str]]:
        self._waiting.append(disconnected)
        return asyncio.shield(self.task)

    def _all_disconnected(self) -> bool:
        return all(disconnected() for disconnected in self._waiting)


class Credentials:
    """The names and passwords of the users in the configuration."""

    def __init__(self, users: Mapping[str, User], passwords: Passwords, throttle: Throttle, clock: Clock) -> None:
        self._users = users
        self._passwords = passwords
        self._throttle = throttle
        self._clock = clock
        self.results = dict.fromkeys(("ok", *(refusal.code for refusal in _REFUSALS)), 0)
        """Logins by result: "ok", which is counted where a token is issued, or the code of a refusal."""
        self._key = secrets.token_bytes(32)
        self._cache: dict[tuple[str, str], _Cached] = {}
        self._checks: dict[tuple[object, ...], _SharedCheck] = {}

    async def verify(
        self, candidate: Candidate, address: str, disconnected: DisconnectCheck = never_disconnected
    ) -> User:
        """Return the user if the password matches.

        Raises InvalidRequest, InvalidCredentials, TooManyAttempts, Overloaded, ClientGone or StoreUnavailable.
        """
        user, _ = await self._verify([candidate], address, disconnected)
        return user

    async def verify_cached(
        self, candidates: Sequence[Candidate], address: str, disconnected: DisconnectCheck = never_disconnected
    ) -> User:
        """Return the user if one of the candidates matches, for clients that send a password with each request.

        `candidates` are the possible decodings of the same bytes. Together they count as one attempt.

        A password that was right is not hashed again for CACHE_SECONDS: its BLAKE2b hash, under a key of this process,
        is kept in memory for each user and location. Equal requests that arrive while it is hashed share the result. A
        wrong password for that user and location, sent to any route of this process, invalidates it.

        Raises what `verify` raises.
        """
        now = self._clock()
        user, compared = await self._find_cached(candidates, address, now)
        if user is not None:
            return user
        key = (*candidates, address)
        check = self._checks.get(key)
        if check is None:
            check = self._checks[key] = _SharedCheck(partial(self._verify, candidates, address, compared=compared))
            check.task.add_done_callback(lambda _: self._checks.pop(key))
        user, password = await check.join(disconnected)
        self._store(user, password, address, now)
        return user

    async def _find_cached(
        self, candidates: Sequence[Candidate], address: str, now: Instant
    ) -> tuple[User | None, bool]:
        """Return the user whose cached password this is, and whether any password was compared."""
        compared, here = False, location(address)
        pairs = [(canonical(name), password) for name, password in candidates]
        for name in dict(pairs):
            cached, user = self._cache.get((name, here)), self._users.get(name)
            if cached is None or user is None or now >= cached.until:
                continue
            try:
                permit = await self._throttle.permit_comparison(name, address)
            except RetryLater as refusal:
                self.count(refusal)
                log.warning("login_refused", user=name, network=network(address), reason=refusal.code)
                raise
            if permit is None:
                continue
            compared = True
            for other, password in pairs:
                if other == name and hmac.compare_digest(cached.fingerprint, self._fingerprint(user, password)):
                    self._throttle.return_permit(name, address, permit)
                    return user, compared
        return None, compared

    def _store(self, user: User, password: str, address: str, now: Instant) -> None:
        key = user.username, location(address)
        self._cache.pop(key, None)
        self._cache[key] = _Cached(self._fingerprint(user, password), now + CACHE_SECONDS)
        while len(self._cache) > _CACHE_SIZE:
            del self._cache[next(iter(self._cache))]

    async def _verify(
        self, candidates: Sequence[Candidate], address: str, disconnected: DisconnectCheck, compared: bool = False
    ) -> tuple[User, str]:
        """Return the user, and which password matched."""
        possible = [Candidate(canonical(name), password) for name, password in _possible(candidates)]
        names = list(dict.fromkeys(name for name, _ in possible))
        # An unknown name may be a password typed into the wrong field: it is not logged.
        shown = " or ".join(name for name in names if name in self._users) or "(unknown)"
        try:
            # Unknown names are counted too: otherwise the throttle would reveal which names exist.
            async with self._throttle.attempt(names, address, disconnected, compared=compared) as attempt:
                user, password = await self._passwords.verify(
                    [candidate for candidate in dict.fromkeys(possible) if candidate.username in attempt.names]
                )
                attempt.username = user.username
                return user, password
        except InvalidCredentials as refusal:
            self.count(refusal)
            log.warning("login_failed", user=shown, network=network(address))
            raise
        except CannotHash as error:
            log.error("login_not_checked", user=shown, network=network(address), cost=str(error))
            overloaded = Overloaded("The server cannot check a password now. Try again shortly.")
            self.count(overloaded)
            raise overloaded from None
        except RetryLater as refusal:
            self.count(refusal)
            log.warning("login_refused", user=shown, network=network(address), reason=refusal.code)
            raise

    def count(self, refusal: Refusal | None = None) -> None:
        """Count a login: with a refusal a refused one, else one that got its token."""
        result = "ok" if refusal is None else refusal.code
        self.results[result] = self.results.get(result, 0) + 1

    def _fingerprint(self, user: User, password: str) -> bytes:
        # With the credential: a changed password hash makes the cached fingerprint worthless.
        secret = f"{user.username}\0{user.credential}\0{password}".encode()
        return blake2b(secret, key=self._key, digest_size=32).digest()


def _possible(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return the candidates that any user could have. Raises InvalidRequest if there is none."""
    possible = [candidate for candidate in candidates if _problem(candidate) is None]
    if not possible:
        raise InvalidRequest(_problem(candidates[0]))
    return possible


def _problem(candidate: Candidate) -> str | None:
    """Return why no user can have this name and password, or None."""
    if len(candidate.username) > MAX_NAME:
        return f"username: longer than {MAX_NAME} characters"
    if "\0" in candidate.username:
        return "username: has a NUL character"
    if not is_text(candidate.username):
        return "username: is not Unicode text"
    return password_problem(candidate.password)
