"""Who waits for leases in this process, and how they are served.

Each pool that someone waits for has a task, which looks at the database every POLL seconds, and at once when this
process has freed a token. A release in this process serves them in the same transaction. The database decides whose
turn it is. Only the process that a client waits in serves its request, so no lease is granted to a client whose process
has died: of several, the one that was asked last.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Context
from copy import copy

from tokenauth.background import Background
from tokenauth.clock import Clock
from tokenauth.errors import ClientGone, PlaceLost, RetryLater
from tokenauth.login_queue import DisconnectCheck
from tokenauth.logs import log
from tokenauth.models import Grant, Instant, LeaseChange, LeaseCheck, LeaseRequest, Pool, PoolToken, RequestKey
from tokenauth.stores.store import PoolStore
from tokenauth.waiting_line import KEPT, LAST

POLL = 0.06
"""Seconds between two looks at the database: so much later, at most, does a token reach another process."""

CHECK = 1.0
"""Seconds between two looks for clients that have disconnected, or whose request is served elsewhere."""

CHECK_EACH = 0.005
"""Seconds between two looks for requests that are served elsewhere, for each that waits here: 1,000 cost little."""


class Waiter:
    """A client that waits for its request to be served, in this process."""

    __slots__ = ("disconnected", "future", "repeatable", "request")

    def __init__(self, request: LeaseRequest, repeatable: bool, disconnected: DisconnectCheck) -> None:
        """`repeatable`: the client can ask again, as it knows the id of the request."""
        self.request = request
        self.repeatable = repeatable
        self.disconnected = disconnected
        self.future: asyncio.Future[Grant | None] = asyncio.get_running_loop().create_future()

    def end(self, result: Grant | Exception | None) -> None:
        """End the wait: with leases, an exception, or None where the client is to ask again."""
        if self.future.done():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class _Asks(Mapping[RequestKey, int]):
    """How often each request that waits has been asked for. It is a view: 1,000 waiters are looked for often."""

    def __init__(self, waiters: Mapping[RequestKey, Waiter]) -> None:
        self._waiters = waiters

    def __getitem__(self, key: RequestKey) -> int:
        return self._waiters[key].request.asks

    def __iter__(self) -> Iterator[RequestKey]:
        return iter(self._waiters)

    def __len__(self) -> int:
        return len(self._waiters)


class Waiting:
    """The clients that wait in this process, for any pool."""

    def __init__(self, store: PoolStore, clock: Clock, log_lapse: Callable[[Pool, PoolToken], None]) -> None:
        """`log_lapse` is called for each lease that lapsed before its token was leased to a client that has gone."""
        self._store = store
        self._clock = clock
        self._log_lapse = log_lapse
        self._lines: dict[str, _Line] = {}
        self._stopping = False
        self.background = Background()

    async def wait(self, pool: Pool, waiter: Waiter, seconds: float) -> Grant | None:
        """Wait for the turn of a request that has its place; None if it still waits after `seconds`.

        Also None, at once, when the process stops, or the same request is waited for once more. Raises ClientGone,
        PlaceLost, StoreUnavailable.
        """
        if self._stopping or seconds <= 0:
            return None
        line = self._lines.get(pool.name)
        if line is None or line.task.done():
            line = self._lines[pool.name] = _Line(pool, self._store, self._clock, self.put_back)
        line.add(waiter)
        timer = asyncio.get_running_loop().call_later(seconds, line.expire, waiter)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            line.remove(waiter)
            raise
        finally:
            timer.cancel()

    def wake(self, pool: Pool) -> None:
        """Serve the line of a pool at once: this process has freed a token, or changed who may have one."""
        line = self._lines.get(pool.name)
        if line is not None:
            line.serve()

    def someone_waits(self, pool: Pool) -> bool:
        """Return whether a client waits for a pool in this process."""
        line = self._lines.get(pool.name)
        return line is not None and bool(line.waiters)

    async def release(
        self, pool: Pool, value: str, now: Instant, check: LeaseCheck, on_release: Callable[[PoolToken], None]
    ) -> LeaseChange | None:
        """End a lease of a pool that someone waits for, and serve those whose turn it is then, in one step.

        `on_release` is called with the token as it was, before they are answered, if the lease was ended. All this is
        finished also when the caller is cancelled. Raises StoreUnavailable.
        """
        return await self.background.finish(self._lines[pool.name].release(value, now, check, on_release))

    def drop(self, pool: Pool, key: RequestKey) -> None:
        """End the wait of a request that has left the line."""
        line = self._lines.get(pool.name)
        waiter = None if line is None else line.waiters.pop(key, None)
        if waiter is not None:
            waiter.end(PlaceLost())

    def put_back(self, pool: Pool, grant: Grant, repeatable: bool) -> None:
        """Take back the leases of a client that has gone, soon."""
        for before in grant.before:
            if before.unlogged is not None:
                self._log_lapse(pool, before)
        self.background.start(self._put_back(pool, grant.request, KEPT if repeatable else None))

    async def _put_back(self, pool: Pool, request: LeaseRequest, keep: float | None) -> None:
        with suppress(RetryLater):  # the leases lapse
            done = await self._store.put_back(pool, request, keep, self._clock())
            if done and keep is None and request.number < LAST:
                note_left(pool, request, self._clock())
        self.wake(pool)

    def stop(self) -> None:
        """Let all clients ask again, elsewhere: their places are kept. From now on nobody waits here."""
        self._stopping = True
        for line in self._lines.values():
            for waiter in [*line.waiters.values()]:
                line.expire(waiter)
            line.wake()

    async def close(self) -> None:
        """Finish what is under way."""
        self.stop()
        await asyncio.gather(*(line.task for line in self._lines.values()), return_exceptions=True)
        await self.background.close()


class _Line:
    """The clients that wait for one pool in this process, and the task that serves them."""

    def __init__(
        self,
        pool: Pool,
        store: PoolStore,
        clock: Clock,
        put_back: Callable[[Pool, Grant, bool], None],
    ) -> None:
        self.waiters: dict[RequestKey, Waiter] = {}
        self._pool = pool
        self._store = store
        self._clock = clock
        self._put_back = put_back
        self._serving: list[Mapping[RequestKey, int]] = []
        self._expired: set[Waiter] = set()
        self._woken = asyncio.Event()
        self._some_free = False
        self._next_check = 0.0
        self._next_lost = 0.0
        self.task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    def add(self, waiter: Waiter) -> None:
        """Add a client. One that waits for the same request already is told to ask again."""
        earlier = self.waiters.get(waiter.request.key)
        self.waiters[waiter.request.key] = waiter
        if earlier is not None:
            earlier.end(None)
        self.wake()

    def remove(self, waiter: Waiter) -> None:
        """Remove a client. If it is being served right now, its leases are taken back."""
        if self.waiters.get(waiter.request.key) is waiter:
            del self.waiters[waiter.request.key]

    def expire(self, waiter: Waiter) -> None:
        """End a wait without leases, unless it is being served right now: then soon, with or without."""
        if any(waiter.request.key in asks for asks in self._serving):
            self._expired.add(waiter)
        else:
            self.remove(waiter)
            waiter.end(None)

    def wake(self) -> None:
        """Look at the database at once."""
        self._woken.set()

    def serve(self) -> None:
        """Try to take turns at once, without a look whether there is any: that would delay the client."""
        self._some_free = True
        self._woken.set()

    async def release(
        self, value: str, now: Instant, check: LeaseCheck, on_release: Callable[[PoolToken], None]
    ) -> LeaseChange | None:
        with self._step() as asks:
            change, granted = await self._store.hand_over(self._pool, value, asks, now, check)
            try:
                if change is not None and change.granted:
                    on_release(change.before)
            finally:
                for grant in granted:
                    self._deliver(grant)
        if any(asks.get(key) != waiter.request.asks for key, waiter in self.waiters.items()):
            self.serve()  # they came meanwhile
        return change

    @contextmanager
    def _step(self) -> Iterator[Mapping[RequestKey, int]]:
        """Yield the requests that one step may serve. A wait that is over ends after the step, which may serve it."""
        asks = {
            key: waiter.request.asks
            for key, waiter in self.waiters.items()
            if waiter not in self._expired and not waiter.disconnected()
        }
        self._serving.append(asks)
        try:
            yield asks
        finally:
            self._serving.remove(asks)
            expired, self._expired = self._expired, set()
            for waiter in expired:
                self.expire(waiter)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiters:
            self._woken.clear()
            try:
                served = await self._serve(loop.time())
            except Exception as error:  # all waiting clients get it, and keep their places
                self._end_all(error)
                return
            if not served and self.waiters:
                timer = loop.call_later(POLL, self._woken.set)
                await self._woken.wait()
                timer.cancel()

    async def _serve(self, time: float) -> bool:
        """Serve those whose turn it is; return whether there were any."""
        if time >= self._next_check:
            self._next_check = time + CHECK
            await self._drop_gone()
        if time >= self._next_lost:
            self._next_lost = time + max(CHECK, CHECK_EACH * len(self.waiters))
            await self._drop_lost()
        some_free, self._some_free = self._some_free, False
        if not some_free and not await self._store.may_have_turn(self._pool, _Asks(self.waiters), self._clock()):
            return False
        with self._step() as asks:
            granted = await self._store.take_turns(self._pool, asks, self._clock())
            for grant in granted:
                self._deliver(grant)
        return bool(granted)

    def _deliver(self, grant: Grant) -> None:
        waiter = self.waiters.pop(grant.request.key, None)
        if waiter is None or waiter.future.done() or waiter.disconnected():
            self._put_back(self._pool, grant, waiter is None or waiter.repeatable)
            if waiter is not None:
                waiter.end(ClientGone())
        else:
            waiter.end(grant)

    async def _drop_gone(self) -> None:
        """Give up the places of clients that have disconnected; those who can ask again keep theirs for a while."""
        for key, waiter in [*self.waiters.items()]:
            if waiter.disconnected() and self.waiters.get(key) is waiter:
                del self.waiters[key]
                waiter.end(ClientGone())
                keep = KEPT if waiter.repeatable else None
                now = self._clock()
                left = await self._store.leave(self._pool, key, now, keep, waiter.request)
                if left is not None and keep is None:
                    note_left(self._pool, left, now)

    async def _drop_lost(self) -> None:
        """Let those ask again who were asked for elsewhere, granted elsewhere, or taken out of the line elsewhere."""
        waiters = {**self.waiters}
        for key in await self._store.lost_places(self._pool, _Asks(waiters), self._clock()):
            if self.waiters.get(key) is waiters[key]:
                self.expire(waiters[key])

    def _end_all(self, error: Exception) -> None:
        waiters, self.waiters = self.waiters, {}
        for waiter in waiters.values():
            waiter.end(copy(error))


def note_left(pool: Pool, request: LeaseRequest, now: Instant) -> None:
    """Log that a request has left the line without leases."""
    waited = round(max(0.0, now - request.since), 3)
    log.info("request_left", pool=pool.name, user=request.username, holder=request.holder, waited=waited)
