"""What most tests of PostgreSQL's store need: a database of their own, opened by several machines."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.postgres import Cluster
from tests.system.postgres.nodes import Nodes, fresh, nodes


@pytest.fixture
def url(postgres: Cluster) -> Iterator[str]:
    """Make a database that has the schema."""
    with fresh(postgres) as made:
        yield made


@pytest.fixture
async def three(url: str) -> AsyncIterator[Nodes]:
    """Open it three times."""
    async with nodes(url, 3) as opened:
        yield opened
