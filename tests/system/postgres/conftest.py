"""An empty database for each test of PostgreSQL's store, opened by several nodes."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.postgres import Cluster
from tests.system.postgres.nodes import Nodes, fresh, nodes


@pytest.fixture
def url(postgres: Cluster) -> Iterator[str]:
    """Create a database with the schema, and yield its URL."""
    with fresh(postgres) as made:
        yield made


@pytest.fixture
async def three(url: str) -> AsyncIterator[Nodes]:
    """Open the database three times."""
    async with nodes(url, 3) as opened:
        yield opened
