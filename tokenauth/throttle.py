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

3. Networks are judged by failures in excess of successes: a success takes back, from the counts of 2., the failures of
   the same name at the same place. It takes back nothing else, so nobody can log in to wash away guesses at other
   names. To this end each bucket has a *share* for each name and place: a bucket of its own, filled and emptied at the
   same rate. As it empties at least as fast as its part of the whole, what is left in it is never more than the whole
   still holds beside what others filled in; a success moves just that, once.
4. Failures of one name at one place have a bucket that no success takes back: 20 x `free` [100], of which 2 x `free`
   an hour are forgotten. So nobody can guess between the logins of a client that logs in all day.

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
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from tokenauth.clock import Clock
from tokenauth.errors import ClientGone, InvalidCredentials, RetryLater, TooManyAttempts
from tokenauth.login_queue import Gone, LoginQueue, Turn, here
from tokenauth.models import Failures, Instant
from tokenauth.settings import model as config
from tokenauth.stores.store import Note, Store, TakeBack

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
    at_place: bytes
    """Failures of the name at the place, which no success takes back."""
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
    owner: bytes = b""
    """The name at the place whose failures these are; empty for those of all names."""

    def left(self, found: Mapping[bytes, Failures], now: Instant) -> float:
        """Return how many more may fail now."""
        return self.size - max(0.0, found.get(self.key, _NOTHING).last_at - now) / self.each

    def share(self, together: bytes) -> bytes:
        """Return the key of what one name at one place, or a try's names `together`, have added."""
        return _key("share", self.key.hex(), (self.owner or together).hex())


class _State(NamedTuple):
    """What has happened to one name at one address, and may be changed by what happens next."""

    keys: _Keys
    known_until: Instant
    known: bool
    failed: int
    """Failures of the name at the place, since its last success there."""


@dataclass(slots=True)
class Attempt:
    """A try that is under way, under these names; the failures of `username` are taken back if it succeeds."""

    names: Sequence[str]
    username: str


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
        self, names: Sequence[str], address: str, gone: Gone = here, hashes: bool = True, compared: bool = False
    ) -> AsyncIterator[Attempt]:
        """Let a try through, and count it under each name that is tried if it ends with InvalidCredentials.

        `hashes`: it needs a hashing thread. `compared`: what was sent has been compared with a remembered secret, and
        was another one; so it counts also when this try is refused.

        Raises TooManyAttempts, Overloaded, ClientGone or StoreUnavailable.
        """
        keys = [_keys(name, address) for name in names]
        turn = None
        try:
            states, limits = await self._look(keys)
            known = next((state.keys.username for state in states if state.known), None)
            path = (region(address), network(address), names[0]) if known is None else (known,)
            turn = Turn(path, limits, hashes, gone, known is not None)
            waited = await self._queue.enter(turn)
            while waited:  # others have failed meanwhile, perhaps
                states, limits = await self._look(keys)
                waited = not self._queue.goes_on(turn, limits)
                if waited:
                    await self._queue.again(turn)
            tried = [state.keys.username for state in states]
            attempt = Attempt(tried, tried[0])
            try:
                yield attempt
            finally:
                self._queue.release(turn)
            await self._succeeded(states, tried.index(attempt.username))
        except InvalidCredentials:
            await self._failed(states)
            raise
        except (RetryLater, ClientGone):
            if compared:
                with suppress(RetryLater):
                    await self._failed([_State(each, 0.0, True, 0) for each in keys])
            raise
        finally:
            if turn is not None:
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
        asked = [key for keys in names for key in (keys.known, keys.own, keys.at_place, keys.name, keys.region)]
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
        # A known user is not held up by the network because what was sent may also be read as another name.
        everybody = len(strange) == len(states)
        waits = [self._hold_up(state, everybody, found, now) for state in states]
        judged = [wait for state, wait in zip(states, waits, strict=True) if everybody or state.known]
        if max(judged) > 0:
            raise TooManyAttempts(retry_after=math.ceil(max(judged)))
        # Nor by what has failed under that other name: then it is not tried.
        states = [state for state, wait in zip(states, waits, strict=True) if wait <= 0]
        left = {bucket.key: bucket.left(found, now) for state in states for bucket in self._limiting(state, everybody)}
        for state in states:
            left[self._row(state)] = self._terms.free - self._in_row(found.get(self._row(state)), now)
        return states, {key: max(1, int(number) // self._workers) for key, number in left.items()}

    def _hold_up(self, state: _State, everybody: bool, found: Mapping[bytes, Failures], now: Instant) -> float:
        """Return for how long a try must wait."""
        waits = [0.0]
        row = found.get(self._row(state))
        if row is not None and (count := self._in_row(row, now)):
            waits.append(row.last_at + self._delay(count) - now)
        for bucket in self._limiting(state, everybody):
            waits.append((1 - bucket.left(found, now)) * bucket.each - _ROUNDING)
        return max(waits)

    def _limiting(self, state: _State, everybody: bool) -> Iterable[_Bucket]:
        return [self._at_place(state.keys), *([] if state.known else self._buckets([state.keys], everybody))]

    def _row(self, state: _State) -> bytes:
        return state.keys.own if state.known else state.keys.row

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

    def _at_place(self, keys: _Keys) -> _Bucket:
        free = self._terms.free
        return _Bucket(keys.at_place, 20 * free, self._terms.forget / (2 * free))

    def _buckets(self, names: Iterable[_Keys], everybody: bool = True) -> Iterable[_Bucket]:
        """List what strangers' failures fill: of these names, and of everybody in their network and region."""
        free, network_free, forget = self._terms.free, self._terms.network_free, float(self._terms.forget)
        buckets: dict[bytes, _Bucket] = {}
        for keys in names:
            buckets[keys.name_in_region] = _Bucket(keys.name_in_region, 2 * free, forget / free, keys.own)
            buckets[keys.name] = _Bucket(keys.name, 20 * free, forget / (2 * free), keys.own)
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
        filled = [(bucket.key, bucket.each) for bucket in (self._at_place(state.keys) for state in states)]
        together = _together(states)
        for bucket in self._buckets(strange):
            filled += [(bucket.key, bucket.each), (bucket.share(together), bucket.each)]
        notes += [Note(key, at=now, later=each) for key, each in filled]
        await self._store.failures.note(notes, now)

    async def _succeeded(self, states: Sequence[_State], which: int) -> None:
        """Take back the failures of the one who logged in at this place, and write down that it is known here."""
        now = self._clock()
        keys, known_until, known, failed = states[which]
        self._proven.pop(keys.own, None)
        self._proven[keys.own] = now
        while len(self._proven) > _MAX_PROVEN:
            del self._proven[next(iter(self._proven))]
        if failed:
            together = _together(states)
            # nobody counted the failures of a known user anywhere else
            shares = [] if known else [(bucket.share(together), bucket.key) for bucket in self._buckets([keys])]
            row = None if known else keys.row
            await self._store.failures.take_back(TakeBack(keys.own, row, shares, now - self._terms.forget, now))
        if now + KNOWN - known_until >= _DAY:
            # nobody waits for that; it shares the commit of the token that is issued next
            task = asyncio.create_task(self._write([Note(keys.known, at=now + KNOWN)], now))
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


@lru_cache(maxsize=4096)
def region(address: str) -> str:
    """Name the region of a client address: /16 of IPv4, /48 of IPv6."""
    return _cut(address, 16, 48)


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
    here, net, wide = place(address), network(address), region(address)
    return _Keys(
        name,
        known=_key("known", name, here),
        own=_key("failed at place", name, here),
        at_place=_key("all of name at place", name, here),
        row=_key("failed in network", name, net),
        name_in_region=_key("name in region", name, wide),
        name=_key("name", name),
        network=_key("all in network", net),
        region=_key("all in region", wide),
    )


def _together(states: Sequence[_State]) -> bytes:
    """Name what is sent as several names at once: it is one failure of the network, which is taken back only once."""
    return b"".join(sorted(state.keys.own for state in states))


def _key(*parts: str) -> bytes:
    return sha256("\0".join(parts).encode()).digest()[:16]
