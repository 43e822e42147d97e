"""Listens to PostgreSQL: for revocations, and for its time."""

import asyncio
import math
from collections.abc import Collection
from contextlib import suppress

import asyncpg

from tokenauth.clock import boottime
from tokenauth.logs import log
from tokenauth.models import Instant
from tokenauth.stores.engine import OnClockAdvance, ignore_clock
from tokenauth.stores.postgres.connections import Connections
from tokenauth.stores.postgres.hosts import HostConnection
from tokenauth.stores.postgres.transaction import CHANNEL, CLOCK_ROW, SERVER_CLOCK

BOUND = 1.0
"""Seconds after which a revocation is known even if its notification was lost: the cache is not used for longer."""

HEARTBEAT = BOUND / 4
"""Seconds between two reads of the log when no notification arrives."""

_RETRY = 0.1
"""Seconds until a lost connection is opened again."""

_MAX_READ = 10_000
"""Maximum number of revocations that are read at once. If there are more, the cache is cleared."""

_READ = f"""
    SELECT {SERVER_CLOCK} AS now, {CLOCK_ROW} AS latest, seq, digest
    FROM (SELECT 1) AS one LEFT JOIN revocations ON seq >= $1 ORDER BY seq LIMIT $2
"""  # noqa: S608 - constants
_SERVER = "SELECT pg_postmaster_start_time(), oid FROM pg_database WHERE datname = current_database()"
_LAST = "SELECT seq, digest FROM revocations ORDER BY seq DESC LIMIT 1"


class DatabaseClock:
    """An estimate of the database's clock: its last known time, and the time that has passed since.

    While the database's clock runs evenly, the estimate is never ahead of it, and behind by no more than one round
    trip. The machine's wall clock, which may be wrong, is not used.
    """

    def __init__(self) -> None:
        self._offset = 0.0
        self._asked_at = -math.inf

    def __call__(self) -> Instant:
        return boottime() + self._offset

    def update(self, answered: Instant, asked_at: float) -> None:
        """Use the time that the database has just answered to a query sent at `asked_at` of the `boottime` clock."""
        least, most = answered - boottime(), answered - asked_at
        self._offset = min(max(self._offset, least), most)
        self._asked_at = asked_at

    def fresh(self) -> Instant | None:
        """Return the estimate, or None if the database was not asked within the last BOUND seconds.

        Its clock may have been set since then, or another server may have replaced it.
        """
        return self() if boottime() < self._asked_at + BOUND else None


class Listener:
    """Feed that reads the log of revocations whenever PostgreSQL notifies, and four times a second.

    Each read returns all revocations that were committed before it was sent. So the cache may be used for BOUND
    seconds from then on, even if the network fails, and no longer.
    """

    sees_commits = False

    def __init__(self, connections: Connections, clock: DatabaseClock) -> None:
        """Listen on a connection of its own."""
        self._connections = connections
        connections.primaries.on_promotion = self.invalidate
        self._clock = clock
        self._wake = asyncio.Event()
        self._pending: set[bytes] = set()
        self._missed = False
        self._last: tuple[int, bytes | None] = (0, None)
        self._read_at = self._invalidated_at = 0.0
        self._server: object = None
        self._connected = True
        self._task: asyncio.Task[None] | None = None
        self.on_clock_advance: OnClockAdvance = ignore_clock

    async def start(self) -> None:
        """Read the log for the first time. Raises what the driver raises."""
        self._read_at = 0.0
        async with self._connections.listening() as db:
            await self._subscribe(db)
            await self._check_server(db)
            await self._read(db)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Disconnect."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def is_current(self) -> bool:
        """Return whether the log was read within the last BOUND seconds, and since the last `invalidate`."""
        return boottime() - BOUND < self._read_at >= self._invalidated_at

    def age(self) -> float:
        """Return the seconds since the log was last read."""
        return boottime() - self._read_at

    def drain(self) -> Collection[bytes] | None:
        """Return the digests revoked since the last call; None if some may have been missed."""
        missed, self._missed = self._missed, False
        pending, self._pending = self._pending, set()
        return None if missed else pending

    def add(self, digests: Collection[bytes]) -> None:
        """Add digests that this process or another has revoked."""
        self._pending.update(digests)

    def invalidate(self) -> None:
        """Invalidate the cache until the log has been re-read, which starts now."""
        self._invalidated_at = boottime()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with self._connections.listening() as db:
                    await self._listen(db)
            except Exception as error:  # any error: the cache is not used until the log is read again
                if self._connected:
                    log.error("revocation_feed_lost", reason=type(error).__name__, action="every token is looked up")
                self._connected = False
                self._connections.start_probe()
            await asyncio.sleep(_RETRY)

    async def _listen(self, db: HostConnection) -> None:
        await self._subscribe(db)
        await self._check_server(db)
        while True:
            self._wake.clear()
            await self._read(db)
            if not self._connected:
                log.info("revocation_feed_restored")
                self._connected = True
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT):
                    await self._wake.wait()

    async def _subscribe(self, db: HostConnection) -> None:
        """Listen for notifications. Without them, the log is still read at every heartbeat."""
        if not self._connections.notifies:
            return
        try:
            await db.add_listener(CHANNEL, lambda *_: self._wake.set())
        except asyncpg.PostgresError as error:
            if db.is_closed() or isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
                raise
            self._connections.notifies = False
            log.warning("revocation_feed_polls", reason=type(error).__name__, seconds=HEARTBEAT)

    async def _read(self, db: HostConnection) -> None:
        """Read the log from the last known entry, which must still be there: otherwise some were missed."""
        asked_at = boottime()
        seq = self._last[0]
        late = asyncio.get_running_loop().call_later(HEARTBEAT, self._connections.start_probe)
        try:
            rows = await db.fetch(_READ, seq, _MAX_READ, timeout=BOUND)
        finally:
            late.cancel()
        self._clock.update(rows[0]["now"], asked_at)
        self.on_clock_advance(rows[0]["latest"] or 0.0)
        entries = [(row["seq"], row["digest"]) for row in rows if row["seq"] is not None]
        complete = len(entries) < _MAX_READ and (
            entries[:1] == [self._last] if seq else (not entries or entries[0][0] == 1)
        )
        if complete:
            self._pending.update(digest for _, digest in entries[1 if seq else 0 :])
            if len(self._pending) > _MAX_READ:  # the cache has not drained it for a long time
                self._pending.clear()
                self._missed = True
        else:
            await self._skip(db)
            self._missed = True
        if complete and entries:
            self._last = entries[-1]
        self._read_at = asked_at

    async def _check_server(self, db: HostConnection) -> None:
        """Clear the cache for another server or database, or one that was restarted: it may lack revocations."""
        server = await db.fetchrow(_SERVER, timeout=BOUND)
        if server != self._server:
            await self._skip(db)
            self._missed = True
            self._server = server

    async def _skip(self, db: HostConnection) -> None:
        """Skip to the end of the log."""
        row = await db.fetchrow(_LAST, timeout=BOUND)
        self._last = (0, None) if row is None else (row[0], row[1])
