"""Nothing is issued to a client that has disconnected before the store is called."""

from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Router

from tests.support.servers import HandClock, write_config
from tokenauth.errors import ClientGone
from tokenauth.models import Identity
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.web.app import find_routes
from tokenauth.web.asgi_extensions import CLIENT
from tokenauth.web.routing import Route

POOLS = """
[pools.p]
[pools.permits]
capacity = 3
prefill = true
[dialects.simple-token-implement]
pool = "permits"
prefix = "/simple"
password = "permits-secret"
[dialects.random-token-generator]
pool = "p"
prefix = "/random"
[dialects.token-pool]
pool = "q"
prefix = "/pool"
[dialects.token-management-service]
pool = "m"
prefix = "/managed"
[pools.q]
[pools.m]
"""
LOGIN = b'{"username": "ann", "password": "ann-secret"}'
FORM = b"grant_type=client_credentials&client_id=ann&client_secret=ann-secret"

ISSUING = {
    "/api/token": LOGIN,
    "/oauth/token": FORM,
    "/api/pools/p/leases": b"",
    "/api/pools/p/tokens": b"",
    "/simple/issue_token": b"",
    "/random/generate": b"",
    "/random/assign": b"",
    "/pool/api/token_pool": b"",
    "/pool/api/block_token": b"",
    "/managed/generate-token": b"",
    "/managed/assign-token": b'{"client_id": "c"}',
}
"""Paths that issue tokens or leases, with the body to send."""


@pytest.mark.parametrize("path", ISSUING)
async def test_nothing_is_issued_to_a_disconnected_client(tmp_path: Path, path: str) -> None:
    clock = HandClock(tmp_path / "clock", create=True)
    service = create_service(loader.load(write_config(tmp_path, POOLS)), clock, monotonic=lambda: 0.0)
    kind = b"application/x-www-form-urlencoded" if path.startswith("/oauth") else b"application/json"
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": ISSUING[path]}

    async def send(message: Any) -> None:
        sent.append(message)

    async with service.running():
        await service.pools.prefill()
        for name in ("p", "q", "m"):
            await service.pools.generate(service.pools.find(name), 1)
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [
                (b"content-type", kind),
                (b"content-length", b"%d" % len(ISSUING[path])),
                (b"x-api-password", b"permits-secret"),
            ],
            "client": ("127.0.0.1", 4711),
            "user": Identity("ann", ("admin",)),
            "extensions": {CLIENT: {"gone": True}},
        }
        unguarded = [Route(route.path, route.handlers) for route in find_routes(service)]
        with pytest.raises(ClientGone):
            await Router(unguarded)(scope, receive, send)
        assert sent == []
        assert await service.tokens.list_live(None) == []
        counts = [await service.pools.count(service.pools.find(name)) for name in ("p", "q", "m", "permits")]
        assert counts == [(1, 0), (1, 0), (1, 0), (3, 0)]
