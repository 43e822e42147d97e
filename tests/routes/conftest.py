"""What the tests of all routes share: connections, and a day that passes before each test."""

from collections.abc import Iterator

import httpx
import pytest

from tests.servers import HandClock, Server


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Let every token expire and every failed login be forgotten, so that tests do not meet."""
    clock.advance(25 * 3600)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    """Connect to the worker."""
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def sibling_client(sibling: Server) -> Iterator[httpx.Client]:
    """Connect to the other worker on the same database."""
    with sibling.client() as connected:
        yield connected
