"""The stores that the contract suite runs on. To test another store, add it to STORES."""

import asyncio
import shutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.support.patience import be_patient
from tests.support.postgres import Cluster
from tests.support.servers import START
from tokenauth.models import Instant, Token
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.cache import TokenCache
from tokenauth.stores.engine import Engine
from tokenauth.stores.open import open_store
from tokenauth.stores.store import FailureStore, PoolStore, Store, TokenStore
from tokenauth.stores.tables import metadata

T = TypeVar("T")

SCRIPTS = settings(phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
"""For tests of a model with random scripts, each of which takes long. A failing one is not made shorter."""

ENGINE_TESTS = {
    *("test_store", "test_tokens", "test_removals", "test_leases", "test_leases_at_once", "test_capacity"),
    *("test_failures", "test_outages", "test_pool_cost", "test_sliding", "test_fingerprints"),
}
"""Modules that test what the engines do differently: locks, conflicts, commits, the feed, plans and failures."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave PostgreSQL to `make faults` where both engines make the same changes, and all but the first parameters."""
    begun = set[str]()
    for item in items:
        if not item.nodeid.startswith("tests/contract/") or not isinstance(item, pytest.Function):
            continue
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "postgres" in parameters and not any(item.iter_markers("faults")):
            test = item.nodeid.partition("[")[0]
            if item.path.stem not in ENGINE_TESTS or (test in begun and item.path.stem != "test_outages"):
                item.add_marker(pytest.mark.faults)
            begun.add(test)


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a busy machine, except where the timeouts are tested."""
    if request.path.stem != "test_outages":
        be_patient(monkeypatch)


@dataclass(frozen=True)
class Place:
    """A store as one process has it open; two places on one directory are two processes."""

    store: Store
    tokens: TokenStore
    pools: PoolStore
    failures: FailureStore
    started: Instant
    clock_advances: list[Instant]
    clock_advances_at_start: list[Instant]
    url: str
    commits: Callable[[], int]
    behind: float = 0
    """Seconds that the clock row may lag at a start, if the database has a trusted clock of its own."""

    @property
    def engine(self) -> Engine:
        """The engine of the store."""
        return self.store.engine

    def tokens_of(self, cache: TokenCache) -> TokenStore:
        """Return the same tokens behind another cache."""
        return type(self.tokens)(self.engine, cache)


async def sqlite(directory: Path, size: int) -> Place:
    """Open a SQLite store."""
    file = directory / "tokens.db"
    url = f"sqlite+aiosqlite:///{file}"
    store = open_store(DatabaseSettings(url), size)
    advances: list[Instant] = []
    started = await store.start(advances.append)
    parts = (store, store.tokens, store.pools, store.failures)
    times = (started, advances, list(advances))
    return Place(*parts, *times, url, lambda: wal_commits(file))


class Attentive(TokenStore):
    """The tokens of a process that reads all revocations before it answers: PostgreSQL's notifications take time."""

    async def get(self, digest: bytes) -> Token | None:
        """Wait until the feed is current, then return the token with this digest."""
        feed = self._engine.feed
        feed.invalidate()
        while not feed.is_current():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.0005)
        return await super().get(digest)


async def postgres(directory: Path, size: int) -> Place:
    """Open a PostgreSQL store."""
    url = (directory / "url").read_text()
    store = open_store(DatabaseSettings(url, connections=4), size, clock=lambda: START)
    advances: list[Instant] = []
    started = await store.start(advances.append)
    tokens = Attentive(store.engine, TokenCache(store.engine.token, store.engine.feed, size))
    parts = (store, tokens, store.pools, store.failures)
    times = (started, advances, list(advances))
    return Place(*parts, *times, url, lambda: xids(url), behind=1)


Opener = Callable[[Path, int], Awaitable[Place]]

STORES: dict[str, Opener] = {
    "sqlite": sqlite,
    "postgres": postgres,
}


def fetch(url: str, sql: str) -> list[Any]:
    """Run one statement in a PostgreSQL database."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            return list(await connection.fetch(sql))
        finally:
            await connection.close()

    return apart(run())


def apart(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread with its own event loop: a test may have one that is running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def xids(url: str) -> int:
    """Count the transactions that have written something to a PostgreSQL server."""
    return int(fetch(url, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text")[0][0])


def wal_commits(file: Path) -> int:
    """Count the commits in SQLite's log of writes (https://sqlite.org/fileformat2.html#the_write_ahead_log)."""
    log = Path(f"{file}-wal").read_bytes()
    page_size = struct.unpack_from(">I", log, 8)[0] if log else 1
    frames = range(32, len(log), 24 + page_size)
    return sum(log[at + 8 : at + 16] == log[16:24] and log[at + 4 : at + 8] != bytes(4) for at in frames)


def token(number: int = 1, username: str = "ann", age: float = 0, life: int = 100, **more: Any) -> Token:
    """Make a token issued `age` seconds before START that lives until `life` seconds after START."""
    digest = sha256(b"%d" % number).digest()
    return Token.new(digest, username, "0123456789abcdef", START - age, int(START) + life, **more)


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
        """Stop one place."""
        self._open.remove(place)
        await place.store.stop(now)

    async def close_all(self) -> None:
        """Stop all open places."""
        while self._open:
            await self.close(self._open[-1])


async def build(opener: Opener, directory: Path) -> None:
    """Build an empty store."""
    places = Places(opener, directory)
    await places.open()
    await places.close_all()


class Templates:
    """Makes empty stores. Each is built once, and then copied or emptied: a migration costs more than most tests."""

    def __init__(self, postgres: Callable[[], Cluster], factory: pytest.TempPathFactory) -> None:
        self._postgres = postgres
        self._factory = factory
        self._built: dict[str, Path] = {}
        self._emptier = Emptier()

    def fresh(self, name: str, directory: Path) -> Path:
        """Return an empty store for one of STORES; tests share one PostgreSQL database, one after the other."""
        built = self._built.get(name)
        if built is None:
            built = self._built[name] = self._factory.mktemp(name)
            if name == "postgres":
                (built / "url").write_text(self._postgres().create("contract"))
            apart(build(STORES[name], built))
        if name == "postgres":
            self._emptier.empty((built / "url").read_text())
        return Path(shutil.copytree(built, directory))

    def close(self) -> None:
        self._emptier.close()


class Emptier:
    """Empties a PostgreSQL database over a connection that it keeps: a new one takes longer than the statement."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)  # a test may run a loop in its own thread
        self._runner = asyncio.Runner()
        self._connection: asyncpg.Connection | None = None

    def empty(self, url: str) -> None:
        self._thread.submit(self._runner.run, self._empty(url)).result()

    async def _empty(self, url: str) -> None:
        if self._connection is not None:
            try:
                await self._connection.execute(_EMPTY)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):  # a test has ended all connections
                self._connection.terminate()
            else:
                return
        self._connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        await self._connection.execute(_EMPTY)

    def close(self) -> None:
        if self._connection is not None:
            self._thread.submit(self._runner.run, self._connection.close(timeout=10)).result()
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()


# DELETE takes a tenth of TRUNCATE's time while there are few rows, but leaves dead rows behind.
_EMPTY = f"""
DO $$ BEGIN
    IF (SELECT max(pg_relation_size(oid)) > 65536 FROM pg_class
        WHERE relkind = 'r' AND relname = ANY('{{{", ".join(metadata.tables)}}}')) THEN
        TRUNCATE {", ".join(metadata.tables)} RESTART IDENTITY;
    ELSE
        {" ".join(f"DELETE FROM {table};" for table in metadata.tables)}
        PERFORM setval(seqrelid, 1, false) FROM pg_sequence;
    END IF;
END $$
"""  # noqa: S608 - the tables are our own


@pytest.fixture(scope="session")
def templates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    """Make empty stores; PostgreSQL is started for the first that needs it."""
    made = Templates(lambda: request.getfixturevalue("postgres"), tmp_path_factory)
    yield made
    made.close()


@pytest.fixture(params=STORES)
async def places(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> AsyncIterator[Places]:
    """Open stores on one empty database."""
    opened = Places(STORES[request.param], templates.fresh(request.param, tmp_path / "store"))
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
    """Return the tokens of the first store."""
    return place.tokens


@pytest.fixture
def pools(place: Place) -> PoolStore:
    """Return the pools of the first store."""
    return place.pools


@pytest.fixture
def failures(place: Place) -> FailureStore:
    """Return the failed logins of the first store."""
    return place.failures
