"""A server with all dialects, its document, and a day that passes before each test."""

import httpx
import pytest

from tests.support.servers import HandClock, Server
from tests.wire.openapi.asking import Asker
from tests.wire.openapi.configurations import APART, speaking
from tests.wire.openapi.conformance import Documented


@pytest.fixture(scope="module")
def settings() -> str:
    """Serve all dialects, one of them with a token, and delay logins after the first failure."""
    closed = '[dialects.token-pool]\npool = "restricted"\nprefix = "/pool"\nrequire_token = true\n'
    others = {name: prefix for name, prefix in APART.items() if name != "token_pool"}
    return f"[throttle]\nfree = 1\n{speaking(**others)}\n{closed}"


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Let every token expire and every failed login be forgotten, so that tests do not meet."""
    clock.advance(25 * 3600)


@pytest.fixture(scope="module")
def documented(server: Server) -> Documented:
    """Read the document of the running server."""
    with server.client() as client:
        return Documented(client.get("/openapi.json").json())


@pytest.fixture
def asker(client: httpx.Client, documented: Documented) -> Asker:
    """Ask the running server."""
    return Asker(client, documented)
