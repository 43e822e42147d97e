"""The documented nginx configuration in front of a service that listens on a Unix socket."""

from pathlib import Path

import httpx

from tests.support.browsing import Visitor
from tests.support.connections import Connection
from tests.support.ports import free_port
from tests.support.servers import serve, write_config
from tests.system.proxies.running import running
from tests.system.proxies.test_one_host import APP, files


def test_a_login_behind_nginx_on_a_socket_leads_back(tmp_path: Path) -> None:
    """So nginx is trusted: for the page that is asked about, and for the address of its client."""
    port, path = free_port(), tmp_path / "t.sock"
    url = f"http://localhost:{port}"
    more = f'[browser]\nurl = "{url}"\n[server]\nsocket = "{path}"\naccept_risks = ["weak_hash"]\nsocket_mode = "0660"'
    written = files()[APP]
    assert "server 127.0.0.1:8000;" in written
    changed = {APP: written.replace("server 127.0.0.1:8000;", f"server unix:{path};")}
    with (
        serve(write_config(tmp_path, more), on_port=False) as server,
        running("nginx", tmp_path / "nginx", 1, changed, port=port) as proxy,
        httpx.Client(base_url=url) as browser,
    ):
        visitor = Visitor(browser)
        answer = visitor.get("/x?y=1", Accept="text/html")
        assert answer.status_code == 302
        assert answer.headers["location"].startswith(f"{url}/login?rd=")
        answer = visitor.log_in(rd=f"{url}/x?y=1")
        assert (answer.status_code, answer.headers["location"]) == (303, f"{url}/x?y=1")
        proxy.upstream.take()
        assert visitor.get("/x?y=1").status_code == 200
        [request] = proxy.upstream.take()
        assert request.values("X-Auth-User") == [b"ann"]
        with Connection(path) as connection:
            listed = connection.ask("GET", "/api/tokens", X_Token=visitor.cookies["tokenauth"]).json()["tokens"]
        assert [row["address"] for row in listed] == ["127.0.0.1"]
        for event in ("forwarded_for_ignored", "forwarded_for_missing", "forwarded_page_ignored"):
            assert server.events(event) == []
