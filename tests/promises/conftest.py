"""Connections to two workers of one database."""

from collections.abc import Iterator

import pytest

from tests.support.connections import Connection
from tests.support.servers import Server


@pytest.fixture
def here(server: Server) -> Iterator[Connection]:
    """Connect to one worker."""
    with Connection(server.port) as connection:
        yield connection


@pytest.fixture
def there(sibling: Server) -> Iterator[Connection]:
    """Connect to another."""
    with Connection(sibling.port) as connection:
        yield connection
