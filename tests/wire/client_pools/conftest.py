"""A worker with pools, a user at its desk who sees everything, and clients of both kinds."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.connections import Connection
from tests.support.lending import Borrower
from tests.support.servers import HandClock, Server, log_in
from tests.wire.client_pools.clients import KINDS, Client, Connect, Watch, connecting
from tests.wire.client_pools.lines import Line

TTL = 9
"""For so many seconds the tokens here are lent."""

MANY = 4
"""So many permits are there in the larger pool."""


@pytest.fixture(scope="module")
def settings() -> str:
    """Write the pools down."""
    return f"""
        [pools]
        permit = {{capacity = 1, prefill = true, lease_ttl = {TTL}}}
        permits = {{capacity = {MANY}, prefill = true, lease_ttl = {TTL}}}
        long = {{capacity = 1, prefill = true, lease_ttl = 30}}
        guarded = {{capacity = 1, prefill = true, scope = "write"}}
    """


@pytest.fixture(scope="module")
def login(server: Server) -> dict[str, str]:
    """Log in; return what clients send."""
    with server.client() as http:
        return {"X-Token": log_in(http)}


@pytest.fixture
def desk(server: Server) -> Iterator[Borrower]:
    """Log in, to see what the server knows, and to interfere."""
    with Connection(server.port) as connection:
        yield Borrower(connection)


@pytest.fixture(autouse=True)
def _later(clock: HandClock) -> None:
    """Let all leases lapse, so that tests do not meet."""
    clock.advance(10 * TTL)


@pytest.fixture
def line(server: Server) -> Iterator[Line]:
    """Lay a line to the worker."""
    line = Line(server.port)
    yield line
    line.close()


@pytest.fixture
def watch() -> Watch:
    """Start the clients' clock."""
    return Watch()


@pytest.fixture
def pass_time(clock: HandClock, watch: Watch) -> Callable[[float], None]:
    """Move the clocks of server and clients alike."""

    def pass_time(seconds: float) -> None:
        clock.advance(seconds)
        watch.advance(seconds)

    return pass_time


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Make clients of one kind."""
    with connecting(request.param) as connect:
        yield connect


@pytest.fixture
def client(connect: Connect, login: dict[str, str], line: Line, watch: Watch) -> Client:
    """Connect over the line."""
    return connect(line.url, headers=login, monotonic=watch, timeout=60)
