"""The warnings of docs/clients.md about uvicorn: with httptools a body can become a request, with h11 it cannot."""

import socket
from itertools import product
from typing import Literal

import pytest
from starlette.types import Receive, Scope, Send

from tests.support.hosting import hosted
from tests.support.journal import until

INNER = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
CASES = list(product(["GET", "POST", "CONNECT"], ["websocket", "h2c", None], ["/read", "/early"], ["one", "two"]))


def executed(http: Literal["h11", "httptools"]) -> set[tuple[str, str | None, str, str]]:
    """Return the cases in which uvicorn passes the body of a request to the app as a second request."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        while scope["path"] == "/read":
            message = await receive()
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    found = set()
    with hosted(app, http=http) as port:
        for case in CASES:
            method, upgrade, path, segments = case
            more = f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\n" if upgrade else ""
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(INNER)}\r\n{more}\r\n".encode()
            seen.clear()
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                if segments == "one":
                    connection.sendall(head + INNER)
                else:
                    connection.sendall(head)
                    until(lambda: bool(seen), "the request has arrived")
                    connection.sendall(INNER)
                connection.shutdown(socket.SHUT_WR)
                try:
                    while connection.recv(65536):
                        pass
                except ConnectionError:
                    pass
            if "/inner" in seen:
                found.add(case)
    return found


def headers_seen(http: Literal["h11", "httptools"]) -> list[tuple[bytes, bytes]]:
    """Return the headers that an app under uvicorn receives for a request with a trailer."""
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 204, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body"})

    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with hosted(app, http=http) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head + b"1\r\na\r\n0\r\nX-Auth-User: mallory\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 204")
    return seen


def test_with_h11_no_trailer_becomes_a_header() -> None:
    assert b"x-auth-user" not in dict(headers_seen("h11"))


def test_with_httptools_a_trailer_becomes_a_header() -> None:
    """If this fails, uvicorn has been fixed: remove the warnings from docs/clients.md and docs/forward-auth.md."""
    assert dict(headers_seen("httptools"))[b"x-auth-user"] == b"mallory"


def test_with_h11_no_body_becomes_a_request() -> None:
    assert executed("h11") == set()


@pytest.mark.parametrize("method", ["GET", "POST", "CONNECT"])
def test_with_httptools_a_late_body_becomes_a_request(method: str) -> None:
    """If this fails, uvicorn has been fixed: remove the warning from docs/clients.md."""
    assert {case for case in executed("httptools") if case[0] == method and case[3] == "two"}
