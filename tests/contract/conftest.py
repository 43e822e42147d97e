"""The stores that the contract suite runs on. One more store is one more line in STORES."""

import asyncio
import shutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.servers import START
from tokenauth.models import Instant, Token
from tokenauth.stores.base import FailureStore, PoolStore, Store, TokenStore
from tokenauth.stores.cached import CachedTokenStore
from tokenauth.stores.open import open_store
from tokenauth.stores.sql import SqlFailureStore, SqlPoolStore, SqlTokenStore
from tokenauth.stores.sqlite import SqliteStore, SqliteTokenStore


@dataclass(frozen=True)
class Place:
    """A store as one process has it open; two places on one directory are two processes."""

    store: Store
    tokens: TokenStore
    pools: PoolStore
    failures: FailureStore
    started: Instant
    commits: Callable[[], int]
    rounds: int = 25
    """How often to try what a cache could get wrong."""


async def cached_sqlite(directory: Path, size: int) -> Place:
    """Open what `serve` runs."""
    file = directory / "tokens.db"
    store = open_store(f"sqlite+aiosqlite:///{file}", size)
    started = await store.start()
    return Place(store, store.tokens, store.pools, store.failures, started, lambda: wal_commits(file), rounds=300)


async def plain_sqlite(directory: Path, size: int) -> Place:
    """Open what the cache stands on."""
    place = await cached_sqlite(directory, size)
    assert isinstance(place.store, SqliteStore)
    return replace(place, tokens=SqliteTokenStore(place.store._database, place.store._reader), rounds=25)


async def generic_sql(directory: Path, size: int) -> Place:
    """Open what any database gets that SQLAlchemy speaks to."""
    place = await cached_sqlite(directory, size)
    assert isinstance(place.store, SqliteStore)
    database = place.store._database
    tokens, pools, failures = SqlTokenStore(database), SqlPoolStore(database), SqlFailureStore(database)
    return replace(place, tokens=tokens, pools=pools, failures=failures, rounds=25)


async def cached_sql(directory: Path, size: int) -> Place:
    """Open a cache over look-ups that wait, so that other things happen in the middle of them."""
    place = await generic_sql(directory, size)
    assert isinstance(place.store, SqliteStore)
    return replace(place, tokens=CachedTokenStore(place.tokens, place.store._reader, size), rounds=100)


Opener = Callable[[Path, int], Awaitable[Place]]

STORES: dict[str, Opener] = {
    "plain-sqlite": plain_sqlite,
    "generic-sql": generic_sql,
    "cached-sqlite": cached_sqlite,
}

RACING: dict[str, Opener] = {**STORES, "cached-sql": cached_sql}
"""The same for tests of what goes on at once: this cache is over look-ups that take their time."""


def wal_commits(file: Path) -> int:
    """Count the commits in SQLite's log of writes (https://sqlite.org/fileformat2.html#the_write_ahead_log)."""
    log = Path(f"{file}-wal").read_bytes()
    page_size = struct.unpack_from(">I", log, 8)[0] if log else 1
    frames = range(32, len(log), 24 + page_size)
    return sum(log[at + 8 : at + 16] == log[16:24] and log[at + 4 : at + 8] != bytes(4) for at in frames)


def token(number: int = 1, username: str = "ann", age: float = 0, life: int = 100, **more: Any) -> Token:
    """Make a token issued `age` seconds before START that lives until `life` seconds after START."""
    digest = sha256(b"%d" % number).digest()
    return Token(digest, username, "0123456789abcdef", START - age, int(START) + life, **more)


class Places:
    """Opens a store as often as a test likes, and closes what the test leaves open."""

    def __init__(self, opener: Opener, directory: Path) -> None:
        self.directory = directory
        self._opener = opener
        self._open: list[Place] = []

    async def open(self, size: int = 1000) -> Place:
        """Open the store once more, as one more process would."""
        place = await self._opener(self.directory, size)
        self._open.append(place)
        return place

    async def close(self, place: Place, now: Instant = 0) -> None:
        """Stop one."""
        self._open.remove(place)
        await place.store.stop(now)

    async def close_all(self) -> None:
        """Stop all."""
        while self._open:
            await self.close(self._open[-1])


async def build(opener: Opener, directory: Path) -> None:
    """Build an empty store."""
    places = Places(opener, directory)
    await places.open()
    await places.close_all()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[Opener, Path]:
    """Build the empty databases once: a migration costs more than most tests."""
    made: dict[Opener, Path] = {}
    for name, opener in RACING.items():
        made[opener] = tmp_path_factory.mktemp(name)
        asyncio.run(build(opener, made[opener]))
    return made


@pytest.fixture(params=STORES)
async def places(request: pytest.FixtureRequest, template: dict[Opener, Path], tmp_path: Path) -> AsyncIterator[Places]:
    """Open stores on one empty database."""
    opener = RACING[request.param]
    opened = Places(opener, Path(shutil.copytree(template[opener], tmp_path / "store")))
    yield opened
    await opened.close_all()


@pytest.fixture
async def place(places: Places) -> Place:
    """Open the store once."""
    return await places.open()


@pytest.fixture
async def other(places: Places, place: Place) -> Place:
    """Open the store a second time, as another process has it."""
    return await places.open()


@pytest.fixture
def tokens(place: Place) -> TokenStore:
    """Take the tokens of the first store."""
    return place.tokens


@pytest.fixture
def pools(place: Place) -> PoolStore:
    """Take the pools of the first store."""
    return place.pools


@pytest.fixture
def failures(place: Place) -> FailureStore:
    """Take the failed logins of the first store."""
    return place.failures
