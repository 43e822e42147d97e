"""One issuer and five proxies for all tests of this package, each started when a test first asks for it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.servers import USERS, Server, log_in, worker, write_config
from tests.system.proxies.running import PRODUCTS, Proxy, running

Start = Callable[[str], Proxy]


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proxies")


@pytest.fixture(scope="package")
def server(directory: Path) -> Iterator[Server]:
    """Run an issuer, where ann has the scope that /reports needs, and bob has none."""
    users = USERS.replace('["read", "write"]', '["reports", "read"]')
    with worker(write_config(directory, "[tokens]\nper_user = 0", users)) as issuer:
        yield issuer


@pytest.fixture(scope="package")
def start(directory: Path, server: Server) -> Iterator[Start]:
    """Start a proxy by its name, or return the one that runs."""
    started: dict[str, Proxy] = {}
    with ExitStack() as stack:

        def get(name: str) -> Proxy:
            if name not in started:
                started[name] = stack.enter_context(running(name, directory / name, server.port))
            return started[name]

        yield get


@pytest.fixture(params=PRODUCTS)
def proxy(request: pytest.FixtureRequest, start: Start) -> Proxy:
    """Each of the five, with what it has sent to the issuer so far forgotten."""
    found = start(request.param)
    found.line.take()
    return found


@pytest.fixture(scope="package")
def ann(server: Server) -> str:
    """Return a token of ann, who may see the reports."""
    with server.client() as client:
        return log_in(client, "ann", "ann-secret")


@pytest.fixture(scope="package")
def bob(server: Server) -> str:
    """Return a token of bob, who has no scope."""
    with server.client() as client:
        return log_in(client, "bob", "bob-secret")
