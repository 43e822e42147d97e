"""Stores on one PostgreSQL database, as several machines would open it, and direct access to the database."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg

from tests.support.postgres import Cluster
from tests.support.servers import START, write_config
from tokenauth.clock import Clock
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.store import Store

Nodes = Sequence[Store]

_names = (f"node_{number}" for number in count())
_TEMPLATE = "node_template"


def fixed_time() -> float:
    """Return the time of tests in which time does not matter."""
    return START


@contextmanager
def fresh(cluster: Cluster) -> Iterator[str]:
    """Create a database with the schema only; return its URL. A copy costs less than a migration."""
    if (_TEMPLATE,) not in cluster.execute("SELECT datname FROM pg_database"):
        cluster.create(_TEMPLATE)
        asyncio.run(_migrate(cluster.url(_TEMPLATE)))
    name = next(_names)
    yield cluster.create(name, _TEMPLATE)
    cluster.drop(name)


def write_config_for(url: str, directory: Path, more: str = "") -> Path:
    """Write a configuration with the URL of a database."""
    config = write_config(directory, more)
    config.write_text(re.sub("^url = .*", f'url = "{url}"', config.read_text(), count=1, flags=re.MULTILINE))
    return config


async def _migrate(url: str) -> None:
    async with nodes(url):
        pass


@asynccontextmanager
async def nodes(
    url: str, number: int = 1, clock: Clock | None = fixed_time, connections: int = 4
) -> AsyncIterator[Nodes]:
    """Open a database several times. With `clock=None` the time is the database's."""
    opened: list[Store] = []
    try:
        for _ in range(number):
            store = open_store(DatabaseSettings(url, connections=connections), 1000, clock)
            await store.start()
            opened.append(store)
        yield opened
    finally:
        for store in opened:
            await store.stop(0)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Connect to the database without tokenauth."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        yield connection
    finally:
        await connection.close(timeout=10)


async def fetch(url: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    async with connected(url) as connection:
        return [tuple(row) for row in await connection.fetch(sql, *values)]


@asynccontextmanager
async def busy(*work: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Repeat each piece of work in a task. Raises its errors."""
    over = False

    async def repeat(one: Callable[[], Awaitable[object]]) -> None:
        while not over:
            await one()

    async with asyncio.TaskGroup() as group:
        for one in work:
            group.create_task(repeat(one))
        try:
            yield
        finally:
            over = True
