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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

from tokenauth import config
from tokenauth.errors import InvalidCredentials, Overloaded, TooManyAttempts
from tokenauth.models import Clock
from tokenauth.stores.base import Store

_MAX_WAITING = 1000
"""Tries that may wait for the outcome of others under the same key."""


@dataclass(slots=True)
class _Gate:
    """The tries for one key: how many are under way, and those that wait for one of them to be over."""

    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    async def wait(self) -> None:
        """Wait to be woken. Raises Overloaded when too many do."""
        if len(self.waiting) >= _MAX_WAITING:
            raise Overloaded
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        await turn

    def wake(self) -> None:
        """Have the next one look whether it may go."""
        while self.waiting:
            turn = self.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


@dataclass(slots=True)
class Attempt:
    """A try that is under way; `name` is whose failures are cleared if it succeeds."""

    name: str


class Throttle:
    """Holds up logins that follow on too many failed ones."""

    def __init__(self, terms: config.Throttle, workers: int, store: Store, clock: Clock) -> None:
        self._terms = terms
        self._workers = workers
        self._store = store
        self._clock = clock
        self._gates: dict[bytes, _Gate] = {}
        self._clean: set[bytes] = set()

    @asynccontextmanager
    async def attempt(self, names: Sequence[str], address: str) -> AsyncIterator[Attempt]:
        """Let a try through, and count it if it ends with InvalidCredentials: once for the network and for each name.

        Raises TooManyAttempts when it must wait longer than for the tries under way.
        """
        place = network(address)
        wide, narrow = _key("network", place), {name: _key("name", name, place) for name in names}
        failed_before = await self._enter(wide, list(narrow.values()))
        attempt = Attempt(names[0])
        try:
            yield attempt
            if failed_before[narrow[attempt.name]]:
                await self._store.failures.clear(narrow[attempt.name], self._clock())
        except InvalidCredentials:
            await self._store.failures.fail([wide, *narrow.values()], self._clock(), self._terms.forget)
            raise
        finally:
            for key in (wide, *narrow.values()):
                self._leave(key)

    async def suspects(self, address: str) -> bool:
        """Whether a failure counts for the network of this address."""
        return await self._failed(_key("network", network(address)), self._terms.network_free) > 0

    async def _enter(self, wide: bytes, narrow: Sequence[bytes]) -> dict[bytes, int]:
        """Wait until a try may go; the answer is how many failures each name has."""
        waited = None
        try:
            while True:
                of_network = await self._failed(wide, self._terms.network_free)
                # Each failure counts for both: without one of the network there is none of a name.
                of_names = {key: await self._failed(key, self._terms.free) if of_network else 0 for key in narrow}
                full = self._full(wide, self._terms.network_free - of_network)
                for key in narrow:
                    full = self._full(key, self._terms.free - of_names[key]) or full
                if full is None:
                    break
                waited = full
                await full.wait()
        finally:
            if waited is not None:
                waited.wake()
                for key in (wide, *narrow):
                    self._tidy(key)
        for key in (wide, *narrow):
            self._gates.setdefault(key, _Gate()).running += 1
        return of_names

    def _full(self, key: bytes, left: int) -> _Gate | None:
        """Return the gate of a key if as many tries are under way here as this worker's share of those left."""
        gate = self._gates.get(key)
        return gate if gate is not None and gate.running >= max(1, left // self._workers) else None

    def _leave(self, key: bytes) -> None:
        gate = self._gates[key]
        gate.running -= 1
        gate.wake()
        self._tidy(key)

    def _tidy(self, key: bytes) -> None:
        """Drop a gate that nobody uses. Whoever was woken and finds it gone makes a new one."""
        gate = self._gates.get(key)
        if gate is not None and not gate.running and not gate.waiting:
            del self._gates[key]

    async def _failed(self, key: bytes, free: int) -> int:
        """Return how many failures count for a key. Raises TooManyAttempts while they hold it up.

        That there is none is looked up once in a turn of the event loop.
        """
        if key in self._clean:
            return 0
        failures = (await self._store.failures.failures([key])).get(key)
        if failures is None:
            if not self._clean:
                asyncio.get_running_loop().call_soon(self._clean.clear)
            self._clean.add(key)
            return 0
        now = self._clock()
        if now >= failures.last_at + self._terms.forget:
            return 0
        wait = failures.last_at + self._delay(failures.count, free) - now
        if wait > 0:
            raise TooManyAttempts(retry_after=math.ceil(wait))
        return failures.count

    def _delay(self, count: int, free: int) -> float:
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


@lru_cache(maxsize=4096)
def _key(*parts: str) -> bytes:
    """Hide what is counted: people type passwords into the name field."""
    return sha256("\0".join(parts).encode()).digest()[:16]
