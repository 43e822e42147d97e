"""Delays and limits for logins after failed ones.

The rules, with the defaults of `[throttle]` in brackets:

1. A user who has logged in from a location within the last 30 days is *known* there. A location is one IPv4 address, or
   an IPv6 /64. Only failures of that name at that location delay a known user. So nobody elsewhere can use up the
   attempts of a known user, however many logins fail for the same name or in the same network.
   After `free` [5] failures in a row (a *streak*) each attempt has to wait: 1 s, 2 s, 4 s, ... up to `max_delay`
   [15 min]. A success ends the streak, and so does an hour (`forget`) without failures.
2. Every other login is one of a *stranger*. It is limited by five counts:

   - failures in a row of the name in its network (IPv4 /24, IPv6 /64), with the same delays;
   - failures of the name in its region (IPv4 /16, IPv6 /48): 2 x `free` [10], of which `free` an hour are forgotten;
   - failures of the name anywhere: 20 x `free` [100], of which 2 x `free` an hour are forgotten;
   - failures of all names in the network: `network_free` [100], of which as many an hour are forgotten;
   - failures of all names in the region: 4 x `network_free` [400], of which as many an hour are forgotten.

3. A success is a refund: it removes from the counts of rule 2 the failures of the same name at the same location. For
   example, "ann" fails 3 times and "bob" 5 times in one network, which then has 8 failures. When "ann" logs in, it has
   5. The failures of "bob" stay: nobody can log in to erase guesses at other names.
   For this, each bucket has a *share* for each name and location: a bucket of its own with the same rate, which here
   holds 3. A share drains at least as fast as its part of the whole bucket, so it never holds more than what the bucket
   still holds of it. A success subtracts exactly that from the bucket, and empties the share. When an operator clears
   the bucket, its number (`count` in the store) changes, and shares with another number are empty.
4. Failures of one name at one location also fill a bucket that is never refunded: 20 x `free` [100], of which
   2 x `free` an hour are forgotten. So nobody can guess between the logins of a client that logs in all day.

The result depends on what has failed and succeeded before, never on whether the name exists: a name without a success
is treated the same whether a user has it or not.

Every attempt is counted before anything is compared: first in memory, as in flight, and then as a failure in the store,
which all workers share. The number in flight never exceeds the number of failures still allowed; the others wait in the
login queue. Each of several workers allows its part of that number, at least one. So of attempts that arrive at the
same instant, one worker lets `free` fail, and each further worker at most its part more.
"""

import math
import secrets
from collections.abc import AsyncIterator, Container, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from tokenauth.addresses import location, network, region
from tokenauth.background import Background, finished
from tokenauth.clock import Clock
from tokenauth.errors import InvalidCredentials, RetryLater, TooManyAttempts
from tokenauth.login_queue import DisconnectCheck, LoginQueue, Turn, never_disconnected
from tokenauth.logs import log
from tokenauth.models import MAX_THROTTLED, CountUpdate, Failures, Instant, ShareUpdate, Throttled, longest_waits
from tokenauth.settings.model import ThrottleSettings
from tokenauth.stores.store import Store

KNOWN_FOR = 30 * 86400.0
"""Seconds for which a user is known at a location after a login."""

_KNOWN_UPDATE = 86400.0
"""Seconds after which a login extends that time in the store."""

_RECHECK = 1.0
"""Seconds for which a worker trusts, without asking the store, that a known user has not failed in another worker."""

_LISTED = 3600.0
"""Seconds for which one whose wait is over can still be cleared by name only."""

_MAX_PERMITS = 10_000

_ROUNDING = 0.001
"""Seconds by which floating point may be wrong about an instant."""

_NUMBER_BITS = 30
"""Bits of the first number of a bucket. It is random, so that no share of an earlier bucket has the same."""

_NO_FAILURES = Failures(0, 0.0)


class _Keys(NamedTuple):
    """The keys under which one name at one address is counted. They are hashes: people type passwords as names."""

    username: str
    address: str
    known: bytes
    """Until when the user is known at the location."""
    location_streak: bytes
    """Failures in a row of the name at the location."""
    location: bytes
    """Failures of the name at the location. These are never refunded."""
    network_streak: bytes
    """Failures in a row of the name in the network."""
    name_in_region: bytes
    name: bytes
    network: bytes
    region: bytes

    @property
    def first(self) -> Sequence[bytes]:
        """The keys that are read first. For most attempts they are all that is needed."""
        return self.known, self.location_streak, self.location, self.name, self.region


class _Bucket(NamedTuple):
    """A leaky bucket of failures. What is stored is the instant at which it will be empty."""

    key: bytes
    capacity: int
    drain_time: float
    """Seconds in which one failure drains."""
    owner: bytes = b""
    """`location_streak` of the only name and location that fill it; empty if all names do."""

    def remaining(self, found: Mapping[bytes, Failures], now: Instant) -> float:
        """Return how many more failures fit in."""
        return self.capacity - max(0.0, found.get(self.key, _NO_FAILURES).last_at - now) / self.drain_time

    def share(self, group: bytes) -> bytes:
        """Return the key of the share of its owner, or of a `group` of names that were tried together."""
        return _key("share", self.key.hex(), (self.owner or group).hex())


class _Wait(NamedTuple):
    """A delay in seconds, the key that it follows from, and how many failures are counted there."""

    seconds: float
    key: bytes = b""
    failures: int = 0


_NO_WAIT = _Wait(0.0)


class _State(NamedTuple):
    """The history of one name at one address, and what it still allows."""

    keys: _Keys
    known_until: Instant = 0.0
    known: bool = True
    failures: int = 0
    """Failures in a row of the name at the location."""
    wait: _Wait = _NO_WAIT
    allowed: Mapping[bytes, float] = {}
    """How many more failures each key allows."""


def _longest(states: Sequence[_State]) -> _State:
    """Return the one of several names that delays an attempt longest.

    If one of the names is a known user, only the failures of that user at this location delay the attempt.
    """
    if len(states) == 1:
        return states[0]
    return max([state for state in states if state.known] or states, key=lambda state: state.wait.seconds)


@dataclass(slots=True)
class Attempt:
    """An attempt to log in under one of `names`. If it succeeds, the failures of `username` are refunded."""

    names: Sequence[str]
    username: str


class Throttle:
    """Delays and limits logins after failed ones."""

    def __init__(
        self,
        settings: ThrottleSettings,
        workers: int,
        store: Store,
        clock: Clock,
        queue: LoginQueue,
        users: Container[str] = (),
    ) -> None:
        """`users` are the names that may be shown to operators: any other may be a password."""
        self._users = users
        self._throttled: dict[tuple[object, ...], Throttled] = {}
        self._settings = settings
        self._workers = workers
        self._store = store
        self._clock = clock
        self._queue = queue
        self.refusals = 0
        """Attempts that were refused because of earlier failures."""
        self._permits: dict[bytes, Instant] = {}
        self.background = Background()

    @asynccontextmanager
    async def attempt(
        self,
        names: Sequence[str],
        address: str,
        disconnected: DisconnectCheck = never_disconnected,
        hashes: bool = True,
        compared: bool = False,
    ) -> AsyncIterator[Attempt]:
        """Admit an attempt, and count a failure of each name if the body raises InvalidCredentials.

        names: the names that the request may mean. The attempt may be for only some of them.
        disconnected: returns whether the client has disconnected.
        hashes: the attempt needs a hashing thread.
        compared: the password was already compared with a cached one and did not match. So if this attempt is refused,
        it counts as a failure too.

        Raises TooManyAttempts, Overloaded, ClientGone or StoreUnavailable.
        """
        keys = [_keys(name, address) for name in names]
        turn = None
        try:
            states, limits = await self._check(keys)
            known = next((state.keys.username for state in states if state.known), None)
            path = (region(address), network(address), names[0]) if known is None else (known,)
            turn = Turn(path, limits, hashes, disconnected, known is not None)
            waited = await self._queue.enter(turn)
            while waited:  # others may have failed in the meantime
                states, limits = await self._check(keys)
                waited = not self._queue.change_limits(turn, limits)
                if waited:
                    await self._queue.enter_again(turn)
            tried = [state.keys.username for state in states]
            attempt = Attempt(tried, tried[0])
            try:
                yield attempt
            finally:
                self._queue.release_slot(turn)
            await self._count_success(states, tried.index(attempt.username))
        except InvalidCredentials:
            await self._count_failure(states)
            raise
        except RetryLater:
            if compared:
                with suppress(RetryLater):
                    await self._count_failure([_State(each) for each in keys])
            raise
        finally:
            if turn is not None:
                self._queue.finish(turn)

    async def permit_comparison(self, name: str, address: str) -> Instant | None:
        """Permit one comparison with a cached secret, if the last attempt here succeeded. Otherwise return None.

        The comparison counts as an attempt until `return_permit`, which takes the result of this call. Until then all
        other attempts go through `attempt`. Failures in other workers are noticed within a second.
        """
        key = _keys(name, address).location_streak
        checked_at = self._permits.get(key)
        if checked_at is None:
            return None
        now = self._clock()
        if now - checked_at >= _RECHECK:
            found = await self._store.failures.get([key])
            if self._streak_length(found.get(key), now):
                self._permits.pop(key, None)
            checked_at = now
        return None if self._permits.pop(key, None) is None else checked_at

    def return_permit(self, name: str, address: str, permit: Instant) -> None:
        """Report that the secret matched: the next one may be compared too."""
        self._permits[_keys(name, address).location_streak] = permit

    @property
    def queued(self) -> int:
        """The number of logins that wait for a hashing thread."""
        return self._queue.size

    def list_throttled(self) -> Sequence[Throttled]:
        """Return who was refused in this process, the longest wait first.

        Those whose wait was over less than _LISTED ago, too: their failures count still, and can be cleared.
        """
        over = self._clock() - _LISTED
        self._throttled = {key: each for key, each in self._throttled.items() if each.until > over}
        return longest_waits(self._throttled.values())

    async def check_throttled(self, listed: Iterable[Throttled]) -> Sequence[Throttled]:
        """Return those of a list who still have to wait, as all processes have counted it, the longest wait first."""
        now = self._clock()
        checked = [await self._check_again(each) for each in listed if each.until > now]
        return longest_waits(each for each in checked if each is not None)

    @finished
    async def clear_user(self, username: str, address: str, by: str) -> bool:
        """Forget the failures of a user at a location, in its network and region, and anywhere; False if it has none.

        Those of other names in the same network stay. It is logged with who did it (`by`).
        """
        keys = _keys(username, address)
        streaks, buckets = (keys.location_streak, keys.network_streak), (keys.location, keys.name_in_region, keys.name)
        done = await self._forget(streaks, buckets)
        if done:
            log.info("throttle_cleared", user=username, addresses=network(address), by=by)
        return done

    @finished
    async def clear_network(self, addresses: str, by: str) -> bool:
        """Forget the failures of all names in a network or region; False if there are none. It is logged.

        Those of each name stay.
        """
        done = await self._forget((), (_key("network", addresses), _key("region", addresses)))
        if done:
            log.info("throttle_cleared", range=addresses, by=by)
        return done

    async def _forget(self, streaks: Sequence[bytes], buckets: Sequence[bytes]) -> bool:
        found = await self._store.failures.get([*streaks, *buckets])
        now = self._clock()
        counted = [key for key in streaks if self._streak_length(found.get(key), now)]
        filled = [key for key in buckets if key in found and found[key].last_at > now]
        updates = [CountUpdate(key, -found[key].count, at=now) for key in counted]
        updates += [CountUpdate(key, 1, at=now, shift=now - found[key].last_at) for key in filled]
        if updates:
            await self._store.failures.update(updates, now)
        return bool(updates)

    async def _check_again(self, listed: Throttled) -> Throttled | None:
        """Return what someone who is listed has to wait now; None if nothing."""
        if listed.kind == "unknown":  # its name is not known here
            return listed
        if listed.kind == "network":
            buckets = self._range_buckets(_key("network", listed.address), _key("region", listed.address))
            found = await self._store.failures.get([bucket.key for bucket in buckets])
            now = self._clock()
            wait = max(_bucket_wait(bucket, bucket.remaining(found, now)) for bucket in buckets)
        else:
            [state], now = await self._read([_keys(listed.user or "", listed.address)])
            wait = state.wait
        return listed._replace(failures=wait.failures, until=now + wait.seconds) if wait.seconds > 0 else None

    def _note(self, keys: _Keys, wait: _Wait, now: Instant) -> None:
        """Remember that an attempt was refused, without its name if it may be a password."""
        username, address = keys.username, keys.address
        throttled = Throttled("unknown", None, network(address), wait.failures, now + wait.seconds)
        if wait.key == keys.network:
            throttled = throttled._replace(kind="network")
        elif wait.key == keys.region:
            throttled = throttled._replace(kind="network", address=region(address))
        elif username in self._users:
            throttled = throttled._replace(kind="user", user=username, address=address)
        if len(self._throttled) >= 2 * MAX_THROTTLED:
            self._throttled = {each.key: each for each in self.list_throttled()}
        self._throttled[throttled.key] = throttled

    async def close(self) -> None:
        """Wait for pending writes."""
        await self.background.close()

    async def _check(self, names: Sequence[_Keys]) -> tuple[list[_State], Mapping[bytes, int]]:
        """Return the names that may be tried, and how many attempts may be in flight for each key.

        Raises TooManyAttempts.
        """
        found, now = await self._read(names)
        slowest = _longest(found)
        if slowest.wait.seconds > 0:
            self.refusals += 1
            self._note(slowest.keys, slowest.wait, now)
            raise TooManyAttempts(retry_after=math.ceil(slowest.wait.seconds))
        states = [state for state in found if state.wait.seconds <= 0]  # others would still have to wait
        limits = {
            key: max(1, int(number) // self._workers) for state in states for key, number in state.allowed.items()
        }
        return states, limits

    async def _read(self, names: Sequence[_Keys]) -> tuple[Sequence[_State], Instant]:
        """Read what has failed under names that are tried together, and when that was."""
        found = await self._store.failures.get([key for keys in names for key in keys.first])
        now = self._clock()
        strangers = [keys for keys in names if found.get(keys.known, _NO_FAILURES).last_at <= now]
        # Each failure of a stranger counts for the region: if the region has none, its networks have none either.
        more = [
            key
            for keys in strangers
            if keys.region in found
            for key in (keys.network_streak, keys.name_in_region, keys.network)
        ]
        if more:
            found = {**found, **await self._store.failures.get(more)}
            now = self._clock()
        all_strangers = len(strangers) == len(names)
        return [self._assess(keys, keys in strangers, all_strangers, found, now) for keys in names], now

    def _assess(
        self, keys: _Keys, stranger: bool, all_strangers: bool, found: Mapping[bytes, Failures], now: Instant
    ) -> _State:
        """Return the history of a name, the longest of its delays, and how many failures each of its keys allows."""
        key, wait = keys.network_streak if stranger else keys.location_streak, _NO_WAIT
        failures = self._streak_length(found.get(keys.location_streak), now)
        count = self._streak_length(found.get(key), now) if stranger else failures
        allowed: dict[bytes, float] = {key: self._settings.free - count}
        if count:
            wait = _Wait(max(0.0, found[key].last_at + self._delay(count) - now), key, count)
        shared = self._refundable_buckets([keys], all_strangers) if stranger else ()
        for bucket in (self._location_bucket(keys), *shared):
            allowed[bucket.key] = left = bucket.remaining(found, now)
            if left < 1:
                wait = max(wait, _bucket_wait(bucket, left))
        return _State(keys, found.get(keys.known, _NO_FAILURES).last_at, not stranger, failures, wait, allowed)

    def _streak_length(self, failures: Failures | None, now: Instant) -> int:
        """Return the number of failures in a row that are not forgotten yet."""
        return 0 if failures is None or now >= failures.last_at + self._settings.forget else failures.count

    def _delay(self, count: int) -> float:
        """Return the seconds between the last of `count` failures in a row and the next attempt."""
        if count < self._settings.free:
            return 0.0
        doublings = min(count - self._settings.free, 32)
        return float(min(self._settings.delay * 2**doublings, self._settings.max_delay))

    def _location_bucket(self, keys: _Keys) -> _Bucket:
        free = self._settings.free
        return _Bucket(keys.location, 20 * free, self._settings.forget / (2 * free))

    def _refundable_buckets(self, names: Iterable[_Keys], all_strangers: bool = True) -> Iterable[_Bucket]:
        """Return the buckets that failures of strangers fill: those of the names, and of their network and region."""
        free, forget = self._settings.free, float(self._settings.forget)
        buckets: dict[bytes, _Bucket] = {}
        for keys in names:
            owner = keys.location_streak
            buckets[keys.name_in_region] = _Bucket(keys.name_in_region, 2 * free, forget / free, owner)
            buckets[keys.name] = _Bucket(keys.name, 20 * free, forget / (2 * free), owner)
            if all_strangers:
                buckets |= {bucket.key: bucket for bucket in self._range_buckets(keys.network, keys.region)}
        return buckets.values()

    def _range_buckets(self, network_key: bytes, region_key: bytes) -> Sequence[_Bucket]:
        """Return the buckets that the failures of all names in a network and a region fill."""
        free, forget = self._settings.network_free, float(self._settings.forget)
        return _Bucket(network_key, free, forget / free), _Bucket(region_key, 4 * free, forget / (4 * free))

    async def _count_failure(self, states: Sequence[_State]) -> None:
        now = self._clock()
        strangers = [state.keys for state in states if not state.known]
        streaks = [state.keys.location_streak for state in states] + [keys.network_streak for keys in strangers]
        for state in states:
            self._permits.pop(state.keys.location_streak, None)
        updates = [CountUpdate(key, 1, cutoff=now - self._settings.forget, at=now) for key in streaks]
        location_buckets = [self._location_bucket(state.keys) for state in states]
        shared = [*self._refundable_buckets(strangers)]
        number, group = secrets.randbits(_NUMBER_BITS), _group(states)
        updates += [
            CountUpdate(bucket.key, at=now, shift=bucket.drain_time, initial=number)
            for bucket in (*location_buckets, *shared)
        ]
        shares = [ShareUpdate(bucket.share(group), bucket.key, now, bucket.drain_time) for bucket in shared]
        await self._store.failures.update(updates, now, shares)

    async def _count_success(self, states: Sequence[_State], which: int) -> None:
        """Refund the failures of the name that logged in, and save that it is known at the location."""
        now = self._clock()
        keys, known_until, known, failures, *_ = states[which]
        self._permits.pop(keys.location_streak, None)
        self._permits[keys.location_streak] = now
        while len(self._permits) > _MAX_PERMITS:
            del self._permits[next(iter(self._permits))]
        if failures:
            group = _group(states)
            # failures of a known user were counted nowhere else
            shares = [] if known else [(each.share(group), each.key) for each in self._refundable_buckets([keys])]
            streak = None if known else keys.network_streak
            await self._store.failures.refund(keys.location_streak, streak, shares, now - self._settings.forget, now)
        if now + KNOWN_FOR - known_until >= _KNOWN_UPDATE:
            # No need to wait: it shares the commit of the token that is issued next.
            self.background.start(self._write([CountUpdate(keys.known, at=now + KNOWN_FOR)], now))

    async def _write(self, updates: Sequence[CountUpdate], now: Instant) -> None:
        with suppress(RetryLater):  # the next login writes it
            await self._store.failures.update(updates, now)


@lru_cache(maxsize=4096)
def _keys(name: str, address: str) -> _Keys:
    here, net, wide = location(address), network(address), region(address)
    return _Keys(
        name,
        address,
        known=_key("known", name, here),
        location_streak=_key("row of name at location", name, here),
        location=_key("name at location", name, here),
        network_streak=_key("row of name in network", name, net),
        name_in_region=_key("name in region", name, wide),
        name=_key("name", name),
        network=_key("network", net),
        region=_key("region", wide),
    )


def _bucket_wait(bucket: _Bucket, remaining: float) -> _Wait:
    return _Wait((1 - remaining) * bucket.drain_time - _ROUNDING, bucket.key, math.ceil(bucket.capacity - remaining))


def _group(states: Sequence[_State]) -> bytes:
    """Return the key of names that were tried together: they are one failure of the network, and refunded once."""
    return b"".join(sorted(state.keys.location_streak for state in states))


def _key(*parts: str) -> bytes:
    return sha256("\0".join(parts).encode()).digest()[:16]
