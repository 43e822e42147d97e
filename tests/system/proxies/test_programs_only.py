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


def without_login_page(text: str) -> str:
    """Change the addresses of /auth as the document says."""
    with_scope = re.sub(r"/auth\?cookie(&login=redirect)?&scope", "/auth?scope", text)
    return re.sub(r"/auth\?cookie(&login=redirect)?", "/auth?", with_scope)


def test_nginx_for_programs_needs_only_this_file(tmp_path: Path, server: Server, bob: str) -> None:
    text = documented()["/etc/nginx/conf.d/programs.conf"]
    with running("nginx", tmp_path / "nginx", server.port, {"/etc/nginx/conf.d/app.conf": text}) as proxy:
        for headers in ([], [with_cookie(bob)]):
            reply, arrived = proxy.ask("/", headers=headers)
            assert (reply.status, reply.headers["WWW-Authenticate"], arrived) == (401, 'Bearer realm="tokenauth"', [])
        reply, arrived = proxy.ask("/reports/x", bob)
        assert (reply.status, arrived) == (403, [])
        faked = [
            ("X-Auth-User", "admin"),
            ("X_Auth_User", "admin"),
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
        ]
        reply, [request] = proxy.ask("/x?y=z", bob, headers=faked, method="POST", body=b"body")
        assert (reply.status, request.target, request.body) == (200, b"/x?y=z", b"body")
        assert request.values("X-Auth-User") == [b"bob"]
        assert [request.values(name) for name in ("X-Token", "X_Auth_User", "Upgrade")] == [[], [], []]
        reply, arrived = proxy.ask("/x/..;/reports/", bob)
        assert (reply.status, arrived) == (400, [])


@pytest.mark.parametrize("name", PRODUCTS)
def test_programs_need_no_login_page(name: str, tmp_path: Path, server: Server, bob: str) -> None:
    files = {path: without_login_page(text) for path, text in documented().items()}
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
