"""What a process hears from PostgreSQL: which tokens were removed, and what time it is there."""

import asyncio
from collections.abc import Collection
from contextlib import suppress

import asyncpg

from tokenauth.clock import boottime
from tokenauth.logs import log
from tokenauth.models import Instant
from tokenauth.stores.engine import CHANNEL, CLOCK_SAYS, WRITTEN_DOWN
from tokenauth.stores.postgres.connections import Database
from tokenauth.stores.store import Hear, unheard

BOUND = 1.0
"""Seconds after which a removal that was not heard of is found all the same: the cache is not believed for longer."""

HEARTBEAT = BOUND / 4
"""Seconds between two looks at the log when no notification comes."""

_RETRY = 0.1
"""Seconds until a lost connection is made anew."""

_MANY = 10_000
"""Removals that are read at once; when there are more, the cache forgets everything instead."""

_READ = f"""
    SELECT {CLOCK_SAYS} AS now, {WRITTEN_DOWN} AS latest, seq, digest
    FROM (SELECT 1) AS one LEFT JOIN revocations ON seq >= $1 ORDER BY seq LIMIT $2
"""  # noqa: S608 - constants
_SERVER = "SELECT pg_postmaster_start_time(), oid FROM pg_database WHERE datname = current_database()"
_LAST = "SELECT seq, digest FROM revocations ORDER BY seq DESC LIMIT 1"


class DatabaseClock:
    """The database's clock, as far as a process can know it: what it was last heard to say, and the time since.

    While that clock keeps its pace it is never ahead of it, and behind by no more than an answer takes to come. The
    machine's own clock, which may say anything, is not asked.
    """

    def __init__(self) -> None:
        self._offset = 0.0

    def __call__(self) -> Instant:
        """Read the time, in Unix seconds."""
        return boottime() + self._offset

    def hear(self, said: Instant, asked_at: float) -> None:
        """Take in what the database has said just now, when it was asked at `asked_at` of the steady clock."""
        least, most = said - boottime(), said - asked_at
        self._offset = min(max(self._offset, least), most)


class Listener:
    """Feed that reads the log of revocations whenever PostgreSQL notifies, and four times a second.

    Each reading shows all removals that were committed before it was asked for. So what is remembered may be
    believed for BOUND seconds from that moment, whatever becomes of the network, and no longer.
    """

    def __init__(self, database: Database, clock: DatabaseClock) -> None:
        """Listen on a connection of its own."""
        self._database = database
        self._clock = clock
        self._wake = asyncio.Event()
        self._pending: set[bytes] = set()
        self._missed = False
        self._last: tuple[int, bytes | None] = (0, None)
        self._read_at = self._doubted_at = 0.0
        self._server: object = None
        self._connected = True
        self._task: asyncio.Task[None] | None = None
        self.hear: Hear = unheard
        """Is called with the time that others have written down."""

    async def start(self) -> None:
        """Read the log for the first time. Raises what the driver raises."""
        self._read_at = 0.0
        async with self._database.listening() as db:
            await self._subscribe(db)
            await self._recognise(db)
            await self._read(db)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Disconnect."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def sure(self) -> bool:
        """Say whether the log was read within the last BOUND seconds, and since it was last doubted."""
        return boottime() - BOUND < self._read_at >= self._doubted_at

    def news(self) -> Collection[bytes] | None:
        """Return the digests removed since this was last asked; None if some may have been missed."""
        missed, self._missed = self._missed, False
        pending, self._pending = self._pending, set()
        return None if missed else pending

    def tell(self, digest: bytes) -> None:
        """Take in that this process has removed a token."""
        self._pending.add(digest)

    def doubt(self) -> None:
        """Be sure of nothing until the log has been read again, which is at once: who knows what was removed."""
        self._doubted_at = boottime()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with self._database.listening() as db:
                    await self._listen(db)
            except Exception as error:  # whatever it is: nothing is believed meanwhile
                if self._connected:
                    log.error("revocation_feed_lost", reason=type(error).__name__, action="every token is looked up")
                self._connected = False
                self._database.suspect()
            await asyncio.sleep(_RETRY)

    async def _listen(self, db: asyncpg.Connection) -> None:
        await self._subscribe(db)
        await self._recognise(db)
        while True:
            self._wake.clear()
            await self._read(db)
            if not self._connected:
                log.info("revocation_feed_back")
                self._connected = True
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT):
                    await self._wake.wait()

    async def _subscribe(self, db: asyncpg.Connection) -> None:
        """Be woken by notifications. Where there are none, the log is still read at every heartbeat."""
        if not self._database.notifies:
            return
        try:
            await db.add_listener(CHANNEL, lambda *_: self._wake.set())
        except asyncpg.PostgresError as error:
            if db.is_closed() or isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
                raise
            self._database.notifies = False
            log.warning("revocation_feed_polls", reason=type(error).__name__, seconds=HEARTBEAT)

    async def _read(self, db: asyncpg.Connection) -> None:
        """Read the log from the last entry that is known, which must still be there: else some were missed."""
        asked_at = boottime()
        seq = self._last[0]
        late = asyncio.get_running_loop().call_later(HEARTBEAT, self._database.suspect)
        try:
            rows = await db.fetch(_READ, seq, _MANY, timeout=BOUND)
        finally:
            late.cancel()
        self._clock.hear(rows[0]["now"], asked_at)
        self.hear(rows[0]["latest"] or 0.0)
        entries = [(row["seq"], row["digest"]) for row in rows if row["seq"] is not None]
        complete = len(entries) < _MANY and (
            entries[:1] == [self._last] if seq else (not entries or entries[0][0] == 1)
        )
        if complete:
            self._pending.update(digest for _, digest in entries[1 if seq else 0 :])
            if len(self._pending) > _MANY:  # nobody has asked for long
                self._pending.clear()
                self._missed = True
        else:
            await self._skip(db)
            self._missed = True
        if complete and entries:
            self._last = entries[-1]
        self._read_at = asked_at

    async def _recognise(self, db: asyncpg.Connection) -> None:
        """Believe nothing of another server or database, or of one that has started anew: it may lack what this had."""
        server = await db.fetchrow(_SERVER, timeout=BOUND)
        if server != self._server:
            await self._skip(db)
            self._missed = True
            self._server = server

    async def _skip(self, db: asyncpg.Connection) -> None:
        """Go to the end of the log."""
        row = await db.fetchrow(_LAST, timeout=BOUND)
        self._last = (0, None) if row is None else (row[0], row[1])
