"""The one connection of a process that writes to the SQLite file, in a thread of its own."""

import asyncio
import fcntl
import math
import os
import shutil
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from sqlalchemy import create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from tokenauth.clock import Clock
from tokenauth.errors import Overloaded, StartError, StoreUnavailable
from tokenauth.executor import Executor
from tokenauth.logs import log
from tokenauth.stores import schema
from tokenauth.stores.batching import Batch, Writer
from tokenauth.stores.changes.clock import write_clock, write_probe
from tokenauth.stores.changes.request_rows import keep_places
from tokenauth.stores.circuit_breaker import PROBE_TIMEOUT, WAIT_FOR_WRITES, Circuit
from tokenauth.stores.engine import Change
from tokenauth.stores.sqlite.files import abandoned_wal, existing, file_size, find_problem
from tokenauth.stores.sqlite.reader import ERRORS, reason
from tokenauth.stores.sqlite.transaction import SqliteTransaction
from tokenauth.stores.sqlite.write_lock import LOCK_TIMEOUT, LockWait, WriteLock

A = TypeVar("A")

BUSY_TIMEOUT = 3000
"""Milliseconds that a write waits for another process's."""

_PROBE_BUSY_TIMEOUT = 500
"""Milliseconds that a probe waits for another process's write."""

_WAL_LIMIT = 16 * 2**20
"""Bytes to which the -wal file is cut after a long reader has let it grow: twice its usual size."""

_WAL_ALARM = 64 * 2**20
"""Bytes of the -wal file above which it is logged that a reader keeps it from being copied."""

_BYTES_PER_ROW = 8 * 2**10
"""Maximum bytes of the -wal file that one changed row takes: a page of the table, and one of each index."""

_MAX_PROBE_SIZE = 4 * 2**20
"""Maximum bytes that a probe writes."""

_FILL_WAL = (
    "INSERT INTO marks (name, at) VALUES ('probe', zeroblob(?)) ON CONFLICT (name) DO UPDATE SET at = excluded.at"
)
"""Writes this many bytes to the -wal file."""

_PRAGMAS = (
    f"busy_timeout = {BUSY_TIMEOUT}",
    "page_size = 2048",  # of a new file; a random insert writes whole pages to the log
    "journal_mode = WAL",
    "cache_size = -16000",  # KiB
    "wal_autocheckpoint = 4000",  # 8 MiB: each checkpoint delays the commits by some milliseconds
    f"journal_size_limit = {_WAL_LIMIT}",
    "synchronous = FULL",
    "fullfsync = ON",  # on macOS, fsync leaves data in the cache of the drive; elsewhere this changes nothing
)

_LOCKED = "database is locked"
"""SQLite's message after it has waited long enough for another program's lock."""

_READ_ONLY = "attempt to write a readonly database"
"""SQLite's message if it could open one of its files for reading only."""

_IO_ERROR, _FULL_DISK = "disk I/O error", 4 << 20
"""SQLite's message for an error of the system, such as a -shm file without room; and bytes that a start needs."""

_BAD_CHANGE = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)
"""Errors caused by one bad change, not by a broken database."""


class _NotWritten(Exception):
    """The file is locked, full, read-only or broken: not the fault of any caller. It says what to do."""


class SqliteWriter:
    """Makes changes in batches, probes while they fail, and checks that the -wal file can be copied."""

    def __init__(self, path: str, clock: Clock, create: bool, copying: bool = False) -> None:
        """`create` the file if it does not exist, `copying` as an unfinished copy."""
        self.path = path
        self._clock = clock
        self.file_replaced = False
        """Whether another file is at the path now: nothing may be written any more."""
        self._create = create
        self._copying = copying
        self._thread = _executor()
        self._spare = _executor()  # while the first thread is stuck in its wait for the write lock
        self._using = threading.Lock()  # one thread at a time uses the connection
        self._writer = Writer(self._commit)
        self._write_lock = WriteLock(path)
        self._circuit = Circuit(
            self._probe,
            "store_not_writable",
            "store_writable_again",
            opened=lambda: self._writer.refuse_waiting(self._not_writable()),
            refusal=self._not_writable,
            probe_ends_outage=True,
            action=WAIT_FOR_WRITES,
        )
        self._probing: asyncio.Future[str | None] | None = None
        self._checkpoint_problem: str | None = None
        self._wal_alarm = _WAL_ALARM
        self._written = False
        self._lock_requested_at = math.inf
        self._probe_size = 0

    @property
    def refused(self) -> bool:
        """Whether changes are refused at once, because they have failed."""
        return self._circuit.problem is not None

    async def start(self) -> None:
        """Create the file if that is allowed and it does not exist, and bring its schema up to date.

        Any number of processes may do so at once. If the schema is up to date this only reads, so it works while
        another program holds the write lock. Raises StartError.
        """
        try:
            await self._thread.run(self._prepare)
            await self._spare.run(lambda: None)  # starts its thread now, and not when there may be none
        except (OSError, sqlite3.Error, DBAPIError, Overloaded) as error:
            problem = find_problem(self.path) or self._explain(describe(error))
            raise StartError(f"the database {self.path} cannot be used: {problem}") from None

    def open_nothing(self) -> None:
        """Make every change raise StoreUnavailable."""
        self.file_replaced = True
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.close()

    async def stop(self) -> None:
        """Finish the waiting changes, and disconnect."""
        await self._writer.finish()
        await self._circuit.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(1 if self.refused else None):  # its thread may hang forever
                await self._submit(self._close)
        self._thread.close()
        self._spare.close()

    def apply(self, change: Change[A]) -> Awaitable[A]:
        """Make a change; it shares a commit with the others that wait."""
        self._circuit.check_closed()
        return self._writer.apply(change)

    async def probed_problem(self) -> str | None:
        """Return what keeps the file from being written, after the probe that is running, if one is."""
        await self._circuit.wait_for_probe()
        if self._circuit.problem is not None:
            return f"store not writable: {self._circuit.problem}"
        if self._checkpoint_problem is not None:
            return f"the database's -wal file cannot be copied into it, and grows: {self._checkpoint_problem}"
        return None

    async def check_wal(self) -> bool:
        """Return whether the -wal file can be copied into the database. SQLite copies it, but reports no failure."""
        if not self._written or self.file_replaced or self.refused:
            return self._checkpoint_problem is None
        self._written = False
        try:
            problem, size = await self._submit(self._checkpoint)
        except OSError as error:  # the size of the file is not known
            problem, size = describe(error), _WAL_LIMIT + 1
        if problem != self._checkpoint_problem:
            if problem is None:
                log.info("checkpoint_recovered")
            else:
                log.error("checkpoint_failed", reason=problem, action="the -wal file grows until this works")
        self._checkpoint_problem = problem
        self._log_size(size)
        self._written = self._written or problem is not None or size > _WAL_LIMIT
        return problem is None

    def _log_size(self, size: int) -> None:
        """Log that a long reader keeps the -wal file from being copied, again each time that its size doubles."""
        if size > self._wal_alarm:
            action = f"end the program that has been reading the database for long: fuser -v {self.path}"
            log.warning("checkpoint_blocked", megabytes=size >> 20, action=action)
            self._wal_alarm = 2 * size
        elif size <= _WAL_LIMIT and self._wal_alarm > _WAL_ALARM:
            log.info("checkpoint_recovered")
            self._wal_alarm = _WAL_ALARM

    def refresh_write_lock(self) -> None:
        """Reopen the lock file if it was deleted or replaced."""
        if self._write_lock.replaced():
            self._write_lock.open()

    def _submit(self, job: Callable[[], A]) -> asyncio.Future[A]:
        """Run something on the thread that is not blocked."""
        return (self._spare if self._write_lock.blocked else self._thread).run(job)

    async def _commit(self, batch: Batch) -> None:
        given_up = threading.Event()
        work = timer = None
        async with self._circuit.attempt() as began:
            try:
                wait = self._write_lock.new_wait()
                work = self._submit(partial(self._make, batch, given_up, wait))
                if wait is not None:
                    timer = asyncio.get_running_loop().call_later(LOCK_TIMEOUT, self._give_up, wait, work)
                if not await work:  # the lock was not acquired in time
                    work = self._submit(partial(self._make, batch, given_up))
                    await work
            except (_NotWritten, Overloaded) as error:  # or its thread could not be started
                self._circuit.failed(str(error), began)
                raise self._not_writable() from error
            finally:
                given_up.set()
                if timer is not None:
                    timer.cancel()
                if work is not None:
                    work.cancel()

    def _give_up(self, wait: LockWait, work: asyncio.Future[bool]) -> None:
        """Stop waiting for the write lock; the thread may still be blocked."""
        if not work.done() and wait.give_up():
            self._write_lock.gave_up(wait)
            work.set_result(False)

    def _make(self, batch: Batch, given_up: threading.Event, wait: LockWait | None = None) -> bool:
        """Make and commit a batch, in a thread; False if the wait for the write lock was given up.

        Raises _NotWritten.
        """
        try:
            return self._make_locked(batch, given_up, wait)
        except ERRORS as error:
            if isinstance(error, _BAD_CHANGE):
                raise
            raise _NotWritten(self._explain(reason(error))) from error

    def _make_locked(self, batch: Batch, given_up: threading.Event, wait: LockWait | None) -> bool:
        if wait is None:
            self._make_now(batch, given_up)
            return True
        if not wait.acquire():
            self._write_lock.ended(wait)
            return False
        try:
            self._make_now(batch, given_up)
        finally:
            wait.release()
        return True

    def _make_now(self, batch: Batch, given_up: threading.Event) -> None:
        if self.file_replaced:
            raise StoreUnavailable
        with self._using:
            changed = self._connection.total_changes
            try:
                self._lock_requested_at = monotonic()
                self._connection.execute("BEGIN IMMEDIATE")
                self._lock_requested_at = math.inf
                if given_up.is_set():  # while it waited for the lock
                    raise StoreUnavailable  # noqa: TRY301 - and the transaction is rolled back
                batch.make(self._transaction)
                write_clock(self._transaction, batch.now)
                self._connection.execute("COMMIT")
            except Exception as error:
                self._lock_requested_at = math.inf
                if isinstance(error, sqlite3.OperationalError) and str(error) != _LOCKED:
                    self._probe_size = min(
                        (self._connection.total_changes - changed + 1) * _BYTES_PER_ROW, _MAX_PROBE_SIZE
                    )
                with suppress(*ERRORS):
                    self._connection.rollback()
                raise
        self._written = True

    async def _probe(self) -> str | None:
        """Write something; return what is wrong, if anything.

        After a failure it writes as much as what failed: on a disk that is nearly full, less might still fit. One that
        hangs is waited for, and repeated when it has ended: it may have begun before the outage.
        """
        if monotonic() - self._lock_requested_at > PROBE_TIMEOUT:  # the writing thread still waits for it
            return self._explain(_LOCKED)
        try:
            if self._probing is not None and not self._probing.done():
                problem = await self._found_by(self._probing)
                if problem is not None:
                    return problem
            self._probing = self._submit(self._probe_now)
            return await self._found_by(self._probing)
        except Overloaded as error:
            return str(error)

    async def _found_by(self, probing: asyncio.Future[str | None]) -> str | None:
        """Return what a probe finds; or that the writing thread, which it waits for, waits too long for the lock."""
        requested_at = self._lock_requested_at
        if requested_at < math.inf:
            await asyncio.wait([probing], timeout=max(0, requested_at + PROBE_TIMEOUT - monotonic()))
            if not probing.done() and self._lock_requested_at == requested_at:
                return self._explain(_LOCKED)
        return await asyncio.shield(probing)

    def _probe_now(self) -> str | None:
        if self.file_replaced:
            return "the database file was replaced"
        with self._using:
            began = monotonic()
            try:
                self._connection.execute(f"PRAGMA busy_timeout = {_PROBE_BUSY_TIMEOUT}")
                if self._probe_size:  # in a commit of its own: SQLite writes it to the -wal file only then
                    self._connection.execute(_FILL_WAL, (self._probe_size,))
                self._connection.execute("BEGIN IMMEDIATE")
                write_probe(self._transaction)
                if refused_for := self._circuit.open_for():
                    self._connection.execute(keep_places(refused_for, self._clock()))
                self._connection.execute("COMMIT")
            except ERRORS as error:
                with suppress(*ERRORS):
                    self._connection.rollback()
                return self._explain(reason(error))
            finally:
                self._connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
            self._probe_size = 0
            seconds = monotonic() - began
        return None if seconds < PROBE_TIMEOUT else f"a commit took {seconds:.1f} s"

    def _checkpoint(self) -> tuple[str | None, int]:
        """Copy the -wal file into the database; return what is wrong, and the bytes that it has then.

        A -wal file that a long reader has let grow is cut when all of it is copied; else the next write would do so.
        """
        wal = f"{self.path}-wal"
        with self._using:
            try:
                _, pages, copied = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if pages == copied and file_size(wal) > _WAL_LIMIT:
                    self._connection.execute("PRAGMA busy_timeout = 0")  # or it would wait for readers and delay writes
                    try:
                        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    finally:
                        self._connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
            except ERRORS as error:
                return reason(error), file_size(wal)
        return None, file_size(wal)

    def _close(self) -> None:
        with self._using:
            self._connection.close()
            self._write_lock.close()

    def _not_writable(self) -> StoreUnavailable:
        return StoreUnavailable(None if self.file_replaced else StoreUnavailable.of_writes)

    def _explain(self, problem: str) -> str:
        """Add what the operator can do to SQLite's message. It looks at files, which may take as long as any write."""
        if problem == _READ_ONLY:
            reason = find_problem(self.path)
            return problem if reason is None else f"{problem}: {reason}, then reload tokenauth"
        if problem.startswith(_IO_ERROR):
            with suppress(OSError):  # the disk may be gone altogether
                free = shutil.disk_usage(os.path.dirname(self.path)).free
                return problem if free >= _FULL_DISK else f"{problem}: the disk is full, {free >> 10:,} KiB are free"
            return problem
        if problem != _LOCKED:
            return problem
        return f"{_LOCKED}. Another program holds a lock on {self.path}: find it with `fuser -v {self.path}`"

    def _prepare(self) -> None:
        if not self._create and file_size(self.path) == 0:
            raise self._missing()
        problem = abandoned_wal(self.path)
        if problem is not None:
            raise StartError(problem)
        directory = os.path.dirname(self.path)
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # SQLite's own locks cannot cover the change to WAL mode
            # An existing file is not opened: closing it would drop this process's SQLite locks.
            with suppress(FileExistsError):
                new = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
                os.fchmod(new, 0o600)  # whatever the umask; SQLite gives -wal and -shm the mode of this file
                os.close(new)
            self._write_lock.open()
            self._connection = _connect(self.path)
            self._transaction = SqliteTransaction(self._connection)
            try:
                had = self._upgrade()
            except BaseException:
                self._connection.close()  # it keeps a lock
                raise
            if not schema.serves(had):
                schema.log_upgrade(had, self.path)
        finally:
            os.close(lock)

    def _upgrade(self) -> str | None:
        """Bring the schema up to date; return the revision that it had."""
        engine = create_engine(
            "sqlite://", creator=lambda: self._connection, poolclass=StaticPool, hide_parameters=True
        )
        with engine.connect() as db:
            had = schema.version(db)
        if schema.serves(had):
            return had
        if had is None and not self._create:
            raise self._missing()
        event.listen(engine, "begin", lambda db: db.exec_driver_sql("BEGIN IMMEDIATE"))
        with engine.begin() as db:
            return schema.upgrade(db, self.path, self._copying)

    def _missing(self) -> StartError:
        return StartError(
            f"There is no database at {self.path}."
            " Run this in the directory of the service, or make database.url absolute."
        )


def _executor() -> Executor[Callable[[], Any], Any]:
    return Executor(lambda job: job(), threads=1, queue=4)


def _connect(path: str) -> sqlite3.Connection:
    """Open the connection that writes; one thread at a time uses it."""
    connection = sqlite3.connect(existing(path), isolation_level=None, check_same_thread=False, uri=True)
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise
    return connection


def describe(error: BaseException | None) -> str:
    """Return what is wrong, without the statement or any data."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if isinstance(error, ERRORS):
        return reason(error)
    return str(error) if isinstance(error, OSError | RuntimeError | Overloaded) else type(error).__name__
