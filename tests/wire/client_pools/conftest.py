"""Fixtures: a worker with pools, an administrator, and clients of both kinds."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.connections import Connection
from tests.support.pool_users import PoolUser
from tests.support.servers import HandClock, Server, log_in
from tests.wire.client_pools.clients import KINDS, Client, Connect, Watch, connecting
from tests.wire.client_pools.proxy import Proxy
from tokenauth.client import lease

TTL = 9
"""Seconds that a lease lasts."""

MANY = 4
"""Number of permits in the larger pool."""


@pytest.fixture(scope="module")
def settings() -> str:
    return f"""
        [pools]
        permit = {{capacity = 1, prefill = true, lease_ttl = {TTL}}}
        permits = {{capacity = {MANY}, prefill = true, lease_ttl = {TTL}}}
        capped = {{capacity = 1, prefill = true, lease_ttl = {TTL}, lease_max = {2 * TTL}}}
        phones.members = [
            {{name = "pixel-8", labels = ["android", "arm"]}},
            {{name = "iphone-15", labels = ["ios", "arm"]}},
        ]
        each = {{capacity = 2, prefill = true, lease_ttl = {TTL}, per_user = 1}}
        long = {{capacity = 1, prefill = true, lease_ttl = 30}}
        guarded = {{capacity = 1, prefill = true, scope = "write"}}
    """


@pytest.fixture(scope="module")
def login(server: Server) -> dict[str, str]:
    """Log in. Return the headers that clients send."""
    with server.client() as http:
        return {"X-Token": log_in(http)}


@pytest.fixture
def admin(server: Server) -> Iterator[PoolUser]:
    """Log in as the administrator."""
    with Connection(server.port) as connection:
        yield PoolUser(connection)


@pytest.fixture(autouse=True)
def _later(clock: HandClock) -> None:
    """Let all leases lapse, so that tests are independent."""
    clock.advance(10 * TTL)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients ask again after a twentieth of their pauses, which only spare the server."""
    monkeypatch.setattr(lease, "_random", lambda seconds, pause=lease._random: pause(seconds / 20))


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """Return a proxy in front of the worker."""
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def watch() -> Watch:
    """Return the clock of the clients."""
    return Watch()


@pytest.fixture
def pass_time(clock: HandClock, watch: Watch) -> Callable[[float], None]:
    """Return what moves the clocks of server and clients."""

    def pass_time(seconds: float) -> None:
        clock.advance(seconds)
        watch.advance(seconds)

    return pass_time


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with connecting(request.param) as connect:
        yield connect


@pytest.fixture
def client(connect: Connect, login: dict[str, str], proxy: Proxy, watch: Watch) -> Client:
    """Return a client that is connected through the proxy."""
    return connect(proxy.url, headers=login, monotonic=watch, timeout=60)
