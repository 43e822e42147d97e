"""One issuer and five proxies for all tests of this package. Each is started when a test first uses it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.servers import USERS, Server, log_in, worker, write_config
from tests.system.proxies.running import PRODUCTS, Proxy, running

Start = Callable[[str], Proxy]

SETTINGS = """
[tokens]
per_user = 0
[server]
trusted_proxies = ["127.0.0.1"]
[browser]
url = "https://auth.example.com"
domain = "example.com"
return_to = ["https://app.example.com"]
"""
"""As docs/browser-login.md shows them."""


FIRST, *OTHERS = PRODUCTS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run behind the other proxies than FIRST with the first parameters only, and in `make faults` with all."""
    begun = set[tuple[str, str]]()
    for item in items:
        if not item.nodeid.startswith("tests/system/proxies/") or not isinstance(item, pytest.Function):
            continue
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for name in OTHERS:
            if name in parameters and not any(item.iter_markers("faults")):
                test = (item.nodeid.partition("[")[0], name)
                if test in begun:
                    item.add_marker(pytest.mark.faults)
                begun.add(test)


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proxies")


@pytest.fixture(scope="package")
def server(directory: Path) -> Iterator[Server]:
    """Run an issuer. ann has the scope that /reports needs, bob has no scope."""
    users = USERS.replace('["read", "write"]', '["reports", "read"]')
    with worker(write_config(directory, SETTINGS, users)) as issuer:
        yield issuer


@pytest.fixture(scope="package")
def start(directory: Path, server: Server) -> Iterator[Start]:
    """Return a function that starts a proxy by its name, or returns the running one."""
    started: dict[str, Proxy] = {}
    with ExitStack() as stack:

        def get(name: str) -> Proxy:
            if name not in started:
                started[name] = stack.enter_context(running(name, directory / name, server.port))
            return started[name]

        yield get


@pytest.fixture(params=PRODUCTS)
def proxy(request: pytest.FixtureRequest, start: Start) -> Proxy:
    """Return each of the five proxies, without the earlier requests to the issuer."""
    found = start(request.param)
    found.relay.take()
    return found


@pytest.fixture(scope="package")
def ann(server: Server) -> str:
    """Return a token of ann, with the scope for /reports."""
    with server.client() as client:
        return log_in(client, "ann", "ann-secret")


@pytest.fixture(scope="package")
def bob(server: Server) -> str:
    """Return a token of bob, without scopes."""
    with server.client() as client:
        return log_in(client, "bob", "bob-secret")
