"""Look-ups on the event loop share a snapshot, which must be no older than the request."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tokenauth.models import Token
from tokenauth.stores.changes.tokens import Issue
from tokenauth.stores.engine import ignore_clock
from tokenauth.stores.sqlite.engine import SqliteEngine

DIGEST = b"d" * 32


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[SqliteEngine]:
    """Return an engine whose file has one token."""
    engine = SqliteEngine(
        make_url(f"sqlite+aiosqlite:///{tmp_path / 'tokens.db'}"), time.time, serving=True, served=None
    )
    await engine.start(ignore_clock)
    await engine.apply(Issue(Token.new(DIGEST, "ann", "c", 1.0, 9), 0, now=1.0))
    yield engine
    await engine.stop(1.0)


def revoke(engine: SqliteEngine) -> None:
    """Revoke the token, as another process does."""
    with closing(sqlite3.connect(engine.writer.path)) as other, other:
        other.execute("INSERT INTO revocations (digest, at) VALUES (?, 1)", (DIGEST,))
        other.execute("DELETE FROM tokens")


async def test_the_next_iteration_reads_a_new_snapshot(engine: SqliteEngine) -> None:
    assert engine.reader.token(DIGEST) is not None
    revoke(engine)
    assert engine.reader.token(DIGEST) is not None, "must be read in the same snapshot, or this test shows nothing"
    await asyncio.sleep(0)
    assert engine.reader.token(DIGEST) is None


async def test_revocations_are_read_outside_of_a_snapshot(engine: SqliteEngine) -> None:
    assert engine.reader.token(DIGEST) is not None
    revoke(engine)
    assert engine.reader.drain() == [DIGEST]
    assert engine.reader.token(DIGEST) is None


async def test_a_snapshot_does_not_outlive_its_connection(engine: SqliteEngine) -> None:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    assert engine.reader.token(DIGEST) is not None
    engine.reader.close()
    await asyncio.sleep(0)
    assert problems == []
