"""The configurations without a login page: for programs only."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import Server, log_in, worker, write_config
from tests.system.proxies.running import PRODUCTS, documented, running
from tests.system.proxies.test_cookies import with_cookie

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run an issuer without [browser]."""
    with worker(write_config(tmp_path_factory.mktemp("programs"))) as issuer:
        yield issuer


@pytest.fixture(scope="module")
def bob(server: Server) -> str:
    with server.client() as client:
        return log_in(client, "bob", "bob-secret")


@pytest.mark.parametrize("name", PRODUCTS)
def test_programs_need_no_login_page(name: str, tmp_path: Path, server: Server, bob: str) -> None:
    files = {path: re.sub(r"/auth\?cookie(&login=redirect)?&?", "/auth?", text) for path, text in documented().items()}
    with running(name, tmp_path / name, server.port, files) as proxy:
        assert proxy.ask("/", headers=[with_cookie(bob)])[0].status == 401
        reply, arrived = proxy.ask("/reports/x", bob)
        assert (reply.status, arrived) == (403, [])
        reply, [request] = proxy.ask("/?x=y", bob, headers=[("Accept", "text/html")], method="POST")
        assert (reply.status, request.values("X-Auth-User")) == (200, [b"bob"])
        reply, arrived = proxy.ask("/", headers=[("Accept", "text/html"), ("Sec-Fetch-Mode", "navigate")])
        assert (reply.status, arrived) == (401, [])


@pytest.mark.parametrize("name", PRODUCTS)
def test_forgotten_words_let_no_one_in(name: str, tmp_path: Path, server: Server, bob: str) -> None:
    with running(name, tmp_path / name, server.port) as proxy:
        for tokens, status in ((["x" * 64], 401), ([bob], 403)):
            reply, arrived = proxy.ask("/", *tokens)
            assert (reply.status, arrived) == (status, [])
