"""The documented nginx configuration with the login page and the application at one host."""

import re
from pathlib import Path

import httpx

from tests.support.browsing import Visitor
from tests.support.ports import free_port
from tests.support.servers import ROOT, probe, worker, write_config
from tests.system.proxies.running import documented, running

APP = "/etc/nginx/conf.d/app.conf"

FIRST_QUESTION = "        location = /_auth/any {\n"
"""The first line inside `location /_auth/` that is not a setting."""


def files() -> dict[str, str]:
    """Return nginx's configuration as docs/browser-login.md says: without the second server, with its three blocks."""
    page = (ROOT / "docs" / "browser-login.md").read_text()
    [pages, polled, question] = re.findall(r"^```nginx\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    before, marker, _ = documented()[APP].partition("\n# The login page.\n")
    assert marker
    server, brace, rest = before.rpartition("}")
    assert server.count(FIRST_QUESTION) == 1
    server = server.replace(FIRST_QUESTION, question + FIRST_QUESTION)
    return {APP: f"{server}\n{pages}{polled}{brace}{rest}"}


def test_a_log_out_at_one_host_ends_the_token(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://localhost:{port}"
    config = write_config(tmp_path, f'[browser]\nurl = "{url}"\n[server]\ntrusted_proxies = ["127.0.0.1"]')
    with (
        worker(config) as server,
        running("nginx", tmp_path / "nginx", server.port, files(), port=port) as proxy,
        httpx.Client(base_url=url) as browser,
        server.client() as client,
    ):
        visitor = Visitor(browser)
        answer = visitor.get("/x?y=1", Accept="text/html")
        assert answer.status_code == 302
        assert answer.headers["location"].startswith(f"{url}/login?rd=")
        assert visitor.log_in("ann", "wrong").status_code == 401
        answer = visitor.log_in(rd=f"{url}/x?y=1")
        assert (answer.status_code, answer.headers["location"]) == (303, f"{url}/x?y=1")
        token = visitor.cookies["tokenauth"]
        proxy.upstream.take()
        assert visitor.get("/x?y=1").status_code == 200
        [request] = proxy.upstream.take()
        assert (request.values("X-Auth-User"), request.values("Cookie")) == (
            [b"ann"],
            [b"tokenauth-form=" + visitor.cookies["tokenauth-form"].encode()],
        )
        proxy.relay.take()
        assert visitor.get("/api/live?since=1").status_code == 200
        assert proxy.relay.take().startswith(b"GET /auth?cookie&touch=0 ")
        assert [request.target for request in proxy.upstream.take()] == [b"/api/live?since=1"]
        assert probe(client, token)
        assert visitor.log_out().headers["location"] == "/logout?done=1"
        assert not probe(client, token)
        assert visitor.get("/x", Accept="*/*").status_code == 401
        assert proxy.upstream.take() == []
