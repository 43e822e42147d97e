"""The plain configurations of docs/production.md, in front of tokenauth alone."""

from pathlib import Path

import httpx

from tests.support.documents import blocks, read
from tests.support.servers import log_in, serve, write_config
from tests.system.proxies.running import running


def test_the_block_for_caddy_serves_tokenauth(tmp_path: Path) -> None:
    """And no log of Caddy has a token, also while tokenauth is down."""
    [block] = blocks(read("docs/production.md"), "caddy")
    plain = block.replace("auth.example.com {", "http://:8080 {\n\tbind 0.0.0.0", 1)
    files = {"/etc/caddy/Caddyfile": plain.replace("{\n", "{\n\tadmin off\n\tauto_https off\n", 1)}
    config = write_config(tmp_path, '[server]\ntrusted_proxies = ["127.0.0.1"]\n')
    with (
        serve(config) as server,
        running("caddy", tmp_path / "caddy", server.port, files, ready=("/readyz", 404)) as proxy,
        httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}", headers={"X-Forwarded-For": "203.0.113.9"}) as client,
    ):
        assert client.get("/healthz").status_code == 200
        token = log_in(client)
        [login] = client.get("/api/tokens", headers={"X-Token": token}).json()["tokens"]
        assert login["address"] == "127.0.0.1", "Caddy does not believe what a client sends"
        assert client.post("/api/token", content=b"x" * 65_000).status_code == 413
        proxy.relay.stop()
        assert client.get("/api/me", params={"token": token}, headers={"X-Token": token}).status_code == 502
        assert client.get(f"/api/keep_alive/{token}").status_code == 502
        proxy.stop()
    logs = b"".join(path.read_bytes() for path in (tmp_path / "caddy").glob("*.log"))
    assert logs.count(b'"status":502') == 2
    assert token.encode() not in logs
