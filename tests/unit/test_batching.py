"""Batches of changes: which of them share a commit."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from tokenauth.stores.batching import Batch, Writer
from tokenauth.stores.changes.clock import SaveTime
from tokenauth.stores.sqlite.transaction import SqliteTransaction


class Commits:
    """A writer, and the sizes of its batches."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.sizes: list[int] = []
        self._writer = Writer(self._commit, gather=60)  # a slow machine does not end the wait, only idle iterations do
        self._transaction = SqliteTransaction(database)

    async def _commit(self, batch: Batch) -> None:
        self.sizes.append(batch.size)
        batch.make(self._transaction)
        await asyncio.sleep(0)

    async def change(self, times: int, pause: int = 0) -> None:
        """Make changes one after the other; `pause` iterations of the event loop before each."""
        for _ in range(times):
            for _ in range(pause):
                await asyncio.sleep(0)
            await self._writer.apply(SaveTime())


@pytest.fixture
def commits() -> Iterator[Commits]:
    with closing(sqlite3.connect(":memory:")) as database:
        yield Commits(database)


async def test_a_client_that_is_first_waits_for_the_others(commits: Commits) -> None:
    """They were answered together, and one of them is sooner with its next change."""
    await asyncio.gather(commits.change(10), *(commits.change(10, pause=3) for _ in range(7)))
    assert commits.sizes == [1, *[8] * 9, 7]


async def test_clients_that_have_gone_are_not_awaited(commits: Commits) -> None:
    await asyncio.gather(*(commits.change(1) for _ in range(8)))
    await asyncio.wait_for(commits.change(2), 5)
    assert commits.sizes == [8, 1, 1]
