"""SQLite's long reads in threads: what is left of them after a stop."""

import asyncio
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection

from tokenauth.stores.sqlite.reader_threads import ReaderThreads


async def test_a_read_that_outlives_a_stop_closes_its_file(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "tokens.db")):
        reader = ReaderThreads(str(tmp_path / "tokens.db"))
    going_on, opened = threading.Event(), asyncio.Event()
    loop, used = asyncio.get_running_loop(), []

    def query(db: Connection) -> None:
        used.append((threading.current_thread(), db.connection.dbapi_connection))
        loop.call_soon_threadsafe(opened.set)
        going_on.wait(60)

    caller = asyncio.create_task(reader.run(query))
    await opened.wait()
    caller.cancel()
    reader.close()
    going_on.set()
    [(thread, connection)] = used
    thread.join(60)
    assert isinstance(connection, sqlite3.Connection)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
