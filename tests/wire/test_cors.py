"""Web pages of the configured origins may call the service from a browser, and those of no others."""

import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from tests.support.servers import HandClock, Server, exchange, log_in, worker, write_config

ORIGINS = ["https://app.example.com", "http://localhost:5173"]
STRANGERS = [
    "https://evil.example",
    "https://app.example.com.evil.example",
    "https://evil.app.example.com",
    "https://app.example.com:8443",
    "http://app.example.com",
    "https://app.example.comx",
    "https://app.example.com/",
    "http://localhost:5174",
    "null",
    "*",
]
REQUESTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/api/token", {"params": {"token": "x"}}, 200),
    ("POST", "/api/token", {"json": {"username": "admin", "password": "admin"}}, 200),
    ("POST", "/api/token", {"content": b"{"}, 415),
    ("DELETE", "/api/token", {}, 200),
    ("GET", "/api/me", {}, 401),
    ("GET", "/nothing", {}, 404),
    ("PUT", "/api/token", {}, 405),
]


@pytest.fixture(scope="module")
def settings() -> str:
    return f"[server]\ncors_origins = {ORIGINS}"


@pytest.fixture(scope="module")
def closed(directory: Path, clock: HandClock) -> Iterator[httpx.Client]:
    """Connect to a worker whose configuration names no origin."""
    elsewhere = directory / "closed"
    elsewhere.mkdir()
    with worker(write_config(elsewhere), clock) as running, running.client() as connected:
        yield connected


def preflight(client: httpx.Client, origin: str, method: str = "POST", headers: str = "x-token") -> httpx.Response:
    """Ask as a browser asks before it sends what a page wants."""
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return client.options("/api/token", headers=asked)


def granted(answer: httpx.Response) -> dict[str, str]:
    """Return what an answer allows to pages of other origins."""
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@pytest.mark.parametrize("origin", ORIGINS)
def test_by_default_no_origin_is_allowed_anything(closed: httpx.Client, origin: str) -> None:
    for method, path, options, status in REQUESTS:
        answer = closed.request(method, path, headers={"Origin": origin}, **options)
        assert (answer.status_code, granted(answer)) == (status, {})
    answer = preflight(closed, origin)
    assert (answer.status_code, granted(answer)) == (405, {})


@pytest.mark.parametrize("head", [b"GET /auth HTTP/1.1\r\nno colon", b"GET /nothing HTTP/1.1\r\nno colon"])
def test_a_broken_request_is_refused_at_once(server: Server, head: bytes) -> None:
    """Only a head that is too long is searched for its Origin for a while."""
    took = []
    for _ in range(5):
        began = monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head + b"\r\n")
            assert b"cache-control: no-store" in connection.recv(65536)
        took.append(monotonic() - began)
    assert min(took) < 0.9


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(("method", "path", "options", "status"), REQUESTS)
def test_a_configured_origin_may_read_every_answer(
    client: httpx.Client, origin: str, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    answer = client.request(method, path, headers={"Origin": origin}, **options)
    assert answer.status_code == status
    assert answer.headers.get_list("access-control-allow-origin") == [origin]
    assert "origin" in answer.headers["vary"].lower()
    assert set(answer.headers["access-control-expose-headers"].split(", ")) == {"WWW-Authenticate", "Retry-After"}
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_a_configured_origin_may_send_tokens_and_json(client: httpx.Client, origin: str, method: str) -> None:
    answer = preflight(client, origin, method, "authorization,content-type,x-token")
    assert answer.status_code in {200, 204}
    assert answer.headers["access-control-allow-origin"] == origin
    assert method in answer.headers["access-control-allow-methods"].split(", ")
    allowed = {name.lower() for name in answer.headers["access-control-allow-headers"].split(", ")}
    assert {"authorization", "content-type", "x-token"} <= allowed
    assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    assert not any("*" in value for value in granted(answer).values())


@pytest.mark.parametrize(("method", "headers"), [("PATCH", "x-token"), ("TRACE", "x-token"), ("POST", "x-other")])
def test_a_preflight_refuses_unused_methods_and_headers(client: httpx.Client, method: str, headers: str) -> None:
    assert preflight(client, ORIGINS[0], method, headers).status_code == 400


@pytest.mark.parametrize("origin", [*ORIGINS, *STRANGERS])
def test_a_preflight_to_auth_is_an_ordinary_request(client: httpx.Client, origin: str) -> None:
    """It is answered by the app behind the proxy, if that is meant to see it; here it has no token."""
    asked = {"Origin": origin, "Access-Control-Request-Method": "GET"}
    assert client.options("/auth?scope=read", headers=asked).status_code == 401
    assert client.options("/auth", headers={**asked, "X-Token": log_in(client)}).status_code == 200


@pytest.mark.parametrize("origin", STRANGERS)
def test_another_origin_is_not_allowed(client: httpx.Client, origin: str) -> None:
    for method, path, options, status in REQUESTS:
        answer = client.request(method, path, headers={"Origin": origin}, **options)
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
    answer = preflight(client, origin)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_logs_in_asks_and_logs_out(client: httpx.Client) -> None:
    origin = {"Origin": ORIGINS[0]}
    token = log_in(client, headers=origin)
    for method, path, status in [("GET", "/api/me", 200), ("DELETE", "/api/token", 200), ("GET", "/api/me", 401)]:
        answer = client.request(method, path, headers={**origin, "X-Token": token})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGINS[0]


REFUSED_HEADS = {
    "a head that is too long": (["X-Junk: " + "x" * 60_000], 431),
    "a long head whose Origin comes late": (["X-Token: " + "x" * 20_000, "A: b", "X-Junk: " + "x" * 20_000], 431),
    "a line without a colon": (["no colon"], 400),
    "two Hosts": (["Host: x"], 400),
}


@pytest.mark.parametrize("origin", [ORIGINS[0], STRANGERS[0]])
@pytest.mark.parametrize("before", [True, False], ids=["Origin first", "Origin last"])
@pytest.mark.parametrize("what", REFUSED_HEADS)
def test_a_configured_origin_can_read_a_refused_head(server: Server, what: str, before: bool, origin: str) -> None:
    """The server refuses it before the app sees it; a page would only learn of a failure of the network."""
    lines, status = REFUSED_HEADS[what]
    named = [f"Origin: {origin}"]
    lines = ["GET /api/token HTTP/1.1", "Host: x", *(named + lines if before else lines + named), "", ""]
    answered, headers, _ = exchange(server.port, "\r\n".join(lines).encode())
    assert (answered, headers["connection"]) == (status, "close")
    assert headers.get("access-control-allow-origin") == (origin if origin in ORIGINS else None)


def test_a_long_head_without_an_origin_is_refused_too(server: Server) -> None:
    head = "GET /api/token HTTP/1.1\r\nHost: x\r\nX-Junk: " + "x" * 60_000
    for end in ("\r\n\r\n", ""):  # with the end of the head, and without
        answered, headers, _ = exchange(server.port, (head + end).encode())
        assert answered == 431
        assert "access-control-allow-origin" not in headers


def test_a_page_may_send_what_traces_a_request(client: httpx.Client) -> None:
    answer = preflight(client, ORIGINS[0], "GET", "traceparent,tracestate,x-token")
    assert answer.status_code == 200
