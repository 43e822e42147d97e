"""An incomplete request changes nothing, on any route except log-out, which ends the tokens that it received."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import HandClock, Server, log_in, worker, write_config
from tests.wire.routes.test_disconnected import POOLS
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.web.app import find_routes

DIALECTS = [
    *("[dialects.simple-token-implement]", "[dialects.random-token-generator]", "[dialects.token-pool]"),
    "[dialects.token-management-service]",
]
CUTS = {
    "before its body": (b"Content-Length: 10\r\n\r\n", True),
    "in its body": (b"Content-Length: 10\r\n\r\n{}", True),
    "before its chunks": (b"Transfer-Encoding: chunked\r\n\r\n", True),
    "in a chunk": (b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}", True),
    "before the last chunk": (b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", True),
    "in its trailers": (b"Transfer-Encoding: chunked\r\n\r\n0\r\na: b\r\n", True),
    "a broken chunk": (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", False),
    "a broken trailer": (b"Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", False),
    "an endless extension": (b"Transfer-Encoding: chunked\r\n\r\n0;" + b"x" * 20_000, False),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configure all dialects, without a required token where that is possible."""
    settings = f"{POOLS}\n[server]\naccess_log = true\n[tokens]\nper_user = 0\n"
    for dialect in DIALECTS:
        settings = settings.replace(dialect, f"{dialect}\nrequire_token = {str('simple' not in dialect).lower()}")
    return write_config(tmp_path_factory.mktemp("cut"), settings)


@pytest.fixture(scope="module")
def running(config: Path) -> Iterator[tuple[Server, httpx.Client]]:
    """Run a worker with logins, free tokens and leases, none of which lapses: its clock stands still."""
    with worker(config, HandClock(config.with_name("clock"), create=True)) as server, server.client() as client:
        client.headers["X-Token"] = log_in(client)
        for pool in ("p", "q", "m"):
            assert client.post(f"/api/pools/{pool}/tokens", json={"count": 2}).status_code == 201
            assert client.post(f"/api/pools/{pool}/leases").status_code == 201
        yield server, client


def state(client: httpx.Client) -> list[Any]:
    """Return everything that a request could change."""
    pools = [client.get(f"/api/pools/{name}").json() for name in ("p", "q", "m", "permits")]
    return [client.get("/api/tokens").json(), pools]


@pytest.mark.parametrize("cut", CUTS)
def test_an_incomplete_request_changes_nothing(running: tuple[Server, httpx.Client], config: Path, cut: str) -> None:
    server, client = running
    tail, half = CUTS[cut]
    leased = next(token for token in client.get("/api/pools/p").json()["tokens"] if "holder" in token)["token"]
    login = client.get("/api/me").json()["id"]
    before, known, sent = state(client), len(server.events("request")), 0
    known += len(before[1]) + 1
    for route in find_routes(create_service(loader.load(config))):
        for method in set(route.handlers) - {"HEAD"}:
            if (method == "GET" and "POST" not in route.handlers) or (method, route.path) == (
                "DELETE",
                "/api/token",
            ):
                continue
            if (method, route.path) == ("GET", "/api/token"):
                continue
            path = route.path.replace("{pool}", "p").replace("{token}", leased).replace("{id}", login)
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Token: {client.headers['X-Token']}\r\n"
            more = "Content-Type: application/json\r\nX-API-PASSWORD: permits-secret\r\n"
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
                connection.sendall((head + more).encode() + tail)
                if half:
                    connection.shutdown(socket.SHUT_WR)
                received = connection.recv(65536)
            assert received == b"" or int(received[9:12]) in {400, 401, 415, 431}, (method, path)
            sent += 1
    assert sent > 20
    assert state(client) == before
