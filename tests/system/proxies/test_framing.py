"""No request becomes two behind a proxy, neither for an application behind forward-auth nor for tokenauth itself."""

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import combinations, product

import pytest

from tests.support.servers import Server, worker, write_config
from tests.system.proxies import h2
from tests.system.proxies.plain import PLAIN
from tests.system.proxies.running import PRODUCTS, Proxy, running

INNER = b"GET /readyz HTTP/1.1\r\nHost: app.example.com\r\nX-Auth-User: mallory\r\n\r\n"
"""The body of another request. It must never be handled as a request."""

LAST = b"GET /api/me HTTP/1.1\r\nHost: app.example.com\r\nConnection: close\r\n\r\n"
"""The next request on the connection. It has no token, so the only possible answer is 401."""

METHODS = ["GET", "POST", "OPTIONS", "CONNECT"]
FRAMINGS = ["length", "chunks", "both", "neither"]
SEGMENTS = ["one", "two", "bytes"]
UPGRADES = ["", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "Connection: Upgrade, x\r\nUpgrade: h2c\r\n"]
CASES = list(product(METHODS, FRAMINGS, SEGMENTS, UPGRADES))
PAIRS = [
    number
    for number, case in enumerate(product(*map(range, (len(METHODS), len(FRAMINGS), len(SEGMENTS), len(UPGRADES)))))
    if sum(case) % 3 == 0
]
"""A third of the cases, which have every two kinds together."""

EVERY_CASE = pytest.mark.parametrize(
    "cases", [pytest.param(PAIRS, id="pairs"), pytest.param(range(len(CASES)), id="all", marks=pytest.mark.faults)]
)


def test_the_fast_cases_have_every_two_kinds_together() -> None:
    pairs = [
        {pair for case in cases for pair in combinations(enumerate(case), 2)}
        for cases in (map(CASES.__getitem__, PAIRS), CASES)
    ]
    assert pairs[0] == pairs[1]


def encode(case: int, method: str, framing: str, headers: str, path: str) -> bytes:
    """Return a request with another one in its body."""
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)
    measures, body = {
        "length": (f"Content-Length: {len(INNER)}\r\n", INNER),
        "chunks": ("Transfer-Encoding: chunked\r\n", chunked),
        "both": (f"Content-Length: {len(chunked)}\r\nTransfer-Encoding: chunked\r\n", chunked),
        "neither": ("", b""),
    }[framing]
    head = f"{method} {path}?{case} HTTP/1.1\r\nHost: app.example.com\r\n{measures}{headers}\r\n"
    return head.encode() + body


def converse_all(port: int, cases: Sequence[int], headers: str = "", path: str = "/healthz") -> dict[int, list[int]]:
    """Send each case on its own connection. Return the statuses of the answers to each."""

    def converse_one(case: int) -> list[int]:
        method, framing, segments, upgrade = CASES[case]
        return converse(port, encode(case, method, framing, upgrade + headers, path), segments)

    with ThreadPoolExecutor(48) as threads:
        return dict(zip(cases, threads.map(converse_one, cases), strict=True))


def converse(port: int, sent: bytes, segments: str) -> list[int]:
    """Send a request in segments, then LAST. Return the statuses of all answers."""
    cuts = {"one": [], "two": [sent.index(b"\r\n\r\n") + 4], "bytes": range(1, len(sent))}[segments]
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
                connection.sendall(sent[start:end])
            connection.sendall(LAST)
            while more := connection.recv(65536):
                received += more
        except ConnectionError:  # refused before all of it was sent
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received) if status != b"100"]


@EVERY_CASE
@pytest.mark.parametrize("path", ["/healthz", "/ws"])
def test_no_body_reaches_the_application_as_a_request(proxy: Proxy, ann: str, cases: Sequence[int], path: str) -> None:
    """Nor does CONNECT: it has no body, and many servers parse the bytes after it as the next request.

    WebSockets may be opened at /ws, if the request has no body.
    """
    proxy.upstream.take()
    answers = converse_all(proxy.port, cases, f"X-Token: {ann}\r\n", path)
    requests = proxy.upstream.take()
    arrived = Counter(request.target for request in requests)
    for case, statuses in answers.items():
        assert statuses[1:] in ([], [401]), CASES[case]
        assert arrived.pop(f"{path}?{case}".encode(), 0) <= (0 if CASES[case][0] == "CONNECT" else 1), CASES[case]
    assert not arrived
    for request in requests:
        assert request.values("X-Auth-User") == [b"ann"], request
        if path != "/ws" or request.method != b"GET" or request.body or request.values("Transfer-Encoding"):
            assert request.values("Upgrade") == [], request
        assert request.values("Upgrade") in ([], [b"websocket"]), request


TARGETS = [
    *(
        "/",
        "/x",
        "//",
        "*",
        "http://a/",
        "http://a",
        "http://a:80/",
        "http://a:80",
        "https://a:443/x",
        "http://[::1]:80/",
    ),
    *(
        "http:///",
        "http://:80/",
        "http://",
        "a:80",
        "a",
        "a:",
        "a:443",
        "127.0.0.1:80",
        "[::1]:80",
        "[::1]",
        ":80",
        ":",
    ),
    *("a:80/", "u@a:80", "u:p@a:80", "//a:80/", "a:80?x", "%61:80", "."),
]


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.0", "HTTP/2"])
def test_no_connect_of_any_form_reaches_an_application(proxy: Proxy, ann: str, protocol: str) -> None:
    """Nor do the bytes after it, which a tunnel would forward unchanged."""
    proxy.upstream.take()
    headers = f"Host: a:80\r\nX-Token: {ann}\r\n"

    def tunnel(target: str) -> bytes:
        if protocol == "HTTP/2":
            return open_tunnel_in_h2(proxy.port, target.encode(), ann.encode())
        return converse_raw(proxy.port, f"CONNECT {target} {protocol}\r\n{headers}\r\n".encode(), INNER)

    with ThreadPoolExecutor(len(TARGETS)) as threads:  # a proxy may keep each open for a second
        answers = list(threads.map(tunnel, TARGETS))
    assert [target for target, answer in zip(TARGETS, answers, strict=True) if answer.startswith(b"HTTP/1.1 2")] == []
    assert proxy.upstream.take() == []


def open_tunnel_in_h2(port: int, target: bytes, token: bytes) -> bytes:
    """Send CONNECT in all forms of HTTP/2, each on its own connection. Return all answers."""
    asked = [(b":method", b"CONNECT"), (b":authority", target)]
    path, scheme = (b":path", b"/"), (b":scheme", b"http")
    extended = [(b":protocol", b"websocket"), (b"sec-websocket-version", b"13")]
    received = b""
    for fields in (asked, [*asked, scheme, path], [*asked, (b":path", target)], [*asked, scheme, path, *extended]):
        pseudo_first = sorted(fields, key=lambda field: not field[0].startswith(b":"))
        received += converse_raw(port, h2.request([*pseudo_first, (b"x-token", token)], INNER, end=False), b"")
    return received


def converse_raw(port: int, first: bytes, second: bytes) -> bytes:
    """Send `first`, then `second` after the answer. Return all received bytes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            connection.sendall(first)
            received = connection.recv(65536)
            connection.sendall(second)
            connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65536):
                received += more
        except TimeoutError:
            raise
        except OSError:  # refused, and closed before all of it was sent
            pass
    return received


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/2"])
@pytest.mark.parametrize("body", [b"abc", b""], ids=["body", "empty"])
@pytest.mark.parametrize("more", ["", "Trailer", "Content-Length"])
def test_no_trailer_reaches_an_application(proxy: Proxy, ann: str, protocol: str, body: bytes, more: str) -> None:
    """Many servers treat trailers as headers."""
    proxy.upstream.take()
    spoofed = [(name, b"mallory") for name in (b"x-auth-user", b"x-auth-scopes", b"x_auth_user", b"x-token")]
    known = {"": [], "Trailer": [(b"trailer", b"x-auth-user")], "Content-Length": [(b"content-length", b"3")]}[more]
    for method in (b"GET", b"POST", b"PUT"):
        if protocol == "HTTP/2":
            asked = [(b":method", method), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]
            sent = h2.request([*asked, (b"x-token", ann.encode()), *known], body, spoofed)
        else:
            fields = [(b"Host", b"a"), (b"X-Token", ann.encode()), *known, (b"Transfer-Encoding", b"chunked")]
            head = b"".join(b"%b: %b\r\n" % field for field in fields)
            chunks = (b"3\r\n%b\r\n" % body if body else b"") + b"0\r\n"
            trailers = b"".join(b"%b: %b\r\n" % field for field in spoofed)
            sent = b"%b / HTTP/1.1\r\n%b\r\n%b%b\r\n" % (method, head, chunks, trailers)
        converse_raw(proxy.port, sent, b"")
        arrived = proxy.upstream.take()
        assert arrived or more == "Content-Length" or protocol == "HTTP/2" or proxy.name == "haproxy"
        for request in arrived:
            assert (request.trailers, request.values("X-Auth-User")) == ([], [b"ann"])
            assert b"mallory" not in b"".join(value for _, value in request.headers)


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Proxy, Server]]]:
    """Return a function that starts a proxy in front of an issuer, or returns the running one."""
    directory = tmp_path_factory.mktemp("fronted")
    started: dict[str, Proxy] = {}
    with ExitStack() as stack:
        issuer = stack.enter_context(worker(write_config(directory, "[server]\naccess_log = true")))

        def get(name: str) -> tuple[Proxy, Server]:
            if name not in started:
                opened = running(name, directory / name, issuer.port, files=PLAIN[name], ready=("/healthz", 200))
                started[name] = stack.enter_context(opened)
            return started[name], issuer

        yield get


@EVERY_CASE
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_body_reaches_tokenauth_as_a_request(
    fronted: Callable[[str], tuple[Proxy, Server]], name: str, cases: Sequence[int]
) -> None:
    """Also if the proxy allows WebSockets and shares its connections between users."""
    proxy, issuer = fronted(name)
    for case, statuses in converse_all(proxy.port, cases).items():
        assert statuses[1:] in ([], [401]), CASES[case]
        assert 200 not in statuses or CASES[case][0] == "GET", CASES[case]
    assert {event["route"] for event in issuer.events("request")} <= {"/healthz", "/api/me", "(none)"}
    assert not [event for event in issuer.events("request") if event["method"] == "CONNECT"]
