"""What HTTP/1.1 makes possible around a request: trailers, pipelines, upgrades, and connections that break."""

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
from tests.support.lending import Borrower
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
def borrower(server: Server) -> Iterator[Borrower]:
    with Connection(server.port) as connection:
        yield Borrower(connection)


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    """Write a request as it goes over the wire; of a chunked one the body is what comes after the head."""
    measured = [] if "Transfer-Encoding: chunked" in headers else [f"Content-Length: {len(body)}"]
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *measured, *headers, "", ""]).encode() + body


def chunks(*parts: bytes, trailers: bytes = b"") -> bytes:
    """Write a body in chunks, and what comes after it."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n" + trailers + b"\r\n"


def converse(port: int, *sent: bytes) -> list[int]:
    """Send something and read until the server closes the connection; return the statuses of all answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for data in sent:
            connection.sendall(data)
        heard = b""
        while more := connection.recv(65536):
            heard += more
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", heard)]


INTROSPECT = ["POST /oauth/introspect", "Content-Type: application/x-www-form-urlencoded", "Transfer-Encoding: chunked"]


@pytest.mark.parametrize("kind", ["client", "token"])
def test_a_token_in_a_trailer_is_ignored(server: Server, client: httpx.Client, kind: str) -> None:
    """A proxy that judges, strips or adds headers does not see it (RFC 9110 section 6.5.1)."""
    token = log_in(client, *GATEWAY)
    proof = f"Authorization: {basic(':'.join(GATEWAY))}" if kind == "client" else f"X-Token: {token}"
    late = chunks(b"token=" + UNKNOWN.encode(), trailers=f"{proof}\r\n".encode())
    assert exchange(server.port, request(*INTROSPECT, proof, body=late))[0] == 200
    assert exchange(server.port, request(*INTROSPECT, body=late))[0] == 401


def test_trailers_are_taken_and_mean_nothing(server: Server) -> None:
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


@pytest.mark.parametrize("target", ["/auth", "/api/token", "/nowhere"])
@pytest.mark.parametrize("what", ENDLESS)
def test_endless_chunk_extensions_or_trailers_are_cut_off(server: Server, target: str, what: str) -> None:
    """Whether or not the request has been answered; what has been is not answered again."""
    begin, trailer = ENDLESS[what]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request(f"POST {target}", "Transfer-Encoding: chunked", body=begin))
        sent, heard = 0, b""
        try:
            while sent < 16 * KIB * KIB:
                connection.sendall(trailer * 10)
                sent += len(trailer) * 10
            while more := connection.recv(65536):
                heard += more
        except OSError:  # it is closed, and what is still under way goes nowhere
            pass
    assert sent < 16 * KIB * KIB
    assert heard.count(b"HTTP/1.1 ") <= 1


def test_many_small_chunks_are_as_good_as_a_large_one(server: Server) -> None:
    """However much the lines between them come to, and wherever the segments end."""
    with Connection(server.port) as connection:
        for size in (1, 7, 100):
            body = chunks(*[b"x" * size] * 6000) if size == 1 else chunks(*[b" " * size] * 400)
            assert connection.send(request("DELETE /api/token", "Transfer-Encoding: chunked", body=body)).status == 200


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_a_body_announced_too_long_is_refused_at_its_head(server: Server, kind: str) -> None:
    """Before a byte of it has come: the client is not asked to go on (RFC 9110 section 10.1.1)."""
    path = "/api/token" if kind.endswith("json") else "/oauth/token"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nExpect: 100-continue\r\n"
    for length, status in ((str(16 * KIB + 1), 413), ("9" * 18, 413), ("000" + str(16 * KIB), 100)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            heard = connection.recv(65536)
        assert heard.startswith(f"HTTP/1.1 {status} ".encode())
        assert (b"connection: close" in heard) == (status == 413)


LONG = "X-Junk: " + "x" * 60 * KIB


@pytest.mark.parametrize("first", [17 * KIB, 10 * KIB, 1], ids=lambda size: f"after {size} bytes")
def test_a_long_head_behind_another_request_is_refused(server: Server, first: int) -> None:
    body = b" " * first
    sent = request("POST /api/token", body=body) + request("GET /healthz", LONG)
    assert converse(server.port, sent) in ([413], [413, 431], [400], [400, 431])


def test_many_requests_at_once_are_all_answered_in_turn(server: Server) -> None:
    """More than a head may be long, so that the last of a piece is not all there."""
    many = [request("GET /healthz", "X-Junk: " + "x" * 1000)] * 99 + [request("GET /healthz", "Connection: close")]
    assert converse(server.port, b"".join(many)) == [200] * 100


BROKEN = {
    "a broken head": request("GET /auth", "no colon"),
    "a long head": request("GET /auth", LONG),
    "an unknown method": request("BREW /auth"),
    "a broken chunk": request("POST /auth", "Transfer-Encoding: chunked", body=b"zz\r\n"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_was_asked_first_is_answered_first(server: Server, what: str) -> None:
    """A login takes a while; whatever comes behind it, its answer is the first, and no other is taken for it."""
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
    """Write a request whose body holds another one, measured in one of four ways."""
    measures = {
        "length": [f"Content-Length: {len(INNER)}"],
        "chunks": ["Transfer-Encoding: chunked"],
        "both": [f"Content-Length: {len(INNER)}", "Transfer-Encoding: chunked"],
        "neither": [],
    }
    body = {"length": INNER, "neither": b""}.get(framing, chunks(INNER))
    return "\r\n".join([f"{method} /healthz HTTP/1.1", "Host: x", *measures[framing], *headers, "", ""]).encode() + body


def cut(sent: bytes, how: str) -> list[bytes]:
    """Cut what is sent into segments."""
    if how == "byte by byte":
        return [sent[at : at + 1] for at in range(len(sent))]
    head = sent.index(b"\r\n\r\n") + 4
    return [sent] if how == "in one" else [sent[:head], sent[head:]]


@pytest.mark.parametrize("how", ["in one", "in two", "byte by byte"])
@pytest.mark.parametrize("framing", ["length", "chunks", "both", "neither"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "CONNECT"])
def test_no_body_is_taken_for_a_request(server: Server, method: str, framing: str, how: str) -> None:
    """What asks for another protocol has a body like all others (RFC 9110 section 7.8); CONNECT is refused."""
    usual = {"GET": 200, "POST": 405, "OPTIONS": 405, "CONNECT": 400}[method]
    for headers in ([], UPGRADES):
        statuses = converse(server.port, *cut(framed(method, framing, *headers), how), LAST)
        if method == "CONNECT" or framing == "both":
            assert statuses == [400]
        else:  # an answer that is given before the body has come closes the connection
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
    """Else the next request would be taken for the body."""
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
    """To close at once would reset the connection, and the answer would be lost."""
    size = 2_000_000
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request("PUT /api/token", body=b" " * size))
        assert read_all(connection).startswith(b"HTTP/1.1 405 ")


UNFRAMED = {
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two Hosts": request("GET /healthz", "Host: x"),
    "two Hosts in HTTP/1.0": b"GET /healthz HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n",
    "a Host that is none": b"GET /healthz HTTP/1.1\r\nHost: x/y\r\n\r\n",
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


@pytest.mark.parametrize("target", ["http://x/healthz", "http://x/healthz?a#b", "/healthz#a", "/%68ealthz"])
def test_other_forms_of_a_target_are_taken(server: Server, target: str) -> None:
    assert converse(server.port, request(f"GET {target}") + LAST) == [200, 200]


def test_a_request_without_a_host_is_fine_in_http_1_0(server: Server) -> None:
    assert converse(server.port, b"GET /healthz HTTP/1.0\r\n\r\n") == [200]


def test_a_connection_close_in_a_trailer_closes(server: Server) -> None:
    """The parser takes no request after it: who is not told would wait for an answer to the next one."""
    login = request(
        "POST /api/token",
        "Content-Type: application/json",
        "Transfer-Encoding: chunked",
        body=chunks(b'{"username": "admin", "password": "admin"}', trailers=b"Connection: close\r\n"),
    )
    assert converse(server.port, login + LAST) == [200]


TARGETS = ["/auth", "/auth?scope=read", "http://issuer/auth", "/%61uth", "/auth#x"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("method", "headers", "pieces"),
    [
        ("GET", ["no colon"], 1),
        ("GET", [LONG], 1),
        ("GET", [LONG], 2),
        ("BREW", [], 1),
        ("get", [], 1),
    ],
    ids=["a broken header", "a long head", "a long head in pieces", "an unknown method", "small letters"],
)
def test_at_auth_there_is_no_other_refusal(
    server: Server, target: str, method: str, headers: list[str], pieces: int
) -> None:
    sent = request(f"{method} {target}", *headers)
    cut = len(method) + 3
    assert converse(server.port, *((sent,) if pieces == 1 else (sent[:cut], sent[cut:]))) == [401]


def test_undecodable_bytes_in_the_query_of_auth_are_refused(server: Server) -> None:
    assert converse(server.port, request("GET /auth?x").replace(b"?x", b"?scope=\xff\xfe")) == [401]


def cut_off(server: Server, sent: bytes) -> None:
    """Send a part of a request and go; wait until that has been noticed."""
    known = len(server.events("request"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(sent)
    until(lambda: len(server.events("request")) > known, "the server has done with it")
    assert server.events("request")[-1]["status"] == 400


@pytest.mark.parametrize("body", [b"", b'{"holder": "some'], ids=["before the body", "in the body"])
def test_a_request_that_is_cut_off_changes_no_lease(server: Server, borrower: Borrower, body: bytes) -> None:
    """It is not the same as one without a body: what would have come may have made all the difference."""
    lease = borrower.assign("permits", "ci-7")
    headers = [f"X-Token: {borrower.token}", "Content-Type: application/json"]
    sent = request(f"DELETE /api/pools/permits/leases/{lease.token}", *headers, body=b"x" * 28)[:-28]
    cut_off(server, sent + body)
    assert borrower.counts("permits") == (0, 1)
    assert borrower.release("permits", lease.token, holder="ci-7", fence=lease.fence) == (204, None)
    cut_off(server, request("POST /api/pools/permits/leases", *headers, body=b"x" * 28)[:-28] + body)
    assert borrower.counts("permits") == (1, 0)


def test_a_logout_cut_off_ends_only_complete_tokens(server: Server, client: httpx.Client) -> None:
    tokens = [log_in(client) for _ in range(2)]
    head = request("DELETE /api/token", f"X-Token: {tokens[0]}", body=b"x" * 200)[:-200]
    known = len(server.events("request"))
    for body in (b'{"token": "', b'{"token": "%s"' % tokens[1].encode()):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head + body)
    until(lambda: len(server.events("request")) >= known + 2, "the server has done with both")
    assert [probe(client, token) for token in tokens] == [True, False]
