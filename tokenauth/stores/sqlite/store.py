"""SQLite: one file, one writer thread for each process, readers that never wait."""

import asyncio
import fcntl
import math
import os
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from tokenauth.clock import Clock
from tokenauth.errors import Overloaded, RetryLater, StartError, StoreUnavailable
from tokenauth.executor import Executor
from tokenauth.logs import log
from tokenauth.models import Failures, Instant, Pool, PoolCounts, PoolToken, Token
from tokenauth.stores import schema
from tokenauth.stores.batching import Answers, Batch, Verb, Writer
from tokenauth.stores.cache import CachedTokenStore
from tokenauth.stores.changes import tokens as verbs
from tokenauth.stores.circuit import PROBE_PATIENCE, Circuit
from tokenauth.stores.engine import SqliteTransaction
from tokenauth.stores.sql import SqlFailureStore, SqlPoolStore, SqlTokenStore
from tokenauth.stores.sqlite.reader import ERRORS, Reader, reason
from tokenauth.stores.sqlite.turns import TURN_PATIENCE, Turn, Turns
from tokenauth.stores.store import Hear, unheard

T = TypeVar("T")

BUSY_TIMEOUT = 3000
"""Milliseconds that a write waits for another process's."""

_PROBE_TIMEOUT = 500
"""Milliseconds that a probe waits for another process's write."""

_READ_TIMEOUT = 0.25
"""Seconds that a query waits where even SQLite's readers must: while a crashed process's log is recovered."""

CHECKPOINT_INTERVAL = 10.0
"""Seconds between two checks that the log of writes (-wal) can be copied into the database."""

_WAL_LIMIT = 16 * 2**20
"""Bytes of the log of writes that stay on the disk, after a long reader has let it grow: twice what is usual."""

_WAL_ALARM = 64 * 2**20
"""Bytes of the log of writes from which on it is logged that a reader keeps it from being copied."""

_READ_PATIENCE = 2.0
"""Seconds that a query waits for a connection that others use."""

_ROOM_FOR_A_ROW = 8 * 2**10
"""Bytes of the log of writes that one changed row takes at the most: a page of the table, and one of each index."""

_MOST_ROOM = 4 * 2**20
"""Bytes that a probe writes at the most."""

_FILL = "INSERT INTO marks (name, at) VALUES ('probe', zeroblob(?)) ON CONFLICT (name) DO UPDATE SET at = excluded.at"
"""Takes so many bytes in the log of writes."""

_FEW = 2000
"""Tokens that are counted on the event loop: that takes less time than a thread to be woken."""


class Database:
    """The file: queries go to the async driver, changes to the one writer."""

    def __init__(self, url: URL, create: bool = True) -> None:
        """Take `sqlite+aiosqlite:///PATH`. `create` the file if there is none."""
        self._create = create
        self.path = os.path.abspath(url.database or "")
        self._readers = _read_engine(url)
        self._thread = _executor()
        self._spare = _executor()  # for when the first one waits in vain for its turn; they do not share the connection
        self._using = threading.Lock()
        self._writer = Writer(self._transact)
        self._turns = Turns(self.path)
        self._circuit = Circuit(
            self._probe, "store_not_writable", "store_writable_again", opened=self._writer.refuse_waiting
        )
        self._probing: asyncio.Future[str | None] | None = None
        self._reading = Circuit(self._probe_reading, "store_unreachable", "store_reachable_again")
        self._checkpoint_trouble: str | None = None
        self._wal_alarm = _WAL_ALARM
        self._written = False
        self._asked_for_lock = math.inf
        self._lacking = 0
        self.lost = False

    async def verdict(self) -> str | None:
        """Return what keeps the file from being written; if it is being probed, when that is known."""
        await self._circuit.verdict()
        if self._circuit.trouble is not None:
            return f"store not writable: {self._circuit.trouble}"
        if self._checkpoint_trouble is not None:
            return f"the database's -wal file cannot be copied into it, and grows: {self._checkpoint_trouble}"
        return None

    async def start(self) -> None:
        """Create the file if that is allowed and it is not there, and bring its schema up to date.

        Any number of processes may do so at once. Where the schema is up to date, this only reads, so it works while
        another program holds the lock for writing. Raises StartError.
        """
        try:
            await self._thread.run(self._prepare)
            await self._spare.run(lambda: None)  # its thread, too, is started now, and not when there may be none
        except (OSError, sqlite3.Error, DBAPIError, Overloaded) as error:
            raise StartError(f"the database {self.path} cannot be used: {self._explain(_reason(error))}") from None

    def open_reader(self, hear: Hear) -> Reader:
        """Open the connection for look-ups on the event loop. Raises what SQLite raises."""
        self._reader = Reader(self.path, hear, self._read_failed)
        return self._reader

    def read_trouble(self) -> str | None:
        """Return what keeps the file from being read; it is logged, and probed until it works again."""
        trouble = self._reader.trouble()
        if trouble is not None:
            self._read_failed(trouble)
        return trouble

    async def stop(self) -> None:
        """Finish what waits to be written, and disconnect."""
        await self._writer.finish()
        await self._circuit.stop()
        await self._reading.stop()
        await self._readers.dispose()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if self._circuit.trouble is None else 1):  # its thread may hang for ever
                await self._submit(self._close)
        self._thread.close()
        self._spare.close()

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query off the event loop. Raises StoreUnavailable."""
        if self.lost:
            raise StoreUnavailable
        try:
            db = await self._readers.connect()
        except (
            SQLAlchemyError,
            RuntimeError,
            MemoryError,
        ) as error:  # RuntimeError: the thread of a new connection cannot be started
            if not isinstance(error, SQLAlchemyError) or isinstance(error, DBAPIError):  # no mere wait for others
                self._read_failed(_reason(error))
            raise StoreUnavailable from error
        try:
            return await db.run_sync(query)
        except (DBAPIError, MemoryError) as error:
            self._read_failed(_reason(error))
            raise StoreUnavailable from error
        finally:
            await db.close()

    def write(self, verb: Verb, wish: Any, now: Instant) -> Awaitable[Any]:
        """Have a change made and committed together with whatever else waits."""
        self._circuit.demand()
        return self._writer.write(verb, wish, now)

    async def check(self) -> None:
        """Look whether the log of writes can be copied into the database. SQLite itself does so, and says nothing."""
        if not self._written or self.lost or self._circuit.trouble is not None:
            return
        self._written = False
        trouble, size = await self._submit(self._checkpoint)
        if trouble != self._checkpoint_trouble:
            if trouble is None:
                log.info("checkpoint_works_again")
            else:
                log.error("checkpoint_failed", reason=trouble, action="the -wal file grows until this works")
        self._checkpoint_trouble = trouble
        self._note_size(size)
        self._written = self._written or trouble is not None or size > _WAL_LIMIT

    def _note_size(self, size: int) -> None:
        """Log that a long reader keeps the log of writes from being copied, each time that it has doubled."""
        if size > self._wal_alarm:
            action = f"end the program that has been reading the database for long: fuser -v {self.path}"
            log.warning("checkpoint_blocked", megabytes=size >> 20, action=action)
            self._wal_alarm = 2 * size
        elif size <= _WAL_LIMIT and self._wal_alarm > _WAL_ALARM:
            log.info("checkpoint_works_again")
            self._wal_alarm = _WAL_ALARM

    def refresh_turns(self) -> None:
        """Use the file by which others take turns, if it was deleted or replaced."""
        if self._turns.replaced():
            self._turns.open()

    def _submit(self, job: Callable[[], Any]) -> asyncio.Future[Any]:
        """Have something done on the thread that is not blocked."""
        return (self._spare if self._turns.blocked else self._thread).submit(job)

    async def _transact(self, batch: Batch, now: Instant) -> Answers:
        given_up = threading.Event()
        work = waiting = None
        async with self._circuit.attempt() as began:
            try:
                turn = self._turns.next()
                work = self._submit(partial(self._apply, batch, now, given_up, turn))
                if turn is not None:
                    waiting = asyncio.get_running_loop().call_later(TURN_PATIENCE, self._give_up, turn, work)
                answers: Answers | None = await work
                if answers is None:  # it goes without a turn
                    work = self._submit(partial(self._apply, batch, now, given_up))
                    answers = await work
            except ERRORS as error:
                if isinstance(error, _CALLERS_FAULT):
                    raise
                # locked, full, read-only, broken: nothing that a caller did
                self._circuit.failed(self._explain(reason(error)), began)
                raise StoreUnavailable from error
            except Overloaded as error:  # its thread could not be started
                self._circuit.failed(str(error), began)
                raise StoreUnavailable from error
            finally:
                given_up.set()
                if waiting is not None:
                    waiting.cancel()
                if work is not None:
                    work.cancel()
        return answers

    def _give_up(self, turn: Turn, work: asyncio.Future[Answers | None]) -> None:
        """Wait no more for a turn that does not come; the thread may wait on."""
        if not work.done() and turn.give_up():
            self._turns.gave_up(turn)
            work.set_result(None)

    def _apply(self, batch: Batch, now: Instant, given_up: threading.Event, turn: Turn | None = None) -> Answers:
        """Make all changes of a batch in one transaction, on the writer's thread; none if nobody waits any more."""
        if turn is None:
            return self._apply_now(batch, now, given_up)
        if not turn.begin():
            self._turns.ended(turn)
            return ()
        try:
            return self._apply_now(batch, now, given_up)
        finally:
            turn.end()

    def _apply_now(self, batch: Batch, now: Instant, given_up: threading.Event) -> Answers:
        if self.lost:
            raise StoreUnavailable
        with self._using:
            changed = self._connection.total_changes
            try:
                self._asked_for_lock = monotonic()
                self._connection.execute("BEGIN IMMEDIATE")
                self._asked_for_lock = math.inf
                if given_up.is_set():  # while it waited for the lock
                    raise StoreUnavailable  # noqa: TRY301 - and the transaction is rolled back
                answers = [verb(self._transaction, wishes) for verb, wishes in batch.items()]
                verbs.remember(self._transaction, now)
                self._connection.execute("COMMIT")
            except Exception as error:
                self._asked_for_lock = math.inf
                if isinstance(error, sqlite3.OperationalError) and str(error) != _LOCKED:
                    self._lacking = min((self._connection.total_changes - changed + 1) * _ROOM_FOR_A_ROW, _MOST_ROOM)
                with suppress(*ERRORS):
                    self._connection.rollback()
                raise
        self._written = True
        return answers

    def _read_failed(self, why: str) -> None:
        """Log it, unless that was done lately, and probe until reading works again. Refuses nothing by itself."""
        if not self.lost:
            self._reading.failed(why, asyncio.get_running_loop().time())

    async def _probe_reading(self) -> str | None:
        return self._reader.trouble()

    async def _probe(self) -> str | None:
        """Write something; return what is wrong, if anything is. One that hangs is waited for, not repeated.

        After a failure it writes as much as what failed: on a disk that is nearly full, less might still fit.
        """
        if monotonic() - self._asked_for_lock > PROBE_PATIENCE:  # the thread that probes waits for it
            return self._explain(_LOCKED)
        try:
            if self._probing is None or self._probing.done():
                self._probing = self._submit(self._probe_now)
            return await asyncio.shield(self._probing)
        except Overloaded as error:
            return str(error)

    def _probe_now(self) -> str | None:
        if self.lost:
            return "the database file was replaced"
        with self._using:
            began = monotonic()
            try:
                self._connection.execute(f"PRAGMA busy_timeout = {_PROBE_TIMEOUT}")
                if self._lacking:  # committed, or the log would not have to hold it
                    self._connection.execute(_FILL, (self._lacking,))
                self._connection.execute("BEGIN IMMEDIATE")
                verbs.probe(self._transaction)
                self._connection.execute("COMMIT")
            except ERRORS as error:
                with suppress(*ERRORS):
                    self._connection.rollback()
                return self._explain(reason(error))
            finally:
                self._connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
            self._lacking = 0
            seconds = monotonic() - began
        return None if seconds < PROBE_PATIENCE else f"a commit took {seconds:.1f} s"

    def _checkpoint(self) -> tuple[str | None, int]:
        """Copy the log of writes into the database; return what is wrong, and the bytes that the log has then.

        A log that a long reader has let grow is cut off when all of it is copied; else the next write would do so.
        """
        log_of_writes = f"{self.path}-wal"
        with self._using:
            try:
                _, pages, copied = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if pages == copied and _size(log_of_writes) > _WAL_LIMIT:
                    self._connection.execute("PRAGMA busy_timeout = 0")  # it would wait for readers, and hold up writes
                    try:
                        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    finally:
                        self._connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
            except ERRORS as error:
                return reason(error), _size(log_of_writes)
        return None, _size(log_of_writes)

    def _close(self) -> None:
        with self._using:
            self._connection.close()
            self._turns.close()

    def _explain(self, trouble: str) -> str:
        """Add what the operator can do to what SQLite says."""
        if trouble != _LOCKED:
            return trouble
        return f"{_LOCKED}. Another program holds a lock on {self.path}: find it with `fuser -v {self.path}`"

    def _prepare(self) -> None:
        if not self._create and not _has_content(self.path):
            raise self._none()
        directory = os.path.dirname(self.path)
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # SQLite's own locks cannot cover the change to WAL mode
            with suppress(FileExistsError):  # and not opened: closing it would drop this process's SQLite locks on it
                new = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
                os.fchmod(new, 0o600)  # whatever the umask; SQLite gives -wal and -shm the mode of this one
                os.close(new)
            self._turns.open()
            self._connection = _connect(self.path)
            self._transaction = SqliteTransaction(self._connection)
            had = self._upgrade()
            if not schema.serves(had):
                log.info("schema_upgraded", before=had, after=schema.HEAD)
        finally:
            os.close(lock)

    def _upgrade(self) -> str | None:
        """Bring the schema up to date; the answer is the revision that it had."""
        engine = create_engine(
            "sqlite://", creator=lambda: self._connection, poolclass=StaticPool, hide_parameters=True
        )
        with engine.connect() as db:
            had = schema.version(db)
        if schema.serves(had):
            return had
        if had is None and not self._create:
            raise self._none()
        event.listen(engine, "begin", lambda db: db.exec_driver_sql("BEGIN IMMEDIATE"))
        with engine.begin() as db:
            return schema.upgrade(db)

    def _none(self) -> StartError:
        return StartError(
            f"There is no database at {self.path}."
            " Run this in the directory of the service, or make database.url absolute."
        )


class SqliteTokenStore(SqlTokenStore):
    """TokenStore whose look-ups by digest go through the plain reader."""

    def __init__(self, database: Database, reader: Reader) -> None:
        super().__init__(database)
        self._reader = reader

    async def get(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return self._reader.token(digest)


class SqlitePoolStore(SqlPoolStore):
    """PoolStore whose look-ups go through the plain reader."""

    def __init__(self, database: Database, reader: Reader) -> None:
        super().__init__(database)
        self._reader = reader

    async def get(self, pool: Pool, value: str, now: Instant) -> PoolToken | None:
        """Return the token of this value."""
        token = self._reader.pool_token(pool.name, value)
        return token if token is not None and pool.is_live(token, now) else None

    async def count(self, pool: Pool, now: Instant) -> PoolCounts:
        """Say how many tokens can be lent, and how many are; of a large pool, without holding up the others."""
        if pool.capacity is not None and pool.capacity <= _FEW:
            return self._reader.pool_counts(pool, now)
        return await super().count(pool, now)


class SqliteFailureStore(SqlFailureStore):
    """FailureStore that is read through the plain reader."""

    def __init__(self, database: Database, reader: Reader) -> None:
        super().__init__(database)
        self._reader = reader

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Return what is counted under these keys."""
        return self._reader.failures(keys)


class SqliteStore:
    """Everything that tokenauth keeps, in one SQLite file."""

    tokens: CachedTokenStore
    pools: SqlitePoolStore
    failures: SqliteFailureStore

    def __init__(self, url: URL, cache_size: int, clock: Clock = time.time, serving: bool = True) -> None:
        """Take `sqlite+aiosqlite:///PATH`, how many tokens each worker remembers, and the machine's clock.

        Unless it is for `serving`, it creates no file, and writes nothing but what it is told to.
        """
        self._database = Database(url, create=serving)
        self._serving = serving
        self._cache_size = cache_size
        self.clock = clock

    async def start(self, hear: Hear = unheard) -> Instant:
        """Bring the schema up to date and connect."""
        await self._database.start()
        self._reader = reader = self._database.open_reader(hear)
        self._watch_later()
        self._checking = asyncio.create_task(self._check())
        self.tokens = CachedTokenStore(SqliteTokenStore(self._database, reader), reader, self._cache_size)
        self.pools = SqlitePoolStore(self._database, reader)
        self.failures = SqliteFailureStore(self._database, reader)
        return reader.mark(verbs.CLOCK)

    async def stop(self, now: Instant) -> None:
        """Finish what is being written, remember `now`, and disconnect."""
        self._watcher.cancel()
        self._checking.cancel()
        if self._serving:
            with suppress(StoreUnavailable):
                await self.remember(now)
        await self._database.stop()
        self._reader.close()

    async def remember(self, now: Instant) -> None:
        """Let it be known that it has been `now`."""
        await self._database.write(verbs.remember_now, None, now)

    async def ready(self) -> str | None:
        """Say what keeps the store from serving, if anything does."""
        self._look_at_files()
        if self._database.lost:
            return "the database file, its -wal or its -shm was moved, deleted or replaced; restart tokenauth"
        trouble = await self._database.verdict()
        if trouble is not None:
            return trouble
        trouble = self._database.read_trouble()
        if trouble is not None:
            return f"store unreachable: {trouble}"
        try:
            version = await self._database.read(schema.version)
        except StoreUnavailable as error:
            return f"store unreachable: {_reason(error.__cause__)}"
        return None if schema.serves(version) else f"schema is {version}, this release needs {schema.HEAD}"

    async def claim(self, duty: str, now: Instant, until: Instant) -> bool:
        """Take on a duty until an instant, unless somebody has it."""
        return bool(await self._database.write(verbs.claim, verbs.Claim(duty, now, until), now))

    async def purge_log(self, before: Instant, limit: int) -> int:
        """Delete old entries of the revocation log."""
        return int(await self._database.write(verbs.purge_revocations, verbs.Purge(before, limit), 0))

    def _watch(self) -> None:
        """Look every second whether the file is still the one at its path, and what time others say it has been.

        If not, what is written would be acknowledged and gone: nothing is read or written any more.
        """
        self._look_at_files()
        if not self._database.lost:
            with suppress(StoreUnavailable):
                self._reader.listen()
            self._database.refresh_turns()
        self._watch_later()

    def _look_at_files(self) -> None:
        replaced = None if self._database.lost else self._reader.replaced()
        if replaced is not None:
            log.error("store_file_replaced", file=replaced, action="restart tokenauth")
            self._database.lost = True
            self._reader.close()

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_INTERVAL)
            with suppress(RetryLater):
                await self._database.check()

    def _watch_later(self) -> None:
        self._watcher = asyncio.get_running_loop().call_later(1, self._watch)


def _executor() -> Executor[Callable[[], Any], Any]:
    return Executor(lambda job: job(), threads=1, queue=4)


def _read_engine(url: URL) -> AsyncEngine:
    engine = create_async_engine(
        url, hide_parameters=True, pool_timeout=_READ_PATIENCE, connect_args={"timeout": _READ_TIMEOUT}
    )
    event.listen(engine.sync_engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only = ON"))
    return engine


def _connect(path: str) -> sqlite3.Connection:
    """Open the connection that writes; it is used by one thread."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for pragma in _WRITING:
        connection.execute(f"PRAGMA {pragma}").close()
    return connection


_WRITING = (
    f"busy_timeout = {BUSY_TIMEOUT}",
    "page_size = 2048",  # of a new file; a random insert writes whole pages to the log
    "journal_mode = WAL",
    "cache_size = -16000",  # KiB
    "wal_autocheckpoint = 4000",  # 8 MiB: each checkpoint holds up the commits for some milliseconds
    f"journal_size_limit = {_WAL_LIMIT}",
    "synchronous = FULL",
)

_LOCKED = "database is locked"
"""What SQLite says when it has waited long enough for another program's lock."""

_CALLERS_FAULT = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)
"""What SQLite raises for one bad wish, and not because the machine is broken."""


def _has_content(path: str) -> bool:
    return _size(path) > 0


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _reason(error: BaseException | None) -> str:
    """Say what SQLite says is wrong, without the statement or anything in it."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if isinstance(error, ERRORS):
        return reason(error)
    return str(error) if isinstance(error, OSError | RuntimeError | Overloaded) else type(error).__name__
