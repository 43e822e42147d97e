"""HTTP/2 over TLS, which browsers use: the same rules as for HTTP/1.1, through the proxies that offer it."""

import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.system.proxies import h2
from tests.system.proxies.conftest import Start
from tests.system.proxies.peers import Arrived
from tests.system.proxies.running import Proxy
from tests.system.proxies.test_cookies import COOKIE, KEEP_COOKIES
from tests.system.proxies.test_decisions import SPELLINGS
from tests.system.proxies.test_framing import INNER, TARGETS

OFFER = {"caddy", "traefik", "envoy"}
"""Proxies whose configuration offers HTTP/2. For others it must not: HAProxy would forward trailers."""

_HEADERS, _RST_STREAM, _GOAWAY = 1, 3, 7

GET = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"app.example.com"), (b":path", b"/")]


def converse(proxy: Proxy, sent: bytes) -> int | None:
    """Send a connection's first bytes. Return the type of the frame that ends the wait, or None without HTTP/2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("127.0.0.1", proxy.tls_port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="app.example.com") as connection,
    ):
        if connection.selected_alpn_protocol() != "h2":
            return None
        connection.sendall(sent)
        received = b""
        while more := connection.recv(65536):
            received += more
            while len(received) >= 9 and len(received) >= (length := 9 + int.from_bytes(received[:3])):
                kind, received = received[3], received[length:]
                if kind in {_HEADERS, _RST_STREAM, _GOAWAY}:
                    return kind
        return _GOAWAY


def test_http_2_is_offered_where_it_is_safe(proxy: Proxy) -> None:
    assert (converse(proxy, h2.request(GET)) is not None) is (proxy.name in OFFER)


@pytest.fixture(params=sorted(OFFER))
def offering(request: pytest.FixtureRequest, start: Start) -> Proxy:
    """Return each proxy that offers HTTP/2, without earlier requests."""
    proxy = start(request.param)
    proxy.upstream.take()
    return proxy


def converse_all(proxy: Proxy, requests: Iterable[bytes]) -> list[Arrived]:
    """Send each on its own connection. Return what reached the application. A proxy may keep each for a second."""
    with ThreadPoolExecutor(128) as threads:
        assert None not in set(threads.map(lambda sent: converse(proxy, sent), requests))
    return proxy.upstream.take()


def test_no_header_of_http_2_names_a_user(offering: Proxy, ann: str) -> None:
    """Browsers send each cookie in a header of its own."""
    cookies = [(b"cookie", pair) for pair in (b"a=b", f"{COOKIE}={ann}".encode(), b"c=d")]
    forged = [(name.encode(), b"mallory") for name in sorted({spelling.lower() for spelling in SPELLINGS})]
    arrived = converse_all(offering, (h2.request([*GET, *cookies, field]) for field in forged))
    assert len(arrived) >= 3  # those with the exact names
    for request in arrived:
        assert request.values("X-Auth-User") == [b"ann"]
        assert b"mallory" not in b"".join(value for _, value in request.headers)
        if offering.name not in KEEP_COOKIES:
            assert request.values("Cookie") == [b"a=b; c=d"]
    assert converse_all(offering, (h2.request([*GET, field]) for field in forged)) == []


def test_no_connect_passes_in_http_2(offering: Proxy, ann: str) -> None:
    path, scheme, token = (b":path", b"/ws"), (b":scheme", b"https"), (b"x-token", ann.encode())
    forms: list[list[tuple[bytes, bytes]]] = [[], [scheme, path], [scheme, path, (b":protocol", b"websocket")], [path]]
    targets = [b"app.example.com", b"app.example.com:443", *(target.encode() for target in TARGETS)]
    asked = [[(b":method", b"CONNECT"), (b":authority", target), *form] for target in targets for form in forms]
    assert converse_all(offering, (h2.request([*fields, token], INNER, end=False) for fields in asked)) == []


def test_a_foreign_page_changes_nothing_by_http_2(offering: Proxy, ann: str) -> None:
    post = [(b":method", b"POST"), *GET[1:], (b"cookie", f"{COOKIE}={ann}".encode())]
    foreign = [[], [(b"x-forwarded-method", b"GET")], [(b"origin", b"https://evil.example")]]
    assert converse_all(offering, (h2.request([*post, *more], b"x=y") for more in foreign)) == []
    [request] = converse_all(offering, [h2.request([*post, (b"sec-fetch-site", b"same-origin")], b"x=y")])
    assert (request.method, request.body) == (b"POST", b"x=y")
