"""What most tests need: a configuration, a clock, and workers."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.postgres import database, postgres  # noqa: F401 - fixtures, for every test
from tests.servers import HandClock, Server, worker, write_config


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, as uvicorn does."""
    return "asyncio"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory for one module's servers."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def clock(directory: Path) -> HandClock:
    """Keep one module's time, moved by hand."""
    return HandClock(directory / "clock", create=True)


@pytest.fixture(scope="module")
def settings() -> str:
    """Tables that a module's configuration has beside the users; a module overrides this."""
    return ""


@pytest.fixture(scope="module")
def config_file(directory: Path, settings: str) -> Path:
    """Write one module's configuration."""
    return write_config(directory, settings)


@pytest.fixture(scope="module")
def server(config_file: Path, clock: HandClock) -> Iterator[Server]:
    """Run a worker."""
    with worker(config_file, clock) as running:
        yield running


@pytest.fixture(scope="module")
def sibling(config_file: Path, clock: HandClock, server: Server) -> Iterator[Server]:
    """Run another worker on the same database."""
    with worker(config_file, clock) as running:
        yield running


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
