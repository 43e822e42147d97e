"""Fixtures: two workers that serve all dialects and receive requests in turn. Each test starts a day later."""

import itertools
import json
import math
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import httpx
import pytest

from tests.support import journal
from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock, Server, write_config

API_PASSWORD = "open-sesame"

ALL_FOUR = f"""
[pools.permits]
capacity = 3
lease_ttl = 30
prefill = true

[pools.uuids]
token_ttl = 300
lease_ttl = 60

[pools.bounded]
capacity = 100
token_ttl = 300
lease_ttl = 60

[pools.owned]
capacity = 100
token_ttl = 300
lease_ttl = 60

[dialects.simple-token-implement]
pool = "permits"
prefix = "/simple-token-implement"
password = "{API_PASSWORD}"

[dialects.token-pool]
pool = "uuids"
prefix = "/token-pool"

[dialects.random-token-generator]
pool = "bounded"
prefix = "/random-token-generator"

[dialects.token-management-service]
pool = "owned"
prefix = "/token-management-service"
"""

THREADS = 16

FILLED_AT_ONCE = 5000
"""Rows of a transaction past the workers: they do not wait long for its lock."""


class Reply(NamedTuple):
    """A response: its status and its exact body."""

    status: int
    body: str

    @property
    def document(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


def reply(status: int, document: object) -> Reply:
    """Return the expected response. The order of the keys matters."""
    return Reply(status, json.dumps(document, separators=(",", ":"), ensure_ascii=False))


class Wire:
    """Sends requests to the workers of one database in turn."""

    def __init__(self, clients: Iterable[httpx.Client], prefix: str = "", **headers: str) -> None:
        self._turns = itertools.cycle(clients)
        self._prefix = prefix
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def send(self, method: str, path: str, document: object = None, **options: Any) -> httpx.Response:
        """Send a request, with a JSON document as its body if there is one."""
        if document is not None:
            options["json"] = document
        headers = {**self._headers, **options.pop("headers", {})}
        answer = next(self._turns).request(method, self._prefix + path, headers=headers, **options)
        assert answer.headers["cache-control"] == "no-store", "no response may be cached"
        return answer

    def ask(self, method: str, path: str, document: object = None, **options: Any) -> Reply:
        """Send a request and check that the response is JSON."""
        answer = self.send(method, path, document, **options)
        assert answer.headers["content-type"] == "application/json"
        return Reply(answer.status_code, answer.text)

    def post(self, path: str, document: object = None, **options: Any) -> Reply:
        return self.ask("POST", path, document, **options)


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dialects")


@pytest.fixture(scope="package")
def clock(home: Path) -> HandClock:
    """Return the clock of both workers."""
    return HandClock(home / "clock", create=True)


@pytest.fixture(scope="package")
def config_file(home: Path) -> Path:
    """Configure all dialects, each with its own pool and prefix."""
    return write_config(home, ALL_FOUR)


@pytest.fixture(scope="package")
def workers(config_file: Path, clock: HandClock) -> Iterator[Sequence[Server]]:
    """Run two workers for all modules. The day that passes before each test keeps tests apart."""
    with ExitStack() as stack:
        yield start(stack, config_file, clock)


@pytest.fixture(scope="package")
def server(workers: Sequence[Server]) -> Server:
    """Return one worker."""
    return workers[0]


@pytest.fixture(scope="package")
def sibling(workers: Sequence[Server]) -> Server:
    """Return the other worker, on the same database."""
    return workers[1]


@pytest.fixture(scope="package")
def clients(server: Server, sibling: Server) -> Iterator[Sequence[httpx.Client]]:
    with ExitStack() as stack:
        yield connect(stack, (server, sibling))


@pytest.fixture(scope="package")
def ports(server: Server, sibling: Server) -> Sequence[int]:
    """Return the ports of both workers."""
    return server.port, sibling.port


def advance_a_day(clock: HandClock) -> None:
    """Let all tokens and leases expire, and failed logins be forgotten."""
    clock.set(math.ceil(clock()) + 25 * 3600)


@pytest.fixture(autouse=True)
def _next_day(workers: Sequence[Server], clock: HandClock, config_file: Path) -> None:
    """Start each test on another day, with no row that the sweeper could delete."""
    advance_a_day(clock)
    execute(config_file, "DELETE FROM pool_tokens WHERE pool <> 'permits'")


@pytest.fixture
def at(clock: HandClock) -> Callable[[float], None]:
    """Return a function that sets the time to a number of seconds after the start of the test."""
    start = clock()
    return lambda seconds: clock.set(start + seconds)


def start(stack: ExitStack, config: Path, clock: HandClock) -> Sequence[Server]:
    """Start two workers on one database at the same time. `stack` stops them."""
    return stack.enter_context(journal.workers(config, clock, 2))


def connect(stack: ExitStack, servers: Iterable[Server]) -> Sequence[httpx.Client]:
    """Connect to servers. `stack` closes the connections."""
    return [stack.enter_context(server.client()) for server in servers]


def execute(config: Path, statement: str, *values: object) -> list[Any]:
    """Execute a statement in the database, past the workers."""
    with closing(sqlite3.connect(config.with_name("tokenauth.db"), timeout=60)) as db, db:
        return db.execute(statement, values).fetchall()


def rows(config: Path, pool: str) -> list[Any]:
    """Return the rows of a pool."""
    return execute(config, "SELECT * FROM pool_tokens WHERE pool = ? ORDER BY number", pool)


def fill(config: Path, pool: str, count: int, now: float) -> list[str]:
    """Put free tokens into a pool, regardless of its capacity, and return them."""
    values = [f"{secrets.token_hex(8)}-{number}" for number in range(count)]
    with closing(sqlite3.connect(config.with_name("tokenauth.db"), timeout=60)) as db:
        for start in range(0, count, FILLED_AT_ONCE):
            lines = ((pool, value, now) for value in values[start : start + FILLED_AT_ONCE])
            with db:
                db.executemany(
                    "INSERT INTO pool_tokens (pool, value, free_at, fence, retired) VALUES (?, ?, ?, 0, 0)", lines
                )
    return values


def at_once(ports: Sequence[int], count: int, send: Callable[[Connection, int], Answer]) -> list[Answer]:
    """Send `count` requests at once with many clients to several workers. `send` gets the number of its request."""
    together = Barrier(THREADS)

    def send_share(number: int) -> list[Answer]:
        with Connection(ports[number % len(ports)]) as connection:
            together.wait()
            return [send(connection, which) for which in range(number, count, THREADS)]

    with ThreadPoolExecutor(THREADS) as threads:
        return list(itertools.chain.from_iterable(threads.map(send_share, range(THREADS))))
