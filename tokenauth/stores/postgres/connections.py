"""The connections to PostgreSQL: what is asked and changed over them, and what it means when they break."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import URL, AdaptedConnection, Connection, event, exc, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from tokenauth.errors import StartError, StoreUnavailable
from tokenauth.logs import log
from tokenauth.models import Instant
from tokenauth.stores import schema
from tokenauth.stores.batching import Answers, Batch, Verb, Writer
from tokenauth.stores.changes import tokens as verbs
from tokenauth.stores.circuit import Circuit
from tokenauth.stores.engine import Disturbed, PostgresTransaction, advisory_key
from tokenauth.stores.postgres import hosts
from tokenauth.stores.tables import metadata

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds that a statement may take, waiting for locks included; the server gives it up a little earlier."""

CONNECT_PATIENCE = 2.0
"""Seconds that it may take to connect, and to wait for a connection that others use."""

_SETTINGS = {
    "application_name": "tokenauth",
    "statement_timeout": "4500",  # milliseconds
    "idle_in_transaction_session_timeout": "4500",  # a process that was stopped in the middle must not hold its locks
    "tcp_keepalives_idle": "5",  # seconds; nor one whose machine has gone
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "jit": "off",
    # Plans are as good as the statistics, which do not know what is new, and they are kept: what was planned while the
    # tables were empty still runs when they have millions of rows. Every statement can go by an index, so it must.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "max_parallel_workers_per_gather": "0",
}

_UPGRADE_PAUSE = 1.0
"""Seconds until an upgrade is tried again that others were in the way of."""

_UPGRADE_PATIENCE = 3600.0
"""Seconds that a step of an upgrade may take: it may read a large table."""

_HOLD_SCHEMA = text("SELECT pg_advisory_xact_lock(hashtextextended('tokenauth schema', 0))")

_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
"""What others have committed while a lock was waited for must be seen, whatever the database's default is."""

_PROBE_READING = f"""
    SET lock_timeout = '500ms';
    SELECT {", ".join(f"(SELECT 1 FROM {name} LIMIT 1)" for name in metadata.tables)}
"""  # noqa: S608 - constants
_PROBE_WRITING = f"""
    BEGIN; SET LOCAL lock_timeout = '500ms';
    LOCK TABLE {", ".join(metadata.tables)} IN ROW EXCLUSIVE MODE;
    SELECT pg_advisory_xact_lock({advisory_key(verbs.REVOKING)});
    {verbs.PROBE}; COMMIT
"""
"""Needs what queries and changes need, so that it fails when those would hang."""

_REMEMBERING = 1.0
"""Seconds between two times that a process writes down what time it is."""


class Database:
    """The connections: those for queries and changes, and how one is made to listen on."""

    def __init__(self, url: URL, connections: int, timed: bool) -> None:
        """Take `postgresql+asyncpg://...`. `timed`: whoever writes says what time it is, and not the database."""
        self.name = hosts.name(url)
        self.notifies = True
        arguments = {
            "timeout": CONNECT_PATIENCE,
            "command_timeout": PATIENCE,
            "target_session_attrs": "primary",  # a standby does not know of the latest removals
            "server_settings": _SETTINGS,
        }
        self._engine = create_async_engine(
            url,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=CONNECT_PATIENCE,
            pool_reset_on_return=None,
            isolation_level="AUTOCOMMIT",
            hide_parameters=True,
            connect_args={**arguments, "async_creator_fn": hosts.connect},
        )
        event.listen(self._engine.sync_engine, "checkout", self._demand_open)
        event.listen(self._engine.sync_engine, "close", _hang_up)
        self._arguments = {**self._engine.dialect.create_connect_args(url)[1], **arguments}
        patient = {**arguments, "async_creator_fn": hosts.connect, "command_timeout": _UPGRADE_PATIENCE}
        self._patient = create_async_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=patient)
        self._timed = timed
        self._writers: dict[Verb, Writer] = {}
        self._latest: Instant = 0
        self._remembered: Instant = 0
        self._reading = Circuit(
            partial(self._probe, _PROBE_READING),
            "store_unreachable",
            "store_reachable_again",
            probe_failed=self._lose_reach,
        )
        self._writing = Circuit(
            partial(self._probe, _PROBE_WRITING),
            "store_not_writable",
            "store_writable_again",
            opened=self._refuse_waiting,
            probe_failed=self._give_up_writing,
        )
        self.suspect = self._reading.suspect

    @property
    def trouble(self) -> str | None:
        """What keeps the database from being read or written, if anything is known to."""
        if self._reading.trouble is not None:
            return f"store unreachable: {self._reading.trouble}"
        return None if self._writing.trouble is None else f"store not writable: {self._writing.trouble}"

    async def verdict(self) -> str | None:
        """Return what keeps the database from being read or written; if it is being probed, when that is known."""
        await self._reading.verdict()
        await self._writing.verdict()
        return self.trouble

    async def demand_utf8(self) -> None:
        """Raise StartError for a database that cannot keep all names, or takes bytes for characters."""
        encoding = await self.read_once(lambda db: driver(db).driver_connection.get_settings().server_encoding)
        if encoding != "UTF8":
            raise StartError(
                f"the database {self.name} keeps text as {encoding}; create it with ENCODING 'UTF8' TEMPLATE template0"
            )

    async def upgrade(self, create: bool = True) -> None:
        """Bring the schema up to date. Any number of machines may do so at once. Raises what the drivers raise.

        Whoever waits to change a table stands before all who only use it: so an upgrade does not wait long, but
        begins again, for as long as others are in its way (a backup reads all tables in one transaction, another
        machine upgrades). Where nothing is to be done, nobody is waited for. Raises StartError if there are no tables
        and it may not `create` them.
        """
        waited = False
        while not schema.serves(had := await self.read_once(schema.version)):
            if had is None and not create:
                raise StartError(
                    f"The database {self.name} has no tables of tokenauth. Correct database.url,"
                    " or run `tokenauth migrate`."
                )
            try:
                await self._upgrade()
            except exc.DBAPIError as error:
                if not isinstance(error.__cause__ and error.__cause__.__cause__, asyncpg.LockNotAvailableError):
                    raise
                if not waited:
                    log.warning("schema_upgrade_waits", reason="others use the tables", action="tried until it works")
                waited = True
                await asyncio.sleep(_UPGRADE_PAUSE)

    async def _upgrade(self) -> None:
        async with self._patient.begin() as db:
            await db.execute(text("SET LOCAL lock_timeout = '4s'"))
            await db.execute(_HOLD_SCHEMA)
            await db.execute(text("SET LOCAL lock_timeout = '500ms'"))
            await db.execute(text("SET LOCAL statement_timeout = 0"))
            had = await db.run_sync(schema.upgrade)
        if not schema.serves(had):
            log.info("schema_upgraded", before=had, after=schema.HEAD)

    async def stop(self, now: Instant | None = 0) -> None:
        """Finish what waits to be written, write down what time it is unless that is None, and disconnect."""
        if now is not None:
            with suppress(StoreUnavailable):
                await self.write(verbs.remember_now, None, max(now, self._latest))
        for writer in self._writers.values():
            await writer.finish()
        await self.discard()

    async def discard(self) -> None:
        """Disconnect."""
        await self._reading.stop()
        await self._writing.stop()
        await self._engine.dispose()

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query; again if the connection broke in the middle of it. Raises StoreUnavailable."""
        async with self._reading.attempt() as began:
            try:
                return await self.read_once(query)
            except UNAVAILABLE as error:
                if isinstance(error, _CALLERS_FAULT):
                    raise
                if _is_slow(error):
                    self._reading.suspect()
                    raise StoreUnavailable from error
            try:
                return await self.read_once(query)
            except UNAVAILABLE as error:
                if _is_slow(error):
                    self._reading.suspect()
                else:
                    self._reading.failed(reason(error), began)
                raise StoreUnavailable from error

    async def read_once(self, query: Callable[[Connection], T]) -> T:
        """Run a query while it is not known whether the database works. Raises what the drivers raise."""
        async with self._engine.connect() as db:
            return await db.run_sync(query)

    def write(self, verb: Verb, wish: Any, now: Instant) -> Awaitable[Any]:
        """Have a change made and committed together with the others of its kind that wait."""
        self._writing.demand()
        writer = self._writers.get(verb)
        if writer is None:
            writer = self._writers[verb] = Writer(self._transact)
        return writer.write(verb, wish, now)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[asyncpg.Connection]:
        """Connect once more, for one use."""
        connection = await hosts.connect(**self._arguments)
        try:
            yield connection
        finally:
            connection.terminate()  # to take leave could take for ever

    async def _transact(self, batch: Batch, now: Instant) -> Answers:
        try:
            async with self._writing.attempt() as began, self._engine.connect() as db:
                answers: Answers = await db.run_sync(self._apply, batch, now)
        except UNAVAILABLE as error:
            if isinstance(error, _CALLERS_FAULT):
                raise
            self._remembered = 0  # the next one writes something in any case: it too must reach who is to have a copy
            if _is_slow(error):
                self._writing.suspect()
            else:
                self._writing.failed(reason(error), began)
            raise StoreUnavailable from error
        except StoreUnavailable:
            self._remembered = 0
            raise
        return answers

    async def _probe(self, statements: str) -> str | None:
        """Run some statements on a connection of their own; return what is wrong, if anything is."""
        try:
            async with self.listening() as db:
                await db.execute(statements)
        except (asyncpg.TooManyConnectionsError, asyncpg.FeatureNotSupportedError):
            return None  # it answers: whether the others can go on is for them to find out
        except UNAVAILABLE as error:
            return reason(error)
        return None

    def _lose_reach(self) -> None:
        """Refuse to write, too, and end what is under way: nothing of it will be answered soon."""
        self._writing.open(self._reading.trouble or "")
        self._reading.give_up()
        self._writing.give_up()

    def _give_up_writing(self) -> None:
        self._writing.give_up()

    def _refuse_waiting(self) -> None:
        for writer in self._writers.values():
            writer.refuse_waiting()

    def _demand_open(self, connection: AdaptedConnection, record: ConnectionPoolEntry, _: object) -> None:
        """Have a connection replaced that the server has closed meanwhile, or that was made before reach was lost."""
        openings = self._reading.openings
        if connection.driver_connection.is_closed() or record.info.setdefault("openings", openings) != openings:
            raise exc.DisconnectionError

    def _apply(self, db: Connection, batch: Batch, now: Instant) -> Answers:
        """Make the changes of one kind in one transaction."""
        try:
            return self._attempt(db, batch, now)
        except Disturbed:
            return self._attempt(db, batch, now, undisturbed=True)

    def _attempt(self, db: Connection, batch: Batch, now: Instant, undisturbed: bool = False) -> Answers:
        plain = driver(db)
        transaction = PostgresTransaction(plain, self._timed, self.notifies, undisturbed)
        try:
            plain.run_async(lambda connection: connection.execute(_BEGIN))
            answers = [verb(transaction, wishes) for verb, wishes in batch.items()]
            self._latest = max(self._latest, now)
            if now > self._remembered + _REMEMBERING or verbs.remember_now in batch:
                verbs.remember(transaction, self._latest)
                self._remembered = now
            plain.run_async(lambda connection: connection.execute("COMMIT"))
        except (*_CALLERS_FAULT, Disturbed):
            _roll_back(db)
            raise
        except BaseException:  # who knows how far it came
            db.invalidate()
            raise
        return answers


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


def _hang_up(connection: AdaptedConnection, *_: object) -> None:
    """End a connection without taking leave, which could take for ever."""
    connection.driver_connection.terminate()


_CALLERS_FAULT = (exc.DataError, exc.IntegrityError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)


"""What is raised for one bad wish, and not because the machine is broken."""

_TOO_SLOW = (TimeoutError, exc.TimeoutError, asyncpg.QueryCanceledError)


def _is_slow(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, _TOO_SLOW) or _is_slow(error.__cause__))


UNAVAILABLE = (exc.SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What is raised when the database cannot do something: whatever the reason, nothing is known then."""


def reason(error: BaseException) -> str:
    """Say what PostgreSQL says is wrong, without the statement or anything in it."""
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    words = (isinstance(error, OSError) and error.strerror) or (str(error.args[0]) if error.args else "")
    return f"{type(error).__name__}: {words.splitlines()[0][:200]}" if words else type(error).__name__
