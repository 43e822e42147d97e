"""Which requests pass a proxy, and what the application behind it learns about the user."""

import pytest

from tests.support.servers import Server, log_in
from tests.system.proxies.peers import ask
from tests.system.proxies.running import Proxy

STRANGER = "x" * 64
"""An unknown token."""

IDENTITY = ("X-Auth-User", "X-Auth-Scopes", "X-Auth-Expires")

REPLACE_CACHE_CONTROL = {"traefik"}
"""Proxies that cannot keep the Cache-Control of the application."""

SPELLINGS = [
    *(spelling for name in IDENTITY for spelling in (name, name.lower(), name.upper())),
    *(name.replace("-", mark) for name in IDENTITY for mark in "_.!#$%&'*+^`|~"),
    *("X-Auth_User", "X_Auth-User", "x-auth.user", "X-Auth_Scopes", "X-Auth_Expires"),
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_a_request_passes_with_a_token_only(proxy: Proxy, ann: str, method: str) -> None:
    for tokens in ([], [STRANGER], [ann[:-1]], [ann + "x"]):
        reply, arrived = proxy.ask("/", *tokens, method=method)
        assert (reply.status, arrived) == (401, [])
        assert reply.headers["WWW-Authenticate"].startswith("Bearer ")
    reply, [request] = proxy.ask("/some/where?a=b&c=%20d", ann, method=method)
    assert reply.status == 200
    assert (request.method, request.target) == (method.encode(), b"/some/where?a=b&c=%20d")


def test_the_application_gets_the_user_and_not_the_token(proxy: Proxy, ann: str, server: Server) -> None:
    with server.client() as client:
        expires = client.get("/api/me", headers={"X-Token": ann}).json()["expiry_time"]
    for header in (("X-Token", ann), ("x-token", ann), ("Authorization", f"Bearer {ann}")):
        reply, [request] = proxy.ask("/", headers=[header, ("X-Other", "kept")])
        assert reply.status == 200
        assert request.values("X-Auth-User") == [b"ann"]
        assert request.values("X-Auth-Scopes") == [b"reports read"]
        assert request.values("X-Auth-Expires") == [str(expires).encode()]
        assert request.values("X-Other") == [b"kept"]
        assert ann.encode() not in b"".join(value for _, value in request.headers)


def test_two_different_tokens_are_refused(proxy: Proxy, ann: str, bob: str) -> None:
    for headers in (
        [("X-Token", ann), ("X-Token", bob)],
        [("X-Token", ann), ("X-Token", STRANGER)],
        [("X-Token", ann), ("x-token", bob)],
        [("X-Token", ann), ("Authorization", f"Bearer {bob}")],
        [("X-Token", f"{ann}, {bob}")],
    ):
        reply, arrived = proxy.ask("/", headers=headers)
        assert (reply.status, arrived) == (401, [])


def test_a_path_that_needs_a_scope_requires_it(proxy: Proxy, ann: str, bob: str) -> None:
    for target in ("/reports", "/reports/", "/reports/2026?x=y"):
        assert proxy.ask(target)[0].status == 401
        reply, arrived = proxy.ask(target, bob)
        assert (reply.status, arrived) == (403, [])
        reply, [request] = proxy.ask(target, ann)
        assert (reply.status, request.target) == (200, target.encode())
    reply, [request] = proxy.ask("/", bob)
    assert (reply.status, request.values("X-Auth-User")) == (200, [b"bob"])


@pytest.mark.parametrize("query", ["scope=", "scope=other", "scope=reports", "token=x", "path=/", "&scope=&scope=x"])
def test_the_requested_path_and_method_are_ignored(proxy: Proxy, ann: str, bob: str, query: str) -> None:
    """The query reaches the application unchanged, and never the issuer."""
    assert proxy.ask(f"/reports/?{query}", bob)[0].status == 403
    for target, token in ((f"/?{query}", bob), (f"/reports/?{query}", ann)):
        reply, [request] = proxy.ask(target, token)
        assert (reply.status, request.target) == (200, target.encode())


def test_a_revoked_token_is_refused_at_once(proxy: Proxy, server: Server) -> None:
    with server.client() as client:
        for _ in range(20):
            token = log_in(client)
            assert proxy.ask("/", token)[0].status == 200
            assert client.delete("/api/token", headers={"X-Token": token}).status_code == 200
            reply, arrived = proxy.ask("/", token)
            assert (reply.status, arrived) == (401, [])


def test_browsers_keep_an_answer_only_if_told_to(proxy: Proxy, ann: str) -> None:
    """Otherwise they would show it from their cache after a log-out."""
    for target, kept in (
        ("/", "no-store"),
        ("/reports/x", "no-store"),
        ("/missing", "no-store"),
        ("/cached", "max-age=60"),
    ):
        reply, [_] = proxy.ask(target, ann)
        replaced = proxy.name in REPLACE_CACHE_CONTROL
        assert reply.headers.get_all("Cache-Control") == ["no-store" if replaced else kept], target


READYZ = [
    "/readyz",
    "/readyz?x",
    "/%72eadyz",
    "//readyz",
    "/./readyz",
    "/x/../readyz",
    "http://auth.example.com/readyz",
]


def test_the_login_host_does_not_publish_readyz(proxy: Proxy) -> None:
    for target in READYZ:
        reply = ask(proxy.port, target, host="auth.example.com")
        assert reply.status in {400, 404, 418}, target
        assert b'ready"' not in reply.body, target
    assert ask(proxy.port, "/healthz", host="auth.example.com").status == 200


def test_a_client_cannot_name_its_own_user(proxy: Proxy, bob: str) -> None:
    """Neither with the exact header names nor with spellings that some applications treat as the same name."""
    for name in SPELLINGS:
        cannot_name_a_user(proxy, bob, name)


def cannot_name_a_user(proxy: Proxy, bob: str, name: str) -> None:
    spoofed = [(name, "mallory"), ("X-Token", bob), (name, "mallory")]
    reply, arrived = proxy.ask("/", headers=spoofed)
    for request in arrived:
        assert request.values("X-Auth-User") == [b"bob"]
        assert request.values("X-Auth-Scopes") in ([], [b""])
        assert b"mallory" not in b"".join(value for _, value in request.headers)
    assert reply.status == 200 or (reply.status == 400 and not arrived), name
    reply, arrived = proxy.ask("/", headers=[(name, "mallory")])
    assert reply.status in {400, 401}, name
    assert not arrived, name


@pytest.mark.parametrize("name", ["X-Auth-User", "X-AUTH-SCOPES", "X_Auth_User", "X-Auth_User"])
def test_user_headers_of_clients_are_cleared_not_refused(proxy: Proxy, bob: str, name: str) -> None:
    assert proxy.ask("/", bob, headers=[(name, "mallory")])[0].status == 200


def test_a_client_cannot_name_another_path(proxy: Proxy, ann: str) -> None:
    """Some frameworks take the path from these headers, after the proxy has judged the one of the request."""
    for name in ("X-Original-URL", "X-Rewrite-URL", "x-original-url", "X_Rewrite_URL"):
        for target in ("/", "/reports/"):
            named = [(name, "/reports/secret"), (name, "/reports/secret"), ("X-HTTP-Method-Override", "PUT")]
            reply, [request] = proxy.ask(target, ann, headers=named)
            assert (reply.status, request.target) == (200, target.encode())
            assert b"secret" not in b"".join(value for _, value in request.headers), name
            assert request.values("X-HTTP-Method-Override") == [b"PUT"], "applications may need it"


def test_connection_cannot_remove_the_user_headers(proxy: Proxy, ann: str) -> None:
    named = ", ".join(("close", *IDENTITY))
    reply, [request] = proxy.ask("/", ann, headers=[("Connection", named)])
    assert reply.status == 200
    assert all(request.values(name) for name in IDENTITY)
    assert not [value for value in request.values("Connection") if b"auth" in value.lower()]


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_no_connection_is_upgraded_past_the_proxy(proxy: Proxy, ann: str, protocol: str) -> None:
    """Otherwise later requests on the connection would pass without a check."""
    upgrade = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", protocol), ("HTTP2-Settings", "AAMAAABkAAQ")]
    _, arrived = proxy.ask("/", ann, headers=upgrade)
    assert not [request for request in arrived if request.values("Upgrade")]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_only_the_application_gets_the_body(proxy: Proxy, ann: str, chunked: bool) -> None:
    content = b"body." * 20_000
    body, headers = content, [("Content-Type", "text/plain")]
    if chunked:
        headers.append(("Transfer-Encoding", "chunked"))
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    reply, arrived = proxy.ask("/", ann, method="POST", body=body, headers=headers)
    if chunked and proxy.name == "haproxy":  # refused, since HAProxy would forward trailers
        assert (reply.status, arrived) == (411, [])
        return
    assert (reply.status, [(request.method, request.body) for request in arrived]) == (200, [(b"POST", content)])
    asked = proxy.relay.take()
    assert ann.encode() in asked
    assert b"body." not in asked
    reply, [request] = proxy.ask("/", ann)
    assert (reply.status, request.method, request.body) == (200, b"GET", b"")


def test_long_cookies_of_the_application_pass(proxy: Proxy, ann: str) -> None:
    """They count towards the issuer's limit for heads."""
    cookie = "session=" + "c" * 14_000
    reply, [request] = proxy.ask("/", ann, headers=[("Cookie", cookie)])
    assert (reply.status, request.values("Cookie")) == (200, [cookie.encode()])


def test_connections_to_the_issuer_are_reused(proxy: Proxy, ann: str) -> None:
    before = proxy.relay.connections
    for _ in range(40):
        assert proxy.ask("/", ann)[0].status == 200
    assert proxy.relay.connections - before < 20
