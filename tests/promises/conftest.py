"""Connections to two workers of one database."""

from collections.abc import Iterator

import pytest

from tests.support.connections import Connection
from tests.support.servers import Server


@pytest.fixture
def here(server: Server) -> Iterator[Connection]:
    with Connection(server.port) as connection:
        yield connection


@pytest.fixture
def there(sibling: Server) -> Iterator[Connection]:
    with Connection(sibling.port) as connection:
        yield connection
