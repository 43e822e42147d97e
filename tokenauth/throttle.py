"""Failed logins, and how they hold up the next ones.

The rule, with the defaults of `[throttle]` in brackets:

1. A user who has logged in from a place within the last 30 days is *known* there. A place is one IPv4 address, or an
   IPv6 /64. Failures of that name at that place hold it up, and nothing else does: nobody elsewhere can spend the
   allowance of a known user, however many logins fail for the same name, or in the same network.
   After `free` [5] failures in a row each next try waits: 1 s, 2 s, 4 s, ... up to `max_delay` [15 min].
   A success ends the row, and so does an hour (`forget`) without failures.
2. Every other login is held up by five counts:

   - failures in a row of the name in its network (IPv4 /24, IPv6 /64), with the same delays;
   - failures of the name in its region (IPv4 /16, IPv6 /48): 2 x `free` [10], of which `free` an hour are forgotten;
   - failures of the name anywhere: 20 x `free` [100], of which 2 x `free` an hour are forgotten;
   - failures of all names in the network: `network_free` [100], of which as many an hour are forgotten;
   - failures of all names in the region: 4 x `network_free` [400], of which as many an hour are forgotten.

3. Networks are judged by failures in excess of successes: a success takes back, from every count, the failures of the
   same name at the same place. It takes back nothing else, so nobody can log in to wash away guesses at other names.

What a login finds depends on what has failed and succeeded, never on whether the name exists: a name without a success
is treated the same whether a user has it or not.

Every try is counted before anything is compared: as in flight, in memory, until its failure is in the store, which
all workers share. No more are in flight than may still fail. The others wait in the login queue. Each of several
workers lets through its share of what is left, at least one: so of tries at the same instant, one worker lets `free`
fail, and each further worker at most its share more.
"""

import asyncio
import ipaddress
import math
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from tokenauth import config
from tokenauth.errors import InvalidCredentials, RetryLater, TooManyAttempts
from tokenauth.login_queue import Gone, LoginQueue, Turn, here
from tokenauth.models import Clock, Failures, Instant
from tokenauth.stores.base import Note, Store

KNOWN = 30 * 86400.0
"""Seconds for which a user is known at a place after a login."""

_DAY = 86400.0
"""Seconds after which another login writes down that the user is known."""

_FRESH = 1.0
"""Seconds for which a worker believes that a known user has not failed elsewhere, without asking the store."""

_MAX_PROVEN = 10_000
"""Known users and places that a worker remembers."""

_NOTHING = Failures(0, 0.0)


class _Keys(NamedTuple):
    """What is counted for one name at one address. The store has hashes: people type passwords into the name field."""

    username: str
    known: bytes
    """Until when the user is known at the place."""
    own: bytes
    """Failures in a row of the name at the place."""
    row: bytes
    """Failures in a row of the name in the network."""
    name_in_region: bytes
    name: bytes
    network: bytes
    region: bytes


class _Bucket(NamedTuple):
    """A count of failures that are forgotten one by one.

    What is stored is the instant at which none will be left: each failure moves it by the time that one takes.
    """

    key: bytes
    size: int
    each: float
    """Seconds after which one failure is forgotten."""

    def left(self, found: Mapping[bytes, Failures], now: Instant) -> float:
        """Return how many more may fail now."""
        return self.size - max(0.0, found.get(self.key, _NOTHING).last_at - now) / self.each


class _State(NamedTuple):
    """What has happened to one name at one address, and may be changed by what happens next."""

    keys: _Keys
    known_until: Instant
    known: bool
    failed: int
    """Failures of the name at the place, since its last success there."""


@dataclass(slots=True)
class Attempt:
    """A try that is under way; `forgiven` are the names whose failures are taken back if it succeeds."""

    forgiven: Collection[str]


class Throttle:
    """Holds up logins that follow on too many failed ones."""

    def __init__(self, terms: config.Throttle, workers: int, store: Store, clock: Clock, queue: LoginQueue) -> None:
        self._terms = terms
        self._workers = workers
        self._store = store
        self._clock = clock
        self._queue = queue
        self._proven: dict[bytes, Instant] = {}
        self._writing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def attempt(
        self, names: Sequence[str], address: str, gone: Gone = here, hashes: bool = True
    ) -> AsyncIterator[Attempt]:
        """Let a try through, and count it under each name if it ends with InvalidCredentials.

        `hashes`: it needs a hashing thread. Raises TooManyAttempts, Overloaded, ClientGone or StoreUnavailable.
        """
        keys = [_keys(name, address) for name in names]
        states, limits = await self._look(keys)
        turn = Turn(network(address), f"{place(address)} {names[0]}", limits, hashes, gone)
        try:
            waited = await self._queue.enter(turn)
            while waited:  # others have failed meanwhile, perhaps
                states, limits = await self._look(keys)
                waited = not self._queue.goes_on(turn, limits)
                if waited:
                    await self._queue.again(turn)
            attempt = Attempt(names)
            try:
                yield attempt
            finally:
                self._queue.release(turn)
            await self._succeeded(
                [state for name, state in zip(names, states, strict=True) if name in attempt.forgiven]
            )
        except InvalidCredentials:
            await self._failed(states)
            raise
        finally:
            self._queue.leave(turn)

    async def take_proof(self, name: str, address: str) -> Instant | None:
        """Allow one comparison with a secret that was right here: None, unless it was and nothing has failed since.

        That comparison counts as a try until `give_back`, for which the caller keeps the instant: until then every
        other try goes through `attempt`. Other workers' failures are noticed within a second.
        """
        own = _keys(name, address).own
        seen = self._proven.get(own)
        if seen is None:
            return None
        now = self._clock()
        if now - seen >= _FRESH:
            found = await self._store.failures.failures([own])
            if self._in_row(found.get(own), now):
                self._proven.pop(own, None)
            seen = now
        return None if self._proven.pop(own, None) is None else seen

    def give_back(self, name: str, address: str, seen: Instant) -> None:
        """Say that the secret was right: the next one may be compared, too."""
        self._proven[_keys(name, address).own] = seen

    async def close(self) -> None:
        """Finish what is being written."""
        await asyncio.gather(*self._writing)

    async def _look(self, names: Sequence[_Keys]) -> tuple[list[_State], Mapping[bytes, int]]:
        """Return what has happened, and how many tries may be in flight for each key. Raises TooManyAttempts."""
        asked = [key for keys in names for key in (keys.known, keys.own, keys.name, keys.region)]
        found = dict(await self._store.failures.failures(asked))
        now = self._clock()
        states = [self._state(keys, found, now) for keys in names]
        strange = [state.keys for state in states if not state.known]
        # Each failure of a stranger counts for the region: without one there, there is none in the network.
        more = [
            key for keys in strange if keys.region in found for key in (keys.row, keys.name_in_region, keys.network)
        ]
        if more:
            found |= await self._store.failures.failures(more)
            now = self._clock()
        waits, left = [0.0], dict[bytes, float]()
        for state in states:
            key = state.keys.own if state.known else state.keys.row
            count = self._in_row(found.get(key), now)
            if count:
                waits.append(found[key].last_at + self._delay(count) - now)
            left[key] = self._terms.free - count
        # A known user is not held up by the network because what was sent may also be read as another name.
        everybody = len(strange) == len(states)
        for bucket in self._buckets(strange, everybody):
            left[bucket.key] = bucket.left(found, now)
            waits.append((1 - left[bucket.key]) * bucket.each - _ROUNDING)
        if max(waits) > 0:
            raise TooManyAttempts(retry_after=math.ceil(max(waits)))
        return states, {key: max(1, int(number) // self._workers) for key, number in left.items()}

    def _state(self, keys: _Keys, found: Mapping[bytes, Failures], now: Instant) -> _State:
        known_until = found.get(keys.known, _NOTHING).last_at
        return _State(keys, known_until, known_until > now, self._in_row(found.get(keys.own), now))

    def _in_row(self, failures: Failures | None, now: Instant) -> int:
        """Return how many failures in a row count."""
        return 0 if failures is None or now >= failures.last_at + self._terms.forget else failures.count

    def _delay(self, count: int) -> float:
        """Seconds that the next try has to wait after so many failures in a row."""
        if count < self._terms.free:
            return 0.0
        doublings = min(count - self._terms.free, 32)
        return float(min(self._terms.delay * 2**doublings, self._terms.max_delay))

    def _buckets(self, names: Iterable[_Keys], everybody: bool = True) -> Iterable[_Bucket]:
        """List what strangers' failures fill: of these names, and of everybody in their network and region."""
        free, network_free, forget = self._terms.free, self._terms.network_free, float(self._terms.forget)
        buckets: dict[bytes, _Bucket] = {}
        for keys in names:
            buckets[keys.name_in_region] = _Bucket(keys.name_in_region, 2 * free, forget / free)
            buckets[keys.name] = _Bucket(keys.name, 20 * free, forget / (2 * free))
            if everybody:
                buckets[keys.network] = _Bucket(keys.network, network_free, forget / network_free)
                buckets[keys.region] = _Bucket(keys.region, 4 * network_free, forget / (4 * network_free))
        return buckets.values()

    async def _failed(self, states: Sequence[_State]) -> None:
        """Count a failure of each name."""
        now = self._clock()
        strange = [state.keys for state in states if not state.known]
        rows = [state.keys.own for state in states] + [keys.row for keys in strange]
        for state in states:
            self._proven.pop(state.keys.own, None)
        notes = [Note(key, 1, expired=now - self._terms.forget, at=now) for key in rows]
        notes += [Note(bucket.key, at=now, later=bucket.each) for bucket in self._buckets(strange)]
        await self._store.failures.note(notes, now)

    async def _succeeded(self, states: Sequence[_State]) -> None:
        """Take back the failures of each name at this place, and write down that it is known here."""
        now = self._clock()
        notes: dict[bytes, Note] = {}
        for keys, _, known, failed in states:
            if failed:
                notes[keys.own] = Note(keys.own, -failed)
            if failed and not known:
                notes[keys.row] = Note(keys.row, -failed)
                for bucket in self._buckets([keys]):
                    taken = notes.get(bucket.key, Note(bucket.key)).later - failed * bucket.each
                    notes[bucket.key] = Note(bucket.key, later=taken)
            self._proven.pop(keys.own, None)
            self._proven[keys.own] = now
        while len(self._proven) > _MAX_PROVEN:
            del self._proven[next(iter(self._proven))]
        marks = [Note(state.keys.known, at=now + KNOWN) for state in states if now + KNOWN - state.known_until >= _DAY]
        if notes:
            await self._store.failures.note([*notes.values(), *marks], now)
        elif marks:  # nobody waits for that; it shares the commit of the token that is issued next
            task = asyncio.create_task(self._write(marks, now))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _write(self, notes: Sequence[Note], now: Instant) -> None:
        with suppress(RetryLater):  # then the next login writes it
            await self._store.failures.note(notes, now)


_ROUNDING = 0.001
"""Seconds by which floating point may be wrong about an instant."""


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """Name the network of a client address: /24 of IPv4, /64 of IPv6; all unreadable ones are one network."""
    return _cut(address, 24, 64)


@lru_cache(maxsize=4096)
def place(address: str) -> str:
    """Name the place that a client address stands for: the address itself, or a /64 of IPv6."""
    return _cut(address, 32, 64)


def _cut(address: str, ipv4: int, ipv6: int) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        parsed = parsed.ipv4_mapped or ipaddress.IPv6Address(int(parsed))  # without the zone of a link-local address
    return str(ipaddress.ip_network((parsed, ipv4 if parsed.version == 4 else ipv6), strict=False))


@lru_cache(maxsize=4096)
def _keys(name: str, address: str) -> _Keys:
    here, net, region = place(address), network(address), _cut(address, 16, 48)
    return _Keys(
        name,
        known=_key("known", name, here),
        own=_key("failed at place", name, here),
        row=_key("failed in network", name, net),
        name_in_region=_key("name in region", name, region),
        name=_key("name", name),
        network=_key("all in network", net),
        region=_key("all in region", region),
    )


def _key(*parts: str) -> bytes:
    return sha256("\0".join(parts).encode()).digest()[:16]
