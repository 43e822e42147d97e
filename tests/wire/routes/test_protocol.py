"""HTTP/1.1 over sockets: trailers, pipelining, upgrades, framing, and broken connections."""

import http.client
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.connections import Connection
from tests.support.hosting import read_all
from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import Server, exchange, log_in, probe, write_config
from tests.wire.oauth.forms import CLIENTS, GATEWAY, UNKNOWN, basic

KIB = 1024

SETTINGS = """
[server]
access_log = true
[pools.permits]
capacity = 1
prefill = true
lease_ttl = "1h"
"""


@pytest.fixture(scope="module")
def config_file(directory: Path) -> Path:
    return write_config(directory, SETTINGS, CLIENTS)


@pytest.fixture
def user(server: Server) -> Iterator[PoolUser]:
    with Connection(server.port) as connection:
        yield PoolUser(connection)


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request. With chunked encoding the body must already be in chunks."""
    measured = [] if "Transfer-Encoding: chunked" in headers else [f"Content-Length: {len(body)}"]
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *measured, *headers, "", ""]).encode() + body


def chunks(*parts: bytes, trailers: bytes = b"") -> bytes:
    """Return a chunked body with trailers."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n" + trailers + b"\r\n"


def converse(port: int, *sent: bytes) -> list[int]:
    """Send data and read until the server closes the connection; return the statuses of all responses."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for data in sent:
            connection.sendall(data)
        received = b""
        while more := connection.recv(65536):
            received += more
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received)]


INTROSPECT = ["POST /oauth/introspect", "Content-Type: application/x-www-form-urlencoded", "Transfer-Encoding: chunked"]


@pytest.mark.parametrize("kind", ["client", "token"])
def test_a_token_in_a_trailer_is_ignored(server: Server, client: httpx.Client, kind: str) -> None:
    """A proxy that checks, removes or adds headers does not see trailers (RFC 9110 section 6.5.1)."""
    token = log_in(client, *GATEWAY)
    proof = f"Authorization: {basic(':'.join(GATEWAY))}" if kind == "client" else f"X-Token: {token}"
    body = chunks(b"token=" + UNKNOWN.encode(), trailers=f"{proof}\r\n".encode())
    assert exchange(server.port, request(*INTROSPECT, proof, body=body))[0] == 200
    assert exchange(server.port, request(*INTROSPECT, body=body))[0] == 401


def test_trailers_are_accepted_and_ignored(server: Server) -> None:
    login = chunks(b'{"username": "admin"', b', "password": "admin"}', trailers=b"Content-Type: text/plain\r\nX: y\r\n")
    sent = request("POST /api/token", "Content-Type: application/json", "Transfer-Encoding: chunked", body=login)
    with Connection(server.port) as connection:
        assert [connection.send(sent).status for _ in range(3)] == [200, 200, 200]


ENDLESS = {
    "trailers": (b"0\r\na: ", b"a: " + b"b" * 100 + b"\r\n"),
    "a trailer": (b"0\r\na: ", b"b" * 103),
    "a first extension": (b"5;a=", b"b" * 103),
    "an extension": (b"2\r\nab\r\n5;a=", b"b" * 103),
    "a last extension": (b"2\r\nab\r\n0;a=", b";b=c"),
}


ENOUGH = 128 * KIB * KIB
"""More bytes than the sockets' buffers hold (up to 36 MiB on Linux) and the server discards after a refusal (8 MiB)."""


@pytest.mark.parametrize("target", ["/auth", "/api/token", "/nowhere"])
@pytest.mark.parametrize("what", ENDLESS)
def test_endless_chunk_extensions_or_trailers_are_cut_off(server: Server, target: str, what: str) -> None:
    """Whether or not the request has been answered. It is answered at most once."""
    begin, trailer = ENDLESS[what]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request(f"POST {target}", "Transfer-Encoding: chunked", body=begin))
        sent, received = 0, b""
        try:
            while sent < ENOUGH:
                connection.sendall(trailer * 500)
                sent += len(trailer) * 500
            while more := connection.recv(65536):
                received += more
        except OSError:  # the server has closed the connection
            pass
    assert sent < ENOUGH
    assert received.count(b"HTTP/1.1 ") <= 1


def test_many_small_chunks_are_accepted(server: Server) -> None:
    """The size lines do not count toward the limit on the body."""
    with Connection(server.port) as connection:
        for size in (1, 7, 100):
            body = chunks(*[b"x" * size] * 6000) if size == 1 else chunks(*[b" " * size] * 400)
            assert connection.send(request("DELETE /api/token", "Transfer-Encoding: chunked", body=body)).status == 200


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_a_too_long_body_is_refused_at_its_head(server: Server, kind: str) -> None:
    """No 100 Continue is sent (RFC 9110 section 10.1.1)."""
    path = "/api/token" if kind.endswith("json") else "/oauth/token"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nExpect: 100-continue\r\n"
    for length, status in ((str(16 * KIB + 1), 413), ("9" * 18, 413), ("000" + str(16 * KIB), 100)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            received = connection.recv(65536)
        assert received.startswith(f"HTTP/1.1 {status} ".encode())
        assert (b"connection: close" in received) == (status == 413)


LONG = "X-Junk: " + "x" * 60 * KIB


@pytest.mark.parametrize("first", [17 * KIB, 10 * KIB, 1], ids=lambda size: f"after {size} bytes")
def test_a_long_head_behind_another_request_is_refused(server: Server, first: int) -> None:
    body = b" " * first
    sent = request("POST /api/token", body=body) + request("GET /healthz", LONG)
    assert converse(server.port, sent) in ([413], [413, 431], [400], [400, 431])


@pytest.mark.parametrize("piece", [700, 1024, 16 * KIB, 40 * KIB])
@pytest.mark.parametrize("before", [0, 1], ids=["first", "pipelined"])
def test_the_limit_of_a_head_is_exact(server: Server, before: int, piece: int) -> None:
    other = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 500 + b"\r\n\r\n"
    """A refusal behind another request can also be a close without an answer."""
    for size, status in ((16 * KIB, 200), (16 * KIB + 1, 431), (17 * KIB, 431)):
        head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: %s\r\n\r\n"
        sent = other * before + head % (b"y" * (size + 2 - len(head)))
        received = converse(server.port, *(sent[start : start + piece] for start in range(0, len(sent), piece)))
        assert received == [200] * before + [status] or (status == 431 and received == [200] == [200] * before), size


def test_100_pipelined_requests_are_all_answered(server: Server) -> None:
    """Together they are longer than the bound on a head, so reads end in the middle of a head."""
    many = [request("GET /healthz", "X-Junk: " + "x" * 1000)] * 99 + [request("GET /healthz", "Connection: close")]
    assert converse(server.port, b"".join(many)) == [200] * 100


BROKEN = {
    "a broken head": request("GET /auth", "no colon"),
    "a long head": request("GET /auth", LONG),
    "a broken chunk": request("POST /auth", "Transfer-Encoding: chunked", body=b"zz\r\n"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_pipelined_requests_are_answered_in_order(server: Server, what: str) -> None:
    """A login is slow. A malformed request behind it does not overtake its response."""
    login = request("POST /api/token", body=b'{"username": "admin", "password": "admin"}')
    statuses = converse(server.port, login + BROKEN[what])
    assert statuses[0] == 200
    assert set(statuses[1:]) <= {401}


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.2"])
def test_an_upgrade_is_ignored_and_the_next_request_served(server: Server, protocol: str) -> None:
    upgrade = request("GET /healthz", f"Upgrade: {protocol}", "Connection: Upgrade")
    warned = len(server.events("Unsupported upgrade request."))
    assert converse(server.port, upgrade * 3 + request("GET /healthz", "Connection: close")) == [200] * 4
    assert len(server.events("Unsupported upgrade request.")) == warned


INNER = b"GET /healthz?inner HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADES = ["Connection: Upgrade", "Upgrade: websocket"]
LAST = b"GET /healthz?last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def framed(method: str, framing: str, *headers: str) -> bytes:
    """Return a request whose body is another request, framed in one of four ways."""
    framings = {
        "length": [f"Content-Length: {len(INNER)}"],
        "chunks": ["Transfer-Encoding: chunked"],
        "both": [f"Content-Length: {len(INNER)}", "Transfer-Encoding: chunked"],
        "neither": [],
    }
    body = {"length": INNER, "neither": b""}.get(framing, chunks(INNER))
    return "\r\n".join([f"{method} /healthz HTTP/1.1", "Host: x", *framings[framing], *headers, "", ""]).encode() + body


def cut(sent: bytes, how: str) -> list[bytes]:
    """Split the data into segments."""
    if how == "byte by byte":
        return [sent[at : at + 1] for at in range(len(sent))]
    head = sent.index(b"\r\n\r\n") + 4
    return [sent] if how == "in one" else [sent[:head], sent[head:]]


@pytest.mark.parametrize("how", ["in one", "in two", "byte by byte"])
@pytest.mark.parametrize("framing", ["length", "chunks", "both", "neither"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "CONNECT"])
def test_a_body_is_never_read_as_a_request(server: Server, method: str, framing: str, how: str) -> None:
    """Not in a request with `Upgrade` either (RFC 9110 section 7.8). CONNECT is refused."""
    usual = {"GET": 200, "POST": 405, "OPTIONS": 405, "CONNECT": 400}[method]
    for headers in ([], UPGRADES):
        statuses = converse(server.port, *cut(framed(method, framing, *headers), how), LAST)
        if method == "CONNECT" or framing == "both":
            assert statuses == [400]
        else:  # a response before the end of the body closes the connection
            assert statuses in ([usual], [usual, 200]), headers
        if framing == "neither" and method != "CONNECT":
            assert statuses == [usual, 200], headers


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /healthz", 200),
        ("GET /auth", 401),
        ("GET /nowhere", 404),
        ("PUT /api/token", 405),
        ("POST /api/token", 415),
    ],
)
@pytest.mark.parametrize("more", [[], ["Expect: 100-continue"]], ids=["", "expecting 100"])
def test_an_answer_before_the_body_closes_the_connection(
    server: Server, request_line: str, status: int, more: list[str]
) -> None:
    """Otherwise the next request would be read as the body."""
    sent = request(request_line, "Content-Type: text/plain", *more, body=b"x" * 77)[:-77]
    for late in (LAST, b"x" * 77 + LAST):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(sent)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.headers["Connection"]) == (status, "close")
            answer.read()
            connection.sendall(late)
            assert connection.recv(1) == b""


def test_an_early_answer_reaches_a_client_that_still_sends(server: Server) -> None:
    """An immediate close would reset the connection and lose the response."""
    size = 2_000_000
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request("PUT /api/token", body=b" " * size))
        assert read_all(connection).startswith(b"HTTP/1.1 405 ")


UNFRAMED = {
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two Hosts": request("GET /healthz", "Host: x"),
    "two Hosts in HTTP/1.0": b"GET /healthz HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n",
    "an invalid Host": b"GET /healthz HTTP/1.1\r\nHost: x/y\r\n\r\n",
    "HTTP/0.9": b"GET /healthz HTTP/0.9\r\nHost: x\r\n\r\n",
    "HTTP/2.0": b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n",
    "no version": b"GET /healthz\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /healthz HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": request("POST /healthz", "Content-Length: 0"),
    "another coding": request("POST /healthz", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip"),
    "a coding before chunks": request("POST /healthz", "X: y", body=b"").replace(
        b"Content-Length: 0", b"Transfer-Encoding: gzip, chunked"
    ),
    "a folded line": request("GET /healthz", "A: b\r\n c"),
    "a blank before the colon": request("GET /healthz", "A : b"),
    "a line feed alone": request("GET /healthz", "A: b\nContent-Length: 3"),
    "a carriage return alone": request("GET /healthz", "A: b\rContent-Length: 3"),
    "a NUL": request("GET /healthz", "A: b\0"),
    "CONNECT": request("CONNECT example.com:443"),
    "the start of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("what", UNFRAMED)
def test_ambiguous_framing_is_refused_and_closes(server: Server, what: str) -> None:
    assert converse(server.port, UNFRAMED[what] + LAST) == [400]


@pytest.mark.parametrize("target", ["http://x/healthz", "HTTPS://x:1/healthz?a", "/%68ealthz"])
def test_other_forms_of_a_target_are_accepted(server: Server, target: str) -> None:
    assert converse(server.port, request(f"GET {target}") + LAST) == [200, 200]


def test_http_1_0_needs_no_host_header(server: Server) -> None:
    assert converse(server.port, b"GET /healthz HTTP/1.0\r\n\r\n") == [200]


def test_a_connection_close_in_a_trailer_closes(server: Server) -> None:
    """The parser accepts no request after it, so the server must close: the client would wait forever."""
    login = request(
        "POST /api/token",
        "Content-Type: application/json",
        "Transfer-Encoding: chunked",
        body=chunks(b'{"username": "admin", "password": "admin"}', trailers=b"Connection: close\r\n"),
    )
    assert converse(server.port, login + LAST) == [200]


TARGETS = ["/auth", "/auth?scope=read", "http://issuer/auth", "/%61uth"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("method", "headers", "pieces"),
    [
        ("GET", ["no colon"], 1),
        ("GET", [LONG], 1),
        ("GET", [LONG], 2),
    ],
    ids=["a broken header", "a long head", "a long head in pieces"],
)
def test_malformed_requests_to_auth_are_401(
    server: Server, target: str, method: str, headers: list[str], pieces: int
) -> None:
    sent = request(f"{method} {target}", *headers)
    cut = len(method) + 3
    assert converse(server.port, *((sent,) if pieces == 1 else (sent[:cut], sent[cut:]))) == [401]


def test_undecodable_bytes_in_the_query_of_auth_are_refused(server: Server) -> None:
    assert converse(server.port, request("GET /auth?x").replace(b"?x", b"?scope=\xff\xfe")) == [401]


def cut_off(server: Server, sent: bytes) -> None:
    """Send a part of a request and disconnect. Wait until the server has logged it."""
    known = len(server.events("request"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(sent)
    until(lambda: len(server.events("request")) > known, "the server has logged the request")
    assert server.events("request")[-1]["status"] == 400


@pytest.mark.parametrize("body", [b"", b'{"holder": "some'], ids=["before the body", "in the body"])
def test_an_incomplete_request_changes_no_lease(server: Server, user: PoolUser, body: bytes) -> None:
    """It is not treated as a request without a body: the missing part may have changed its meaning."""
    lease = user.assign("permits", "ci-7")
    headers = [f"X-Token: {user.token}", "Content-Type: application/json"]
    sent = request(f"DELETE /api/pools/permits/leases/{lease.token}", *headers, body=b"x" * 28)[:-28]
    cut_off(server, sent + body)
    assert user.counts("permits") == (0, 1)
    assert user.release("permits", lease.token, holder="ci-7", fence=lease.fence) == (204, None)
    cut_off(server, request("POST /api/pools/permits/leases", *headers, body=b"x" * 28)[:-28] + body)
    assert user.counts("permits") == (1, 0)


def test_an_incomplete_logout_ends_complete_tokens(server: Server, client: httpx.Client) -> None:
    tokens = [log_in(client) for _ in range(2)]
    head = request("DELETE /api/token", f"X-Token: {tokens[0]}", body=b"x" * 200)[:-200]
    known = len(server.events("request"))
    for body in (b'{"token": "', b'{"token": "%s"' % tokens[1].encode()):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head + body)
    until(lambda: len(server.events("request")) >= known + 2, "the server has logged both requests")
    assert [probe(client, token) for token in tokens] == [True, False]
