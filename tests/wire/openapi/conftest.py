"""Fixtures: a server with all dialects, and its document. Each test starts a day later than the one before."""

import httpx
import pytest

from tests.support.servers import HandClock, Server
from tests.wire.openapi.checked_client import CheckedClient
from tests.wire.openapi.configurations import ALL_DIALECTS, with_dialects
from tests.wire.openapi.conformance import Documented


@pytest.fixture(scope="module")
def settings() -> str:
    """Serve all dialects, one of them with a token, and delay logins after the first failure."""
    closed = '[dialects.token-pool]\npool = "restricted"\nprefix = "/pool"\nrequire_token = true\n'
    others = {name: prefix for name, prefix in ALL_DIALECTS.items() if name != "token_pool"}
    return f"[throttle]\nfree = 1\n{with_dialects(**others)}\n{closed}"


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all tokens and failure counters, so that tests are independent."""
    clock.advance(25 * 3600)


@pytest.fixture(scope="module")
def documented(server: Server) -> Documented:
    """Read the document of the running server."""
    with server.client() as client:
        return Documented(client.get("/openapi.json").json())


@pytest.fixture
def api(client: httpx.Client, documented: Documented) -> CheckedClient:
    return CheckedClient(client, documented)
