"""No request becomes two on its way through a proxy, to an application behind forward-auth or to tokenauth itself."""

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product

import pytest

from tests.proxies.plain import PLAIN
from tests.proxies.running import PRODUCTS, Proxy, running
from tests.servers import Server, worker, write_config

INNER = b"GET /readyz HTTP/1.1\r\nHost: app.example.com\r\nX-Auth-User: mallory\r\n\r\n"
"""What nobody has asked for: it is the body of another request."""

LAST = b"GET /api/me HTTP/1.1\r\nHost: app.example.com\r\nConnection: close\r\n\r\n"
"""The next request on the connection; it has no token, and so is answered 401 if it is answered."""

METHODS = ["GET", "POST", "OPTIONS", "CONNECT"]
FRAMINGS = ["length", "chunks", "both", "neither"]
SEGMENTS = ["one", "two", "bytes"]
UPGRADES = ["", "Connection: Upgrade\r\nUpgrade: websocket\r\n", "Connection: Upgrade, x\r\nUpgrade: h2c\r\n"]
CASES = list(product(METHODS, FRAMINGS, SEGMENTS, UPGRADES))


def written(case: int, method: str, framing: str, headers: str) -> bytes:
    """Write a request with another one in its body."""
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)
    measures, body = {
        "length": (f"Content-Length: {len(INNER)}\r\n", INNER),
        "chunks": ("Transfer-Encoding: chunked\r\n", chunked),
        "both": (f"Content-Length: {len(chunked)}\r\nTransfer-Encoding: chunked\r\n", chunked),
        "neither": ("", b""),
    }[framing]
    head = f"{method} /healthz?{case} HTTP/1.1\r\nHost: app.example.com\r\n{measures}{headers}\r\n"
    return head.encode() + body


def converse_all(port: int, headers: str = "") -> list[list[int]]:
    """Send every case, each on a connection of its own; return the statuses of the answers to each."""

    def converse_one(case: int) -> list[int]:
        method, framing, segments, upgrade = CASES[case]
        return converse(port, written(case, method, framing, upgrade + headers), segments)

    with ThreadPoolExecutor(48) as threads:
        return list(threads.map(converse_one, range(len(CASES))))


def converse(port: int, sent: bytes, segments: str) -> list[int]:
    """Send something in segments, and one more request; return the statuses of all answers."""
    cuts = {"one": [], "two": [sent.index(b"\r\n\r\n") + 4], "bytes": range(1, len(sent))}[segments]
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
                connection.sendall(sent[start:end])
            connection.sendall(LAST)
            while more := connection.recv(65536):
                heard += more
        except ConnectionError:  # refused before all of it was sent
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", heard) if status != b"100"]


def test_an_application_behind_forward_auth_gets_no_body_as_a_request(proxy: Proxy, ann: str) -> None:
    """Nor CONNECT, which has none of its own: many servers read what follows it as the next request."""
    proxy.upstream.take()
    answers = converse_all(proxy.port, f"X-Token: {ann}\r\n")
    requests = proxy.upstream.take()
    arrived = Counter(request.target for request in requests)
    for case, statuses in enumerate(answers):
        assert statuses[1:] in ([], [401]), CASES[case]
        assert arrived.pop(b"/healthz?%d" % case, 0) <= (0 if CASES[case][0] == "CONNECT" else 1), CASES[case]
    assert not arrived
    for request in requests:
        assert (request.values("Upgrade"), request.values("X-Auth-User")) == ([], [b"ann"]), request


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Proxy, Server]]]:
    """Start an issuer with a proxy in front of it, or return those that run."""
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


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_body_is_a_request_to_tokenauth_behind_a_proxy(
    fronted: Callable[[str], tuple[Proxy, Server]], name: str
) -> None:
    """Also where the proxy lets WebSockets through, and shares its connections between users."""
    proxy, issuer = fronted(name)
    for case, statuses in enumerate(converse_all(proxy.port)):
        assert statuses[1:] in ([], [401]), CASES[case]
        assert 200 not in statuses or CASES[case][0] == "GET", CASES[case]
    assert {event["route"] for event in issuer.events("request")} <= {"/healthz", "/api/me", "(none)"}
    assert not [event for event in issuer.events("request") if event["method"] == "CONNECT"]
