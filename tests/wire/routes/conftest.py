"""Each test of the routes starts a day later than the one before."""

from collections.abc import Iterator

import pytest

from tests.support.connections import Connection
from tests.support.servers import HandClock, Server


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[Connection]:
    with Connection(server.port) as connected:
        yield connected


@pytest.fixture
def ann(connection: Connection) -> str:
    """Log in, and return the token."""
    return connection.log_in("ann", "ann-secret")


@pytest.fixture
def now(clock: HandClock) -> int:
    """Set the clock to a whole second and return it."""
    clock.set(int(clock()) + 1)
    return int(clock())


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all tokens and failure counters, so that tests are independent."""
    clock.advance(25 * 3600)
