"""SQLite: one file, one writer thread per process, readers that never wait."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from sqlalchemy import URL, Connection
from sqlalchemy.exc import DBAPIError

from tokenauth.clock import Clock
from tokenauth.errors import Overloaded, RetryLater, StartError, StoreUnavailable
from tokenauth.logs import log, safe_traceback
from tokenauth.models import DATABASE_LOST, Failures, Instant, ServedDatabase, Token
from tokenauth.stores import schema
from tokenauth.stores.changes.clock import SaveTime
from tokenauth.stores.circuit_breaker import Circuit
from tokenauth.stores.engine import Change, OnClockAdvance, Query, Rows, Values
from tokenauth.stores.sqlite import files
from tokenauth.stores.sqlite.reader import ERRORS, Reader
from tokenauth.stores.sqlite.reader_threads import ReaderThreads
from tokenauth.stores.sqlite.writer import SqliteWriter, describe

A = TypeVar("A")
T = TypeVar("T")

CHECKPOINT_INTERVAL = 10.0
"""Seconds between two checks that the -wal file can be copied into the database."""

WATCH_INTERVAL = 1.0
"""Seconds between two checks that the file was not replaced."""

_RECHECK = 1.0
"""Seconds until the next one after a failed check: `/readyz` is 503 until then."""


class SqliteEngine:
    """Engine of one SQLite file. Changes go to one thread, brief queries run on the event loop, others in threads."""

    def __init__(
        self, url: URL, clock: Clock, serving: bool, served: ServedDatabase | None, copying: bool = False
    ) -> None:
        """Take `sqlite+aiosqlite:///PATH` and the machine's clock.

        Unless it is for `serving`, it creates no file, and writes only the changes that are asked for. If a file is
        already `served`, no other is used, and none is created. `copying`: one that it creates is an unfinished copy.
        """
        self.clock = clock
        self._path = path = os.path.abspath(url.database or "")
        self.writer = SqliteWriter(path, clock, create=serving and served is None, copying=copying)
        self.reader = self.feed = Reader(path, self._read_failed)
        self._serving = serving
        self._served = served
        self._threads = ReaderThreads(path)
        self._reading = Circuit(self._probe, "store_unreachable", "store_reachable_again")

    async def start(self, on_clock_advance: OnClockAdvance) -> Instant:
        latest = 0.0
        if self._may_be_used():
            latest = await self._open(on_clock_advance)
        if not self._may_be_used():  # also if it was replaced meanwhile
            self._open_nothing()
        self._watch_later()
        self._checking = asyncio.create_task(self._check_wal())
        return latest

    def _may_be_used(self) -> bool:
        """Return whether the file at the path is the one that is served, or none is served yet. Raises StartError."""
        try:
            return self._served is None or files.identity(self._path) == self._served.identity
        except OSError as error:
            raise StartError(f"the database {self._path} cannot be used: {error.strerror}") from None

    async def _open(self, on_clock_advance: OnClockAdvance) -> Instant:
        """Open the file and return the time in the clock row. Raises StartError."""
        await self.writer.start()
        try:
            return self.reader.open(on_clock_advance)
        except (*ERRORS, OSError, StoreUnavailable) as error:
            await self.writer.stop()
            await self._reading.stop()
            cause = error.__cause__ if isinstance(error, StoreUnavailable) else error
            raise StartError(f"the database {self._path} cannot be used: {describe(cause)}") from None

    def _open_nothing(self) -> None:
        """Refuse every operation, since the file was replaced. Raises StartError if the start needs it."""
        if self._served is not None and self._served.required:
            problem, action = files.explain_loss(self._path)
            raise StartError(f"{self._path}: {problem}; {action}")
        self._log_loss(os.path.basename(self._path))
        self.writer.open_nothing()
        self.reader.open_nothing()

    @property
    def identity(self) -> str:
        return DATABASE_LOST if self.writer.file_replaced else self.reader.identity

    async def stop(self, now: Instant) -> None:
        self._watcher.cancel()
        self._checking.cancel()
        if self._serving:
            with suppress(StoreUnavailable):
                await self.apply(SaveTime(now=now))
        await self.writer.stop()
        await self._reading.stop()
        self._threads.close()
        self.reader.close()

    async def ready(self) -> str | None:
        self._check_files()
        if self.writer.file_replaced:
            return "; ".join(files.explain_loss(self._path))
        problem = await self.writer.probed_problem()
        if problem is not None:
            return problem
        problem = self.reader.problem()
        if problem is not None:
            self._read_failed(problem)
            return f"store unreachable: {problem}"
        try:
            version = await self._query(schema.version)
        except StoreUnavailable as error:
            return f"store unreachable: {describe(error.__cause__)}"
        return None if schema.serves(version) else f"schema is {version}, this release needs {schema.HEAD}"

    async def read(self, query: Query, values: Values, brief: bool = False) -> Rows:
        """Run a query, on the event loop if it is `brief`."""
        if brief:
            return self.reader.rows(query, values)
        return await self._query(lambda db: db.execute(query, values).all())

    def apply(self, change: Change[A]) -> Awaitable[A]:
        return self.writer.apply(change)

    async def token(self, digest: bytes) -> Token | None:
        """Look up a token on the event loop."""
        return self.reader.token(digest)

    @property
    def token_now(self) -> Callable[[bytes], Token | None]:
        """Look up a token on the event loop."""
        return self.reader.token

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Look up counts on the event loop."""
        return self.reader.failures(keys)

    async def _query(self, query: Callable[[Connection], T]) -> T:
        if self.writer.file_replaced:
            raise StoreUnavailable
        try:
            return await self._threads.run(query)
        except (DBAPIError, MemoryError, Overloaded) as error:  # Overloaded: no thread can be started
            self._read_failed(describe(error))
            raise StoreUnavailable from error

    def _read_failed(self, why: str) -> None:
        """Log a failure, unless it was logged lately, and probe until reading works again. No read is refused."""
        if not self.writer.file_replaced:
            self._reading.failed(why, asyncio.get_running_loop().time())

    async def _probe(self) -> str | None:
        return self.reader.problem()

    def _watch(self) -> None:
        """Check now and then that the file is still the one at its path, and read the clock row.

        If the file was replaced, writes would be acknowledged and lost: nothing is read or written any more.
        """
        self._watch_later()  # first: an error must not end the watch
        self._check_files()
        if not self.writer.file_replaced:
            with suppress(StoreUnavailable):
                self.reader.read_clock()
            self.writer.refresh_write_lock()

    def _watch_later(self) -> None:
        self._watcher = asyncio.get_running_loop().call_later(WATCH_INTERVAL, self._watch)

    def _check_files(self) -> None:
        replaced = None if self.writer.file_replaced else self.reader.replaced()
        if replaced is not None:
            self._log_loss(replaced)
            self.writer.file_replaced = True
            self.reader.close()

    def _log_loss(self, file: str) -> None:
        _, action = files.explain_loss(self._path)
        log.error("store_file_replaced", file=file, action=action)

    async def _check_wal(self) -> None:
        works = True
        while True:
            await asyncio.sleep(CHECKPOINT_INTERVAL if works else _RECHECK)
            try:
                works = await self.writer.check_wal()
            except RetryLater:
                pass
            except Exception as error:
                log.error("unexpected_error", at=safe_traceback(error))
