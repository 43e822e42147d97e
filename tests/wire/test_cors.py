"""Only web pages of the configured origins may call the service from a browser."""

import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from tests.support.servers import HandClock, Server, exchange, log_in, worker, write_config

ORIGINS = ["https://app.example.com", "http://localhost:5173"]
OTHER_ORIGINS = [
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
    """Connect to a worker without `cors_origins`."""
    home = directory / "closed"
    home.mkdir()
    with worker(write_config(home), clock) as running, running.client() as connected:
        yield connected


def preflight(client: httpx.Client, origin: str, method: str = "POST", headers: str = "x-token") -> httpx.Response:
    """Send a preflight request for the login."""
    sent = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return client.options("/api/token", headers=sent)


def cors_headers(answer: httpx.Response) -> dict[str, str]:
    """Return the CORS headers of a response."""
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@pytest.mark.parametrize("origin", ORIGINS)
def test_by_default_no_origin_is_allowed_anything(closed: httpx.Client, origin: str) -> None:
    for method, path, options, status in REQUESTS:
        answer = closed.request(method, path, headers={"Origin": origin}, **options)
        assert (answer.status_code, cors_headers(answer)) == (status, {})
    answer = preflight(closed, origin)
    assert (answer.status_code, cors_headers(answer)) == (405, {})


@pytest.mark.parametrize("head", [b"GET /auth HTTP/1.1\r\nno colon", b"GET /nothing HTTP/1.1\r\nno colon"])
def test_a_broken_request_is_refused_at_once(server: Server, head: bytes) -> None:
    """The server waits for more of the head only if the head is too long: it may still contain an Origin."""
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
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["access-control-allow-origin"] == origin
    assert method in answer.headers["access-control-allow-methods"].split(", ")
    allowed = {name.lower() for name in answer.headers["access-control-allow-headers"].split(", ")}
    assert {"authorization", "content-type", "x-token"} <= allowed
    assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    assert not any("*" in value for value in cors_headers(answer).values())


@pytest.mark.parametrize(("method", "headers"), [("PATCH", "x-token"), ("TRACE", "x-token"), ("POST", "x-other")])
def test_a_preflight_refuses_unused_methods_and_headers(client: httpx.Client, method: str, headers: str) -> None:
    assert preflight(client, ORIGINS[0], method, headers).status_code == 400


@pytest.mark.parametrize("origin", [*ORIGINS, *OTHER_ORIGINS])
def test_a_preflight_to_auth_is_an_ordinary_request(client: httpx.Client, origin: str) -> None:
    """Preflights are for the app behind the proxy to answer. To `/auth` this one is a request without a token."""
    sent = {"Origin": origin, "Access-Control-Request-Method": "GET"}
    assert client.options("/auth?scope=read", headers=sent).status_code == 401
    assert client.options("/auth", headers={**sent, "X-Token": log_in(client)}).status_code == 200


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_another_origin_is_not_allowed(client: httpx.Client, origin: str) -> None:
    for method, path, options, status in REQUESTS:
        answer = client.request(method, path, headers={"Origin": origin}, **options)
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
    answer = preflight(client, origin)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_can_log_in_call_and_log_out(client: httpx.Client) -> None:
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


@pytest.mark.parametrize("origin", [ORIGINS[0], OTHER_ORIGINS[0]])
@pytest.mark.parametrize("first", [True, False], ids=["Origin first", "Origin last"])
@pytest.mark.parametrize("what", REFUSED_HEADS)
def test_a_configured_origin_can_read_a_refused_head(server: Server, what: str, first: bool, origin: str) -> None:
    """The server refuses it before the app runs. Without CORS headers the page would see a network error."""
    lines, status = REFUSED_HEADS[what]
    named = [f"Origin: {origin}"]
    lines = ["GET /api/token HTTP/1.1", "Host: x", *(named + lines if first else lines + named), "", ""]
    answered, headers, _ = exchange(server.port, "\r\n".join(lines).encode())
    assert (answered, headers["connection"]) == (status, "close")
    assert headers.get("access-control-allow-origin") == (origin if origin in ORIGINS else None)


def test_a_long_head_without_an_origin_is_refused_too(server: Server) -> None:
    head = "GET /api/token HTTP/1.1\r\nHost: x\r\nX-Junk: " + "x" * 60_000
    for end in ("\r\n\r\n", ""):  # a complete head, and one without its end
        answered, headers, _ = exchange(server.port, (head + end).encode())
        assert answered == 431
        assert "access-control-allow-origin" not in headers


def test_a_page_may_send_trace_context_headers(client: httpx.Client) -> None:
    answer = preflight(client, ORIGINS[0], "GET", "traceparent,tracestate,x-token")
    assert answer.status_code == 200
