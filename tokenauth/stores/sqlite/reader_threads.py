"""Reads in threads, for queries that would keep the event loop waiting."""

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection, QueuePool, create_engine

from tokenauth.errors import StoreUnavailable
from tokenauth.executor import Executor
from tokenauth.stores.sqlite import files

T = TypeVar("T")

_THREADS = 5
"""Threads, each with one connection."""

_WAIT = 2.0
"""Seconds that a query waits for a thread while others use all of them."""

_TIMEOUT = 0.25
"""Seconds that a query waits where even SQLite's readers must: while a crashed process's log is recovered."""


class ReaderThreads:
    """Runs queries in a few threads. SQLAlchemy's asyncio engine would start a thread for each connection, too.

    It would also load 8 MB of modules into each worker, a tenth of the time of a start.
    """

    def __init__(self, path: str) -> None:
        self._engine = create_engine(
            "sqlite://",
            creator=partial(_connect, path),
            poolclass=QueuePool,
            pool_size=_THREADS,
            max_overflow=0,
            hide_parameters=True,
        )
        self._executor: Executor[Callable[[Connection], Any], Any] = Executor(self._query, _THREADS, _THREADS)
        self._free = asyncio.Semaphore(_THREADS)
        self._closed = False

    async def run(self, query: Callable[[Connection], T]) -> T:
        """Run a query and return its result.

        Raises what SQLAlchemy raises, Overloaded if no thread can be started, or StoreUnavailable if none is free.
        """
        try:
            async with asyncio.timeout(_WAIT):
                await self._free.acquire()
        except TimeoutError as error:
            raise StoreUnavailable from error
        try:
            result: T = await self._executor.run(query)
        finally:
            self._free.release()
        return result

    def close(self) -> None:
        """Let the threads end, and close the connections; a query that still runs closes its own."""
        self._closed = True
        self._executor.close()
        self._engine.pool.dispose()

    def _query(self, query: Callable[[Connection], T]) -> T:
        try:
            with self._engine.connect() as db:
                return query(db)
        finally:
            if self._closed:
                self._engine.pool.dispose()


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(files.existing(path), timeout=_TIMEOUT, check_same_thread=False, uri=True)
    connection.execute("PRAGMA query_only = ON").close()
    return connection
