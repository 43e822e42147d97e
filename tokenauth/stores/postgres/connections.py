"""The connections to PostgreSQL, and how errors of each kind are handled."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from functools import partial
from time import monotonic
from typing import TypeVar

import asyncpg
from sqlalchemy import URL, AdaptedConnection, Connection, event, exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from tokenauth.clock import Clock, boottime
from tokenauth.errors import StartError, StoreUnavailable
from tokenauth.logs import log
from tokenauth.models import Instant
from tokenauth.stores import schema
from tokenauth.stores.batching import Batch, ChangeKind, Writer
from tokenauth.stores.changes.clock import PROBE, SaveTime, write_clock
from tokenauth.stores.changes.request_rows import keep_places
from tokenauth.stores.circuit_breaker import WAIT_FOR_WRITES, Circuit
from tokenauth.stores.engine import Change, LockConflict
from tokenauth.stores.postgres import hosts
from tokenauth.stores.postgres.at_once import AT_ONCE, TooLate
from tokenauth.stores.postgres.standbys import Standbys
from tokenauth.stores.postgres.transaction import WITHIN, PostgresTransaction
from tokenauth.stores.tables import metadata

A = TypeVar("A")
T = TypeVar("T")

TIMEOUT = 5.0
"""Seconds that a statement may take, including the wait for locks; the server cancels it a little earlier."""

CONNECT_TIMEOUT = 2.0
"""Seconds that it may take to connect, and to wait for a connection that others use."""

_SETTINGS = {
    "application_name": "tokenauth",
    "statement_timeout": "4500",  # milliseconds
    "idle_in_transaction_session_timeout": "4500",  # a process that was stopped must not keep its locks
    "tcp_keepalives_idle": "5",  # seconds; nor must one whose machine is gone
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "jit": "off",
    "default_transaction_isolation": "read committed",  # as in _BEGIN, for statements that commit by themselves
    # Plans are kept, and statistics lag behind: a plan from when the tables were empty still runs when they have
    # millions of rows. Every statement can use an index, so every statement must.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "max_parallel_workers_per_gather": "0",
}

_UPGRADE_PAUSE = 1.0
"""Seconds until an upgrade that others have blocked is tried again."""

_UPGRADE_TIMEOUT = 3600.0
"""Seconds that a step of an upgrade may take: it may read a large table."""

_LOCK_SCHEMA = text("SELECT pg_advisory_xact_lock(hashtextextended('tokenauth schema', 0))")

_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
"""After a wait for a lock, the commits of others must be visible. The database's default may be another level."""

_BEGIN_PROBE = "BEGIN; SET LOCAL lock_timeout = '500ms'"
_READ_TABLES = f"SELECT {', '.join(f'(SELECT 1 FROM {name} LIMIT 1)' for name in metadata.tables)}"  # noqa: S608 - constants
_LOCK_TABLES = f"LOCK TABLE {', '.join(metadata.tables)} IN ROW EXCLUSIVE MODE"
"""A probe needs the locks on tables that queries and changes need, so that it fails when those would hang.

It needs none of the advisory locks: a node may have one for long, when it revokes many tokens.
"""

_WAITS_FOR_STANDBY = """
    SELECT FROM pg_stat_activity
    WHERE wait_event = 'SyncRep' AND state_change < clock_timestamp() - interval '1 s' AND datname = current_database()
"""
"""Commits are released in their order, so a probe would wait, too.

A role sees what its own connections wait for, a superuser all. Those of another database may wait where those of this
one do not: `synchronous_commit` can be set for each.
"""

_NO_STANDBY = "commits wait for a synchronous standby"

_PROOF = 10.0
"""Seconds for which a write shows that the database can be written."""

_CLOCK_INTERVAL = 1.0
"""Seconds between two updates of the clock row by one process."""

_BAD_CHANGE = (exc.DataError, exc.IntegrityError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
"""Errors caused by one bad change, not by a broken database."""

_TOO_SLOW = (TimeoutError, exc.TimeoutError, asyncpg.QueryCanceledError)

UNAVAILABLE = (exc.SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""Errors after which it is unknown whether an operation was done."""


class Connections:
    """The connections for queries and changes, and how to open one to listen on."""

    def __init__(
        self,
        url: URL,
        connections: int,
        clock: Clock,
        caller_time: bool,
        database_clock: Callable[[], Instant | None] = lambda: None,
    ) -> None:
        """Take `postgresql+asyncpg://...`. `caller_time`: the time is the callers', not the database's.

        `database_clock`: an estimate of it, if there is one now. Without it, no change is made at once.
        """
        self.name = hosts.name(url)
        self.notifies = True
        self._size = connections
        self.primaries = hosts.Primaries()
        self._clock = clock
        arguments = {
            "timeout": CONNECT_TIMEOUT,
            "command_timeout": TIMEOUT,
            "target_session_attrs": "primary",  # a standby lags behind the latest revocations
            "server_settings": _SETTINGS,
            "max_cached_statement_lifetime": 0,  # to prepare a statement again takes a round trip
        }
        self._engine = create_async_engine(
            url,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT,
            pool_reset_on_return=None,
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            connect_args={**arguments, "async_creator_fn": self.primaries.connect},
        )
        event.listen(self._engine.sync_engine, "checkout", self._check_connection)
        event.listen(self._engine.sync_engine, "close", _abort)
        self._arguments = {**self._engine.dialect.create_connect_args(url)[1], **arguments}
        self.standbys = Standbys(self.primaries, self._arguments)
        for_upgrade = {**arguments, "async_creator_fn": self.primaries.connect, "command_timeout": _UPGRADE_TIMEOUT}
        self._upgrade_engine = create_async_engine(
            url,
            poolclass=NullPool,
            isolation_level="READ COMMITTED",  # as in _BEGIN
            hide_parameters=True,
            connect_args=for_upgrade,
        )
        self._caller_time = caller_time
        self._database_clock = database_clock
        self._writers: dict[ChangeKind, Writer] = {}  # each kind of change has transactions of its own
        self._never_at_once: set[ChangeKind] = set()
        self._wrote_at = monotonic()
        self._latest: Instant = 0
        self._clock_written: Instant = 0
        self._reading = Circuit(
            self._probe_reading,
            "store_unreachable",
            "store_reachable_again",
            probe_failed=self._on_unreachable,
        )
        self._writing = Circuit(
            self._probe_writing,
            "store_not_writable",
            "store_writable_again",
            opened=self._refuse_waiting,
            probe_failed=self._abort_writing,
            refusal=self._not_writable,
            probe_ends_outage=True,
            action=WAIT_FOR_WRITES,
        )
        self.start_probe = self._reading.start_probe

    @property
    def problem(self) -> str | None:
        """What is known to keep the database from being read or written, if anything."""
        if self._reading.problem is not None:
            return f"store unreachable: {self._reading.problem}"
        return None if self._writing.problem is None else f"store not writable: {self._writing.problem}"

    async def probed_problem(self) -> str | None:
        """Return what keeps the database from being read or written, after the probes that are running, if any are.

        A worker that has written nothing for a while does not know, so it probes.
        """
        if monotonic() > self._wrote_at + _PROOF:
            self._writing.start_probe()
        await self._reading.wait_for_probe()
        await self._writing.wait_for_probe()
        return self.problem

    async def check_encoding(self) -> None:
        """Raise StartError unless the encoding is UTF-8: no other can store all names."""
        encoding = await self.read_once(lambda db: driver(db).driver_connection.get_settings().server_encoding)
        if encoding != "UTF8":
            raise StartError(
                f"the database {self.name} keeps text as {encoding}; create it with ENCODING 'UTF8' TEMPLATE template0"
            )

    async def upgrade(self, create: bool = True, copying: bool = False) -> None:
        """Bring the schema up to date. Any number of machines may do so at once. Raises what the drivers raise.

        A transaction that waits to alter a table blocks all later users of the table. So an upgrade waits only briefly
        for its locks, and is retried while others hold them (a backup reads all tables in one transaction, or another
        machine upgrades). If the schema is up to date, this needs no lock. Raises StartError if there are no tables and
        it may not `create` them. `copying`: it creates those of an unfinished copy.
        """
        waited = False
        while not schema.serves(had := await self.read_once(schema.version)) and not (
            copying and had == schema.COPYING
        ):
            if had is None and not create:
                raise StartError(
                    f"The database {self.name} has no tables of tokenauth. Correct database.url,"
                    " or run `tokenauth migrate`."
                )
            try:
                await self._upgrade(copying)
            except exc.DBAPIError as error:
                if not isinstance(error.__cause__ and error.__cause__.__cause__, asyncpg.LockNotAvailableError):
                    raise
                if not waited:
                    log.warning("schema_upgrade_blocked", reason="others use the tables", action="tried until it works")
                waited = True
                await asyncio.sleep(_UPGRADE_PAUSE)

    async def _upgrade(self, copying: bool) -> None:
        async with self._upgrade_engine.begin() as db:
            await db.execute(text("SET LOCAL lock_timeout = '4s'"))
            await db.execute(_LOCK_SCHEMA)
            await db.execute(text("SET LOCAL lock_timeout = '500ms'"))
            await db.execute(text("SET LOCAL statement_timeout = 0"))
            had = await db.run_sync(schema.upgrade, self.name, copying)
        if not schema.serves(had):
            schema.log_upgrade(had, self.name)

    async def stop(self, now: Instant | None) -> None:
        """Finish the waiting changes, write the clock row unless `now` is None, and disconnect."""
        if now is not None:
            with suppress(StoreUnavailable):
                await self.apply(SaveTime(now=max(now, self._latest)))
        for writer in self._writers.values():
            await writer.finish()
        await self.discard()

    async def discard(self) -> None:
        """Disconnect."""
        await self.standbys.stop()
        await self._reading.stop()
        await self._writing.stop()
        await self._engine.dispose()

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query, and retry it once if its connection breaks. Raises StoreUnavailable."""
        async with self._reading.attempt() as began:
            try:
                return await self.read_once(query)
            except UNAVAILABLE as error:
                if isinstance(error, _BAD_CHANGE):
                    raise
                if _is_slow(error):
                    self._reading.start_probe()
                    raise StoreUnavailable from error
            try:
                return await self.read_once(query)
            except UNAVAILABLE as error:
                if _is_slow(error):
                    self._reading.start_probe()
                else:
                    self._reading.failed(reason(error), began)
                raise StoreUnavailable from error

    async def read_once(self, query: Callable[[Connection], T]) -> T:
        """Run a query without retry or circuit breaker. Raises what the drivers raise."""
        async with self._engine.connect() as db:
            return await db.run_sync(query)

    def apply(self, change: Change[A]) -> Awaitable[A]:
        """Make a change; it shares a commit with the others of its kind that wait."""
        self._writing.check_closed()
        kind = type(change)
        writer = self._writers.get(kind)
        if writer is None:
            writer = self._writers[kind] = Writer(self._commit)
        return writer.apply(change)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[hosts.HostConnection]:
        """Open one more connection, for one use."""
        connection = await self.primaries.connect(**self._arguments)
        try:
            yield connection
        finally:
            connection.terminate()  # closing it properly could block forever

    async def _commit(self, batch: Batch) -> None:
        promotions = self.primaries.promotions
        try:
            async with self._writing.attempt() as began, self._engine.connect() as db:
                await db.run_sync(self._make, batch)
        except UNAVAILABLE as error:
            if isinstance(error, _BAD_CHANGE):
                raise
            self._clock_written = 0  # the next commit writes in any case, and so reaches a standby
            if _is_slow(error) or self.primaries.promotions > promotions:
                self._writing.start_probe()
            else:
                self._writing.failed(reason(error), began)
            raise self._not_writable() from error
        except StoreUnavailable:
            self._clock_written = 0
            raise
        self._wrote_at = monotonic()

    async def _probe_reading(self) -> str | None:
        """Read on a connection of its own; return what is wrong, if anything."""
        try:
            async with self.listening() as db:
                await db.execute(f"{_BEGIN_PROBE}; {_READ_TABLES}; COMMIT")
        except (asyncpg.TooManyConnectionsError, asyncpg.FeatureNotSupportedError):
            return None  # it answers: queries will find out whether their connections work
        except UNAVAILABLE as error:
            return reason(error)
        return None

    async def _probe_writing(self) -> str | None:
        """Write on a connection of its own; return what is wrong, if anything.

        Only a write ends an outage: if no more connections are allowed, it is written with one of the pool.
        """
        try:
            async with AsyncExitStack() as stack:
                try:
                    db = await stack.enter_async_context(self.listening())
                except asyncpg.TooManyConnectionsError:
                    if self._writing.problem is None:
                        return None  # it answers: changes will find out whether their connections work
                    db = await stack.enter_async_context(self._pooled())
                return await self._write_tables(db)
        except UNAVAILABLE as error:
            return reason(error)

    async def _write_tables(self, db: hosts.HostConnection) -> str | None:
        if await _waits_for_standby(db):
            return _NO_STANDBY
        refused_for = self._writing.open_for()
        keeping = keep_places(refused_for, self._clock()) if refused_for else ""
        write = f"{PROBE}; {keeping}; COMMIT"
        try:
            await db.execute(f"{_BEGIN_PROBE}; {_LOCK_TABLES}; {write}")
        except asyncpg.FeatureNotSupportedError:  # by what only speaks the protocol of PostgreSQL
            await db.execute(f"ROLLBACK; {_BEGIN_PROBE}; {write}")
        if db.unconfirmed:
            return _NO_STANDBY
        self._wrote_at = monotonic()
        return None

    @asynccontextmanager
    async def _pooled(self) -> AsyncIterator[hosts.HostConnection]:
        """Use a connection of the pool."""
        async with aclosing(await self._open_pooled()) as db:
            connection = (await db.get_raw_connection()).driver_connection
            assert isinstance(connection, hosts.HostConnection)
            try:
                yield connection
            except asyncpg.PostgresError:
                await db.run_sync(_roll_back)
                raise
            except BaseException:
                await db.invalidate()
                raise

    async def _open_pooled(self) -> AsyncConnection:
        """Take a connection of the pool. Each has its turn: those that must be opened again may be refused."""
        for _ in range(self._size - 1):
            with suppress(exc.DBAPIError):
                return await self._engine.connect()
        return await self._engine.connect()

    async def standby_problem(self) -> str | None:
        """Return that commits wait for a synchronous standby, if they do and this role may see it."""
        async with self.listening() as db:
            return _NO_STANDBY if await _waits_for_standby(db) else None

    def _on_unreachable(self) -> None:
        """Refuse changes too, and abort running operations: they will not be answered soon."""
        self._writing.open(self._reading.problem or "")
        self._reading.abort_running()
        self._writing.abort_running()

    def _abort_writing(self) -> None:
        self._writing.abort_running()

    def _refuse_waiting(self) -> None:
        for writer in self._writers.values():
            writer.refuse_waiting(self._not_writable())

    def _not_writable(self) -> StoreUnavailable:
        return StoreUnavailable(StoreUnavailable.of_writes if self._reading.problem is None else None)

    def _check_connection(self, connection: AdaptedConnection, record: ConnectionPoolEntry, _: object) -> None:
        """Replace a connection that was closed, is older than the last outage, or whose commits may be lost."""
        opened = connection.driver_connection
        openings = self._reading.openings
        is_older = record.info.setdefault("openings", openings) != openings
        if opened.is_closed() or is_older or opened.unconfirmed:
            raise exc.DisconnectionError

    def _make(self, db: Connection, batch: Batch) -> None:
        """Make the changes of one kind: at once if that is possible, otherwise in one transaction."""
        self._latest = max(self._latest, batch.now)
        due = batch.now > self._clock_written + _CLOCK_INTERVAL or SaveTime in batch.groups
        clock = self._latest if due else None
        written = clock if self._make_at_once(db, batch, clock) else None
        if batch.groups:
            try:
                written = self._attempt(db, batch, clock)
            except LockConflict:
                written = self._attempt(db, batch, clock, exclusive=True)
        if written is not None:
            self._clock_written = written

    def _make_at_once(self, db: Connection, batch: Batch, clock: Instant | None) -> bool:
        """Make and answer the changes that one statement can make; the others stay in the batch.

        Returns whether it has written the clock row, if it was to.
        """
        if self._database_clock() is None:
            return False
        plain = driver(db)
        transaction = PostgresTransaction(
            plain,
            self._caller_time,
            self.notifies,
            clock=clock,
            deadline=partial(self._at_once_deadline, clock),
        )
        try:
            for kind in (AT_ONCE.keys() - self._never_at_once) & batch.groups.keys():
                answers = AT_ONCE[kind](transaction, batch.groups[kind].changes)
                transaction.check_confirmed()
                batch.settle(kind, answers)
        except (TooLate, asyncpg.InvalidCachedStatementError):  # a table was altered: it is prepared again
            pass
        except asyncpg.FeatureNotSupportedError:  # it only speaks the protocol of PostgreSQL
            self._never_at_once.update(batch.groups)
        except _BAD_CHANGE:
            raise
        except BaseException as error:  # it is unknown how far it got
            db.invalidate()
            if transaction.sent_at is not None and not _is_refusal(error):
                left = transaction.sent_at + WITHIN - boottime()
                plain.run_async(lambda _: asyncio.sleep(left))  # then it fails, if PostgreSQL has not made it yet
            raise
        return transaction.stepped

    def _at_once_deadline(self, clock: Instant | None) -> Instant:
        """Return the time of the database at which it is too late to make changes at once.

        A lease that is made at a time which nobody remembers would last until that time comes again. So if the clock
        of the database has jumped ahead of the clock row, `_attempt` makes the changes, which writes the row.
        """
        now = self._database_clock()
        if now is None:
            return -math.inf
        return min(now + WITHIN, max(self._clock_written, clock or 0.0) + 2 * _CLOCK_INTERVAL)

    def _attempt(self, db: Connection, batch: Batch, clock: Instant | None, exclusive: bool = False) -> Instant | None:
        """Make all changes in one transaction. Returns what it has written to the clock row, if anything.

        That is `clock`, or the database's time if that has jumped ahead: a lease that is made at a time which nobody
        remembers would last until that time comes again.
        """
        plain = driver(db)
        transaction = PostgresTransaction(plain, self._caller_time, self.notifies, exclusive)
        try:
            plain.run_async(lambda connection: connection.execute(_BEGIN))
            batch.make(transaction)
            if transaction.latest > self._clock_written + _CLOCK_INTERVAL:
                clock = max(clock or 0.0, transaction.latest)
            if clock is not None:
                write_clock(transaction, clock)
            plain.run_async(lambda connection: connection.execute("COMMIT"))
            transaction.check_confirmed()
        except (*_BAD_CHANGE, LockConflict):
            _roll_back(db)
            raise
        except BaseException:  # it is unknown how far it got
            db.invalidate()
            raise
        return clock


async def _waits_for_standby(db: hosts.HostConnection) -> bool:
    """Return whether commits are waiting; False where that cannot be seen."""
    with suppress(asyncpg.PostgresError):
        return await db.execute(_WAITS_FOR_STANDBY) != "SELECT 0"  # one round trip
    return False


def driver(db: Connection) -> AdaptedConnection:
    """Return asyncpg's connection, as SQLAlchemy's `run_sync` takes it."""
    connection = db.connection.dbapi_connection
    assert isinstance(connection, AdaptedConnection)
    return connection


def _roll_back(db: Connection) -> None:
    try:
        driver(db).run_async(lambda connection: connection.execute("ROLLBACK"))
    except BaseException:
        db.invalidate()
        raise


def _abort(connection: AdaptedConnection, *_: object) -> None:
    """Abort a connection: closing it properly could block forever."""
    connection.driver_connection.terminate()


def _is_refusal(error: BaseException) -> bool:
    """Return whether PostgreSQL has answered with this error: nothing was made."""
    return isinstance(error, asyncpg.PostgresError) and not isinstance(error, asyncpg.PostgresConnectionError)


def _is_slow(error: BaseException | None) -> bool:
    if isinstance(error, hosts.NoPrimary):
        return any(map(_is_slow, error.errors))
    return error is not None and (isinstance(error, _TOO_SLOW) or _is_slow(error.__cause__))


def reason(error: BaseException) -> str:
    """Return what is wrong, without the statement or any data."""
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    if isinstance(error, hosts.NoPrimary):
        return str(error)
    if type(error) is asyncpg.InternalClientError:  # its words are about the states of the driver
        return "the connection was closed during an operation: PostgreSQL stops, or the network failed"
    words = (isinstance(error, OSError) and error.strerror) or (str(error.args[0]) if error.args else "")
    return f"{type(error).__name__}: {words.splitlines()[0][:200]}" if words else type(error).__name__
