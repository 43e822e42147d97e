"""Failed logins, and what they cost the next try.

Failures are counted for each user name from one network, and for each network. A name from elsewhere is not
held up, so nobody can lock a user out; a token that was issued is never touched.

What is counted is failures in the store, which all workers share, and tries that are under way in this one:
a try counts before its password is hashed. No more are let through at once than may still fail; the others wait
for their outcome. Each of several workers lets through its share of `free`, and at least one: so of tries at the
same moment, one worker lets `free` fail, and each further one at most its share more.
"""

import asyncio
import ipaddress
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

from tokenauth import config
from tokenauth.errors import InvalidCredentials, Overloaded, TooManyAttempts
from tokenauth.models import Clock, Failures
from tokenauth.stores.base import Store

_MAX_WAITING = 1000
"""Tries that may wait for the outcome of others under the same key."""


@dataclass(slots=True)
class _Gate:
    """The tries for one key that are under way, and those that wait for them."""

    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Throttle:
    """Holds up logins that follow on too many failed ones."""

    def __init__(self, terms: config.Throttle, workers: int, store: Store, clock: Clock) -> None:
        self._terms = terms
        self._workers = workers
        self._store = store
        self._clock = clock
        self._gates: dict[bytes, _Gate] = {}

    @asynccontextmanager
    async def attempt(self, name: str, address: str) -> AsyncIterator[None]:
        """Let a try through, and count it if it ends with InvalidCredentials.

        Raises TooManyAttempts when it must wait longer than for the tries under way.
        """
        place = network(address)
        key, wide = _key("name", name, place), _key("network", place)
        async with self._pass(key, self._terms.free) as failed_before, self._pass(wide, self._terms.network_free):
            try:
                yield
            except InvalidCredentials:
                await self._store.failures.fail([key, wide], self._clock(), self._terms.forget)
                raise
            if failed_before:
                await self._store.failures.clear(key, self._clock())

    @asynccontextmanager
    async def _pass(self, key: bytes, free: int) -> AsyncIterator[bool]:
        """Wait for this key's turn; the value says whether failures are counted for it."""
        gate = self._gates.setdefault(key, _Gate())
        try:
            while True:
                failures = await self._standing(key)
                self._hold_up(failures, free)
                count = failures.count if failures else 0
                if gate.running < max(1, (free - count) // self._workers):
                    break
                if len(gate.waiting) >= _MAX_WAITING:
                    raise Overloaded
                turn = asyncio.get_running_loop().create_future()
                gate.waiting.append(turn)
                await turn
            gate.running += 1
            try:
                yield failures is not None
            finally:
                gate.running -= 1
        finally:
            while gate.waiting and gate.waiting[0].done():
                gate.waiting.popleft()
            if gate.waiting:
                gate.waiting.popleft().set_result(None)
            elif gate.running == 0:
                self._gates.pop(key, None)

    async def _standing(self, key: bytes) -> Failures | None:
        """Read what is counted for a key and not yet forgotten."""
        failures = (await self._store.failures.failures([key])).get(key)
        if failures is None or self._clock() >= failures.last_at + self._terms.forget:
            return None
        return failures

    def _hold_up(self, failures: Failures | None, free: int) -> None:
        if failures is None:
            return
        wait = failures.last_at + self.delay(failures.count, free) - self._clock()
        if wait > 0:
            raise TooManyAttempts(retry_after=math.ceil(wait))

    def delay(self, count: int, free: int) -> float:
        """Seconds that the next try has to wait after so many failures in a row."""
        if count < free:
            return 0.0
        doublings = min(count - free, 32)
        return float(min(self._terms.delay * 2**doublings, self._terms.max_delay))


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """Name the network of a client address: /24 of IPv4, /64 of IPv6; all unreadable ones are one network."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    prefix = 24 if parsed.version == 4 else 64
    return str(ipaddress.ip_network((parsed, prefix), strict=False))


def _key(*parts: str) -> bytes:
    """Hide what is counted: people type passwords into the name field."""
    return sha256("\0".join(parts).encode()).digest()[:16]
