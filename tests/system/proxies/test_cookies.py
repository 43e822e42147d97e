"""What each proxy does with the cookie of a login: who passes, who is sent to the login page, what is forwarded."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from json import loads

import pytest

from tests.support.servers import Server, log_in
from tests.system.proxies.peers import Arrived, ask
from tests.system.proxies.running import Proxy
from tests.system.proxies.test_framing import INNER, converse
from tests.system.proxies.test_paths import is_report

COOKIE = "__Secure-tokenauth"

KEEP_COOKIES = {"traefik"}
"""Proxies that cannot remove one cookie of several."""

LOGIN_PAGE = "https://auth.example.com/login"

FROM_THE_APPLICATION = ("Sec-Fetch-Site", "same-origin")

WEBSOCKET = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]


def with_cookie(token: str) -> tuple[str, str]:
    return "Cookie", f"{COOKIE}={token}"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("{0}", ""),
        ("{0}; a=b", "a=b"),
        ("a=b; {0}", "a=b"),
        ("a=b; {0}; c=d", "a=b; c=d"),
        ("a=b;{0};c=d", "a=b;c=d"),
        ("a=b; x{0}; {0}; c-{0}", "a=b; x{0}; c-{0}"),
        ("{0}; a=b; {0}", None),
        ("__Host-tokenauth=x; a=b; {0}; tokenauth=y", None),
        ("tokenauth=x; tokenauth=x; tokenauth=x; {0}", None),
    ],
)
def test_the_application_does_not_get_the_login(proxy: Proxy, ann: str, sent: str, kept: str | None) -> None:
    """It gets its own cookies. If the browser has several variants of the login, it may get none at all."""
    cookie = f"{COOKIE}={ann}"
    reply, [request] = proxy.ask("/", headers=[("Cookie", sent.format(cookie))])
    assert (reply.status, request.values("X-Auth-User")) == (200, [b"ann"])
    forwarded = "; ".join(value.decode() for value in request.values("Cookie"))
    if proxy.name in KEEP_COOKIES:
        assert forwarded == sent.format(cookie)
    elif kept is None:
        assert forwarded in {"", "a=b"}
    else:
        assert forwarded.replace("; ", ";") == kept.format(cookie).replace("; ", ";")


def test_a_cookie_gives_the_rights_of_its_user(proxy: Proxy, ann: str, bob: str) -> None:
    assert proxy.ask("/reports/x", headers=[with_cookie(ann)])[0].status == 200
    reply, arrived = proxy.ask("/reports/x", headers=[with_cookie(bob)])
    assert (reply.status, arrived) == (403, [])
    reply, [request] = proxy.ask("/", ann, headers=[with_cookie(bob)])
    assert (reply.status, request.values("X-Auth-User")) == (200, [b"ann"])


def test_one_call_ends_cookie_and_script_token(proxy: Proxy, server: Server) -> None:
    with server.client() as client:
        first, second = log_in(client), log_in(client)
        assert proxy.ask("/", headers=[with_cookie(first)])[0].status == 200
        assert proxy.ask("/", second)[0].status == 200
        assert client.delete("/api/tokens", headers={"X-Token": second}).status_code == 200
        ends = [proxy.ask("/", headers=[with_cookie(first)]), proxy.ask("/", second)]
        assert [(reply.status, arrived) for reply, arrived in ends] == [(401, [])] * 2


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", [("Sec-Fetch-Mode", "navigate"), ("Accept", "text/html")], 302),
        ("GET", [("Accept", "text/html,*/*")], 302),
        ("POST", [("Sec-Fetch-Mode", "navigate"), ("Accept", "text/html")], 302),
        ("GET", [("Sec-Fetch-Mode", "cors"), ("Accept", "text/html")], 401),
        ("GET", [("Sec-Fetch-Mode", "no-cors"), ("Accept", "image/*")], 401),
        ("GET", [("Sec-Fetch-Mode", "websocket")], 401),
        ("GET", [("Accept", "*/*")], 401),
        ("POST", [("Accept", "text/html")], 401),
        ("GET", [], 401),
        ("GET", [("X-Forwarded-Method", "POST"), ("Accept", "text/html")], 302),
    ],
)
def test_only_navigations_are_sent_to_the_login_page(
    proxy: Proxy, method: str, headers: list[tuple[str, str]], status: int
) -> None:
    """The page that the login leads back to is the proxy's word, and not the client's."""
    forged = [(f"X-Forwarded-{name}", value) for name, value in FORGED]
    for more in ([], [with_cookie("x" * 64)], forged):
        reply, arrived = proxy.ask("/reports/a%20b?c=d&e=%26", headers=[*headers, *more], method=method)
        assert (reply.status, arrived) == (status, [])
        target = "http%3A%2F%2Fapp.example.com%2Freports%2Fa%2520b%3Fc%3Dd%26e%3D%2526"
        name = "Location" if status == 302 else "X-Auth-Login"
        assert reply.headers[name] == f"{LOGIN_PAGE}?rd={target}"
        assert reply.headers["Set-Cookie"] is None or "Max-Age=0" in reply.headers["Set-Cookie"]


FORGED = [
    ("Proto", "https"),
    ("Host", "evil.example"),
    ("Uri", "/evil"),
    ("For", "192.0.2.1"),
    ("Method", "GET"),
    ("Port", "1"),
    ("Prefix", "/evil"),
]


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", [], 403),
        ("POST", [("Sec-Fetch-Site", "cross-site")], 403),
        ("POST", [("Sec-Fetch-Site", "none")], 403),
        ("POST", [("Sec-Fetch-Site", "cross-site"), ("Origin", "https://evil.example")], 403),
        ("POST", [("Origin", "https://evil.example")], 403),
        ("POST", [("Origin", "null")], 403),
        ("DELETE", [("Sec-Fetch-Site", "cross-site")], 403),
        ("PROPFIND", [("Sec-Fetch-Site", "cross-site")], 403),
        ("POST", [("Sec-Fetch-Site", "same-origin")], 200),
        ("POST", [("Sec-Fetch-Site", "same-site")], 200),
        ("POST", [("Origin", "https://app.example.com")], 200),
        ("GET", [("Sec-Fetch-Site", "cross-site")], 200),
        ("HEAD", [], 200),
    ],
)
def test_foreign_pages_change_nothing(
    proxy: Proxy, ann: str, method: str, headers: list[tuple[str, str]], status: int
) -> None:
    """Nor if the client itself says which method it uses. A token in a header needs no such proof."""
    forged = [(f"X-Forwarded-{name}", value) for name, value in FORGED]
    for target, more in (("/", []), ("/", forged), ("/reports/x", forged), ("/ws", forged)):
        sent = [*headers, *more, with_cookie(ann)]
        reply, arrived = proxy.ask(target, headers=sent, method=method)
        assert (reply.status, len(arrived)) == (status, status == 200), target
        assert proxy.ask(target, ann, headers=sent, method=method)[0].status == 200


def test_the_application_learns_the_address_from_the_proxy(proxy: Proxy, ann: str) -> None:
    forged = [(f"X-Forwarded-{name}", value) for name, value in FORGED]
    _, [request] = proxy.ask("/", ann, headers=forged)
    assert request.values("X-Forwarded-Proto") == [b"http"]
    assert request.values("X-Forwarded-Host") == [b"app.example.com"]
    assert request.values("Host") == [b"app.example.com"]
    assert b"192.0.2.1" not in b",".join(request.values("X-Forwarded-For")).split(b",")[-1]


def test_a_client_cannot_forge_its_address(proxy: Proxy) -> None:
    """The login page and the API are at a host of their own, where tokens in headers pass."""
    forged = [(f"X-Forwarded-{name}", value) for name, value in FORGED] + [("Forwarded", "for=192.0.2.1")]
    login = b'{"username": "bob", "password": "bob-secret"}'
    json = ("Content-Type", "application/json")
    made = ask(proxy.port, "/api/token", [*forged, json], "POST", login, host="auth.example.com")
    token = loads(made.body)["token"]
    listed = ask(proxy.port, "/api/tokens", [("X-Token", token)], host="auth.example.com:8080")
    [current] = [each for each in loads(listed.body)["tokens"] if each["current"]]
    assert current["address"] != "192.0.2.1"
    assert ask(proxy.port, "/api/token", [("X-Token", token)], "DELETE", host="auth.example.com").status == 200


def open_websocket(proxy: Proxy, *headers: tuple[str, str], target: str = "/ws/x") -> tuple[int, list[Arrived]]:
    reply, arrived = proxy.ask(target, headers=[*WEBSOCKET, *headers])
    return reply.status, arrived


def test_a_websocket_is_open_to_its_own_pages_only(proxy: Proxy, ann: str) -> None:
    login, own = with_cookie(ann), ("Origin", "https://app.example.com")
    for headers, status in (
        ([own], 401),
        ([with_cookie("x" * 64), own], 401),
        ([login, ("Origin", "https://evil.example")], 403),
        ([login, ("Origin", "https://evil.example"), ("Sec-Fetch-Mode", "websocket")], 403),
        ([login, ("Sec-Fetch-Mode", "websocket"), ("Sec-Fetch-Site", "cross-site")], 403),
    ):
        assert open_websocket(proxy, *headers) == (status, []), headers
    for headers in ([login, own], [("X-Token", ann)]):
        named = [("X-Auth-User", "mallory"), ("X-Original-URL", "/reports/"), ("X-Rewrite-URL", "/reports/")]
        status, [request] = open_websocket(proxy, *headers, *named)
        assert not request.values("X-Original-URL") + request.values("X-Rewrite-URL")
        assert (status, request.values("X-Auth-User"), request.values("Upgrade")) == (101, [b"ann"], [b"websocket"])
        assert ann.encode() not in b"".join(value for _, value in request.headers) or "traefik" in proxy.name


def test_connection_cannot_remove_the_user_of_a_websocket(proxy: Proxy, ann: str) -> None:
    headers = [("Connection", "Upgrade, X-Auth-User, X-Auth-Scopes, X-Auth-Expires"), *WEBSOCKET[1:]]
    reply, [request] = proxy.ask("/ws", ann, headers=headers)
    assert (reply.status, request.values("X-Auth-User")) == (101, [b"ann"])
    assert request.values("X-Auth-Scopes") == [b"reports read"]
    assert [value.lower() for value in request.values("Connection")] == [b"upgrade"]


@pytest.mark.parametrize(
    ("method", "target", "headers", "body"),
    [
        ("GET", "/", WEBSOCKET, b""),
        ("GET", "/x/ws", WEBSOCKET, b""),
        ("GET", "/reports/ws", WEBSOCKET, b""),
        ("GET", "/ws", [*WEBSOCKET, ("Content-Type", "x/y")], b"body"),
        ("GET", "/ws", [*WEBSOCKET, ("Transfer-Encoding", "chunked")], b"0\r\n\r\n"),
        ("POST", "/ws", WEBSOCKET, b""),
        (
            "GET",
            "/ws",
            [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMA")],
            b"",
        ),
        ("GET", "/ws", [("Connection", "Upgrade"), ("Upgrade", "h2c, websocket"), *WEBSOCKET[2:]], b""),
        ("GET", "/ws", [("Connection", "Upgrade"), ("Upgrade", "tls/1.0")], b""),
    ],
)
def test_nothing_else_is_upgraded(
    proxy: Proxy, ann: str, method: str, target: str, headers: list[tuple[str, str]], body: bytes
) -> None:
    """A request with a body is refused, or loses its body."""
    reply, arrived = proxy.ask(target, ann, method=method, headers=headers, body=body)
    upgraded = [request for request in arrived if request.values("Upgrade")]
    assert upgraded == [] or (body and target == "/ws")
    assert (reply.status == 101) is bool(upgraded)
    for request in upgraded:
        assert (request.body, request.values("Transfer-Encoding")) == (b"", [])
        assert request.values("Content-Length") in ([], [b"0"])


@pytest.mark.parametrize("segments", ["one", "two"])
def test_nothing_follows_a_websocket_that_is_refused(proxy: Proxy, ann: str, segments: str) -> None:
    """Many servers take for the next request what follows an upgrade that they did not make."""
    proxy.upstream.take()
    lines = [f"{name}: {value}\r\n" for name, value in [*WEBSOCKET, ("X-Token", ann), ("Host", "app.example.com")]]
    head = f"GET /ws/refused HTTP/1.1\r\n{''.join(lines)}\r\n".encode()
    statuses = converse(proxy.port, head + INNER, segments)
    assert (statuses[:1], set(statuses[1:]) <= {401}) == ([200], True)
    assert [request.target for request in proxy.upstream.take()] == [b"/ws/refused"]


WAYS = ["/", "/x/", "//", "/./", "/;/", "\\", "%2f", "%5c", "/%2e/", "/x/../"]
UPS = ["..", "%2e%2e", ".%2e", "..;", "..%00"]
ENDS = ["/reports/x", "%2freports/x", "\\reports", "//reports"]


def test_no_websocket_leads_to_the_reports(proxy: Proxy, bob: str) -> None:
    """No path below /ws that an application may read as one below /reports."""
    proxy.upstream.take()
    headers = [*WEBSOCKET, ("X-Token", bob)]
    ways = product(WAYS, UPS, ENDS)
    targets = [f"/ws{way}{'/'.join([up] * (1 + way.count('x')))}{end}" for way, up, end in ways]
    with ThreadPoolExecutor(8) as threads:
        assert 0 not in set(threads.map(lambda target: ask(proxy.port, target, headers).status, targets))
    assert not [request.target for request in proxy.upstream.take() if is_report(request.target)]
