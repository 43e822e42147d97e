"""Headers of every response, whether from a handler, a middleware or the protocol."""

import socket

import httpx
import pytest

from tests.support.servers import Server, exchange, log_in
from tests.wire.openapi.configurations import ALL_DIALECTS, with_dialects

ALWAYS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
METHODS = ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "TRACE"]
NATIVE = ("/api/", "/oauth/", "/.well-known/", "/healthz", "/readyz", "/openapi.json", "/nothing", "/auth")


@pytest.fixture(scope="module")
def settings() -> str:
    """Enable all routes."""
    return (
        with_dialects(**ALL_DIALECTS)
        + '[server]\ncors_origins = ["https://app.example.com"]\n[oauth]\nissuer = "http://localhost"'
    )


def has_security_headers(answer: httpx.Response) -> bool:
    """Return whether a response has each header exactly once."""
    return {name: answer.headers.get_list(name) for name in ALWAYS} == {name: [value] for name, value in ALWAYS.items()}


@pytest.fixture(scope="module")
def paths(client: httpx.Client) -> list[str]:
    """List all paths, with the names of parameters as their values."""
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) > 30
    return [*(path.replace("{", "").replace("}", "") for path in paths), "/docs", "/openapi.json", "/nothing", "/"]


@pytest.mark.parametrize("method", METHODS)
def test_every_answer_forbids_sniffing_and_referrers(client: httpx.Client, paths: list[str], method: str) -> None:
    token = log_in(client)
    for headers in ({"X-Token": token}, {"Origin": "https://app.example.com", "Content-Type": "application/json"}):
        missing = []
        for path in paths:
            with client.stream(method, path, headers=headers) as answer:  # that of events does not end
                if not has_security_headers(answer):
                    missing.append(path)
        assert missing == []


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"BREW /auth HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /auth HTTP/1.1\r\nHost a\r\n\r\n", 401),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /auth HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 401),
    ],
)
def test_refusals_of_the_protocol_have_the_headers(server: Server, request_: bytes, status: int) -> None:
    answered, headers, _ = exchange(server.port, request_)
    assert answered == status
    assert (ALWAYS | {"cache-control": "no-store"}).items() <= headers.items()


def test_pipelined_answers_are_framed_correctly(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 2)
        data = b""
        while data.count(b'{"status":"ok"}') < 2:
            data += connection.recv(65536)
    assert data.count(b"\r\n\r\n") == data.count(b"HTTP/1.1 200 OK\r\n") == 2


def test_every_document_ends_with_a_line_break(client: httpx.Client, paths: list[str]) -> None:
    """Otherwise a shell's prompt follows on the line on which curl prints it.

    Dialects send what their original sends.
    """
    token = log_in(client)
    answers = [
        client.request(method, path, headers={"X-Token": token})
        for path in paths
        if path.startswith(NATIVE)
        for method in METHODS
    ]
    documents = [answer for answer in answers if answer.headers.get("content-type") == "application/json"]
    assert len(documents) > 100
    assert [
        answer.request for answer in documents if answer.content and not answer.content.endswith((b"}\n", b"]\n"))
    ] == []
