"""/auth?cookie: browsers pass with their cookie, are sent to the login page, and foreign pages are refused."""

import socket
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.connections import Answer, Connection
from tests.support.journal import until
from tests.support.servers import HandClock, Server

AUTH, APP = "https://auth.example.com", "https://app.example.com"
NAME = "__Secure-tokenauth"
PAGE = {
    "X_Forwarded_Method": "GET",
    "X_Forwarded_Proto": "https",
    "X_Forwarded_Host": "app.example.com",
    "X_Forwarded_Uri": "/a?b=c&d=%2F",
}


@pytest.fixture(scope="module")
def settings() -> str:
    return f"""
[browser]
url = "{AUTH}"
domain = "example.com"
return_to = ["https://*.example.com"]
[server]
trusted_proxies = ["127.0.0.1"]
"""


@pytest.fixture
def bob(connection: Connection) -> str:
    return connection.log_in("bob", "bob-secret")


def ask(connection: Connection, query: str = "?cookie", **headers: str) -> Answer:
    """Ask as a proxy does about a page that a browser opens."""
    sent = {name: value for name, value in {**PAGE, **headers}.items() if value}
    return connection.ask("GET", f"/auth{query}", **sent)


def cookie(value: str) -> str:
    return f"{NAME}={value}"


@pytest.mark.parametrize(
    "header",
    ["{}", "a=b; {}", "{}; a=b", "a=b;{};c=d", "  {}  ", "{0}; {0}", "x{0}x=1; {0}", '__Host-tokenauth="x"; {}'],
)
def test_a_valid_cookie_lets_a_browser_pass(connection: Connection, ann: str, header: str) -> None:
    answer = ask(connection, Cookie=header.format(cookie(ann)))
    assert (answer.status, answer.headers["x-auth-user"], answer.headers["x-auth-scopes"]) == (200, "ann", "read write")
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("query", ["", "?scope=read", "?path=/x&cookie", "?path=/x&cookie&login=redirect"])
def test_without_the_word_the_cookie_is_not_read(connection: Connection, ann: str, query: str) -> None:
    """What follows `path` comes from the client."""
    answer = ask(connection, query, Cookie=cookie(ann))
    assert answer.status == 401
    assert "x-auth-login" not in answer.headers


@pytest.mark.parametrize(
    "header",
    [
        "tokenauth={}",
        "__Host-tokenauth={}",
        "__secure-tokenauth={}",
        "x__Secure-tokenauth={}",
        "__Secure-tokenauth ={}",
        "__Secure-tokenauth=%22{}",
        '__Secure-tokenauth="{}"',
        "__Secure-tokenauth={}x",
        "__Secure-tokenauth={} x",
        "a=__Secure-tokenauth={}",
        "__Secure-tokenauth",
        "__Secure-tokenauth=",
        "X-Token={}",
        ";;;=;=={}",
    ],
)
def test_nothing_else_is_taken_for_the_cookie(connection: Connection, ann: str, header: str) -> None:
    assert ask(connection, Cookie=header.format(ann)).status == 401


def test_two_different_cookies_are_not_used(connection: Connection, ann: str, bob: str) -> None:
    """A sibling host may have set one of them (cookie tossing). The answer deletes both."""
    for first, second in ((ann, bob), (bob, ann), (ann, ""), (ann, "x"), ("x", ann)):
        answer = ask(connection, Cookie=f"{cookie(first)}; {cookie(second)}")
        assert answer.status == 401
        assert "x-auth-user" not in answer.headers
        assert deleted(answer)[0].startswith(f"{NAME}=;")
        assert answer.headers["x-auth-login"].endswith("&note=cookies"), "the page must say why"
    assert "note" not in ask(connection, Cookie=cookie("x")).headers["x-auth-login"]
    head = f"GET /auth?cookie HTTP/1.1\r\nHost: x\r\nCookie: {cookie(ann)}\r\nCookie: {cookie(bob)}\r\n\r\n"
    assert connection.send(head.encode()).status == 401


def test_two_cookies_are_logged_once_with_the_trace_of_their_request(server: Server, ann: str, bob: str) -> None:
    """Also if another request of the connection came before, whose task the answer could belong to."""
    before, own = "b" * 32, "a" * 32
    first = f"GET /api/me HTTP/1.1\r\nHost: x\r\ntraceparent: 00-{before}-{'1' * 16}-01\r\n\r\n"
    head = f"GET /auth?cookie HTTP/1.1\r\nHost: x\r\nCookie: {cookie(ann)}; {cookie(bob)}\r\n"
    second = f"{head}Connection: close\r\ntraceparent: 00-{own}-{'1' * 16}-01\r\n\r\n"
    both = f"{head}traceparent: 00-{own}-{'2' * 16}-01\r\n\r\n"
    since = len(server.events("cookie_twice"))
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection, connection.makefile("rb") as answers:
        connection.sendall((first + both + first + second).encode())
        assert answers.read().count(b"HTTP/1.1 401") == 4
    until(lambda: len(server.events("cookie_twice")) >= since + 2, "both are logged")
    logged = server.events("cookie_twice")[since:]
    assert [(event["trace_id"], event["span_id"]) for event in logged] == [(own, "2" * 16), (own, "1" * 16)]


def test_no_malformed_cookie_lets_a_request_pass(server: Server) -> None:
    pieces = st.sampled_from([NAME.encode(), b"=", b";", b" ", b'"', b"A" * 64, b"\t", b"%00", b",", b"\xff", b"\\"])
    headers = st.lists(st.lists(pieces | st.binary(max_size=3), max_size=8).map(b"".join), min_size=1, max_size=3)

    @hypothesis_settings(max_examples=150, derandomize=True)
    @given(headers, st.sampled_from(["?cookie", "?cookie&login=redirect", "?cookie&header=x-token"]))
    def check(cookies: list[bytes], query: str) -> None:
        lines = b"".join(b"Cookie: %s\r\n" % cookie.replace(b"\r", b"").replace(b"\n", b"") for cookie in cookies)
        with Connection(server.port) as fresh:
            answer = fresh.send(b"GET /auth%s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (query.encode(), lines))
        assert answer.status == 401

    check()


def test_a_header_wins_over_the_cookie(connection: Connection, ann: str, bob: str) -> None:
    for header in ({"X_Token": bob}, {"Authorization": f"Bearer {bob}"}):
        assert ask(connection, Cookie=cookie(ann), **header).headers["x-auth-user"] == "bob"
    assert ask(connection, Cookie=cookie(ann), X_Token="x").status == 401
    post = {"X_Forwarded_Method": "POST", "Sec_Fetch_Site": "cross-site"}
    assert ask(connection, Cookie=cookie(ann), X_Token=bob, **post).status == 200, "no foreign page can send a header"


def test_x_token_alone_leaves_authorization_alone(connection: Connection, ann: str, bob: str) -> None:
    query = "?header=x-token"
    assert ask(connection, query, Authorization=f"Bearer {ann}").status == 401
    answer = ask(connection, query, X_Token=bob, Authorization="Bearer of-the-application")
    assert (answer.status, answer.headers["x-auth-user"]) == (200, "bob")
    answer = ask(connection, f"{query}&cookie", Cookie=cookie(ann), Authorization="Bearer of-the-application")
    assert (answer.status, answer.headers["x-auth-user"]) == (200, "ann")
    assert ask(connection, "", X_Token=bob, Authorization="Bearer of-the-application").status == 401


# Not logged in


def target(address: str) -> str:
    """Return where a login page leads back to."""
    parts = urlsplit(address)
    assert f"{parts.scheme}://{parts.netloc}{parts.path}" == f"{AUTH}/login"
    return parse_qs(parts.query)["rd"][0] if parts.query else ""


def test_401_names_the_login_page_and_the_way_back(connection: Connection) -> None:
    answer = ask(connection)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="tokenauth"'
    assert target(answer.headers["x-auth-login"]) == f"{APP}/a?b=c&d=%2F"


NAVIGATIONS = {
    "a navigation": ({"Sec_Fetch_Mode": "navigate"}, 302),
    "a form that was sent": ({"Sec_Fetch_Mode": "navigate", "X_Forwarded_Method": "POST"}, 302),
    "an old browser": ({"Accept": "text/html,*/*;q=0.8"}, 302),
    "a form of an old browser": ({"Accept": "text/html", "X_Forwarded_Method": "POST"}, 401),
    "a fetch": ({"Sec_Fetch_Mode": "cors", "Accept": "text/html"}, 401),
    "an image": ({"Sec_Fetch_Mode": "no-cors", "Accept": "image/avif,*/*"}, 401),
    "a WebSocket": ({"Sec_Fetch_Mode": "websocket"}, 401),
    "a program": ({"Accept": "*/*"}, 401),
    "a program that accepts JSON": ({"Accept": "application/json"}, 401),
    "a program without Accept": ({}, 401),
}


@pytest.mark.parametrize("case", NAVIGATIONS)
def test_only_navigations_are_redirected(connection: Connection, case: str) -> None:
    headers, status = NAVIGATIONS[case]
    answer = ask(connection, "?cookie&login=redirect", **headers)
    assert answer.status == status
    assert answer.headers.get("location") == (answer.headers["x-auth-login"] if status == 302 else None)
    assert target(answer.headers["x-auth-login"]) == f"{APP}/a?b=c&d=%2F"
    assert answer.headers["cache-control"] == "no-store"
    assert ask(connection, "?cookie", **headers).status == 401, "only if the configuration asks for it"


def test_a_cookie_that_is_not_valid_is_deleted(connection: Connection, clock: HandClock, ann: str) -> None:
    clock.advance(24 * 3600)
    for value in (ann, "x", "A" * 64):
        for query in ("?cookie", "?cookie&login=redirect"):
            answer = ask(connection, query, Cookie=cookie(value), Sec_Fetch_Mode="navigate")
            assert answer.status in {401, 302}
            assert deleted(answer) == [
                f"{NAME}=; Path=/; HttpOnly; SameSite=Lax; Secure; Domain=example.com; Max-Age=0",
                "__Host-tokenauth=; Path=/; HttpOnly; SameSite=Lax; Secure; Max-Age=0",
                f"{NAME}=; Path=/; HttpOnly; SameSite=Lax; Secure; Max-Age=0",
                f"{NAME}=; Path=/; HttpOnly; SameSite=Lax; Secure; Domain=auth.example.com; Max-Age=0",
            ]


def test_a_refused_header_does_not_delete_the_cookie(connection: Connection, ann: str, bob: str) -> None:
    """The cookie was not looked at: a script with an old token logs nobody out."""
    for header in ({"X_Token": "x"}, {"Authorization": "Bearer x"}, {"X_Token": bob, "Authorization": f"Bearer {ann}"}):
        answer = ask(connection, Cookie=cookie(ann), **header)
        assert (answer.status, deleted(answer)) == (401, [])
    other = ask(connection, "?cookie&header=x-token", Cookie=cookie("x"), Authorization="Bearer x")
    assert (other.status, len(deleted(other))) == (401, 4), "this Authorization is the application's"


def deleted(answer: Answer) -> list[str]:
    lines = answer.head.decode().split("\r\n")
    return [line.partition(": ")[2] for line in lines if line.startswith("set-cookie: ")]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X_Forwarded_Uri": ""}, f"{APP}/"),
        ({"X_Forwarded_Proto": ""}, ""),
        ({"X_Forwarded_Host": ""}, ""),
        ({"X_Forwarded_Uri": "@evil.example/"}, ""),
        ({"X_Forwarded_Uri": "//evil.example/"}, f"{APP}//evil.example/"),
        ({"X_Forwarded_Host": "evil.example"}, "https://evil.example/a?b=c&d=%2F"),  # the login page refuses it
        ({"X_Forwarded_Uri": "/" + "%41" * 2000}, f"{APP}/"),  # proxies read an answer's headers into a small buffer
        ({"X_Forwarded_Uri": "/x\u00e4?\u00e4=%"}, f"{APP}/x%C3%A4?%C3%A4=%"),
    ],
)
def test_the_way_back_is_what_the_proxy_says(connection: Connection, headers: dict[str, str], expected: str) -> None:
    answer = ask(connection, **headers)
    assert (answer.status, target(answer.headers["x-auth-login"])) == (401, expected)


def test_a_header_that_is_sent_twice_is_left_out(connection: Connection, ann: str) -> None:
    """The proxy appended its own to the client's, or the other way round."""
    head = "GET /auth?cookie HTTP/1.1\r\nHost: x\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil.example\r\n"
    answer = connection.send(f"{head}X-Forwarded-Host: app.example.com\r\n\r\n".encode())
    assert answer.headers["x-auth-login"] == f"{AUTH}/login"
    twice = f"{head}Cookie: {cookie(ann)}\r\nX-Forwarded-Method: GET\r\nX-Forwarded-Method: POST\r\n\r\n"
    assert connection.send(twice.encode()).status == 403


# Pages of other sites

PAGES = {
    "the application": ({"Sec_Fetch_Site": "same-origin", "Origin": APP}, 200),
    "the application, with no-referrer": ({"Sec_Fetch_Site": "same-origin", "Origin": "null"}, 200),
    "a sibling": ({"Sec_Fetch_Site": "same-site", "Origin": "https://sibling.example.com"}, 200),
    "an old browser": ({"Origin": APP}, 200),
    "the login page": ({"Sec_Fetch_Site": "cross-site", "Origin": AUTH}, 200),
    "another site": ({"Sec_Fetch_Site": "cross-site", "Origin": "https://evil.example"}, 403),
    "another site, old browser": ({"Origin": "https://evil.example"}, 403),
    "a frame": ({"Origin": "null"}, 403),
    "http": ({"Origin": "http://app.example.com"}, 403),
    "a prefix": ({"Origin": f"{APP}.evil.example"}, 403),
    "typed by a person": ({"Sec_Fetch_Site": "none"}, 403),
    "nothing": ({}, 403),
}


@pytest.mark.parametrize("case", PAGES)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "PROPFIND", "get", "X", "TRACE"])
def test_only_own_pages_change_something(connection: Connection, ann: str, case: str, method: str) -> None:
    headers, status = PAGES[case]
    answer = ask(connection, Cookie=cookie(ann), X_Forwarded_Method=method, **headers)
    assert answer.status == status
    assert ("x-auth-user" in answer.headers) is (status == 200)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_any_page_may_link_to_an_application(connection: Connection, ann: str, method: str) -> None:
    """Browsers send the cookie with a link of another site, because of SameSite=Lax."""
    sent = {"X_Forwarded_Method": method, "Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert ask(connection, Cookie=cookie(ann), **sent).status == 200


def test_a_websocket_of_another_site_is_refused(connection: Connection, ann: str) -> None:
    """It is a GET, and yet can change something."""
    sent = {"Sec_Fetch_Mode": "websocket", "Sec_Fetch_Site": "cross-site"}
    assert ask(connection, Cookie=cookie(ann), Origin="https://evil.example", **sent).status == 403
    assert ask(connection, Cookie=cookie(ann), Origin=APP, **sent).status == 200


def test_a_websocket_without_a_mode_is_unsafe(connection: Connection, ann: str) -> None:
    """Not all browsers send Sec-Fetch-Mode with a WebSocket, which is a GET. They send Origin with each."""
    sent = {"Cookie": cookie(ann), "X_Forwarded_Method": "GET"}
    assert ask(connection, **sent, Origin="https://evil.example").status == 403
    assert ask(connection, **sent, Origin=APP).status == 200
    assert ask(connection, **sent, Origin="https://evil.example", Sec_Fetch_Mode="cors").status == 200


def test_without_a_method_an_origin_makes_a_request_unsafe(connection: Connection, server: Server, ann: str) -> None:
    """A proxy that does not name the method may ask with GET about a POST, with which browsers send Origin."""
    assert ask(connection, Cookie=cookie(ann), X_Forwarded_Method="").status == 200
    foreign = {"X_Forwarded_Method": "", "Origin": "https://evil.example"}
    assert ask(connection, Cookie=cookie(ann), **foreign).status == 403
    assert server.events("access_denied")[-1]["reason"] == "foreign_origin"
    assert ask(connection, Cookie=cookie(ann), **foreign, Sec_Fetch_Site="same-origin").status == 200
    assert ask(connection, Cookie=cookie(ann), X_Forwarded_Method="", Origin=APP).status == 200


@pytest.mark.parametrize("forwarded", ["", "GET", "POST"])
def test_the_method_of_the_question_counts_too(connection: Connection, ann: str, forwarded: str) -> None:
    """Envoy asks with the method of the request. What a client claims in a header makes nothing safe."""
    sent = {**PAGE, "X_Forwarded_Method": forwarded, "Cookie": cookie(ann), "Origin": "https://evil.example"}
    sent = {name: value for name, value in sent.items() if value}
    assert connection.ask("POST", "/auth?cookie", **sent).status == 403
    assert connection.ask("POST", "/auth?cookie", **{**sent, "Origin": APP}).status == 200


# The query


@pytest.mark.parametrize(
    "query",
    [
        "?cookie=1",
        "?cookie=false",
        "?cookies",
        "?Cookie",
        "?cookie&login",
        "?cookie&login=redirected",
        "?cookie&login=Redirect",
        "?login=redirect",
        "?cookie&header=authorization",
        "?cookie&header=X-Token",
        "?cookie&header",
        "?cookie&scop=read",
        "?cookie&scope=",
        "?cookie&rd=https://evil.example",
    ],
)
def test_a_mistyped_query_lets_nobody_pass(connection: Connection, ann: str, query: str) -> None:
    assert ask(connection, query, X_Token=ann).status == 403
    assert ask(connection, query, Cookie=cookie(ann)).status in {401, 403}


def test_scopes_are_required_as_ever(connection: Connection, ann: str, bob: str) -> None:
    for query in ("?cookie&scope=read", "?scope=read&cookie&login=redirect", "?cookie&path=/x?scope=write"):
        assert ask(connection, query, Cookie=cookie(ann)).status == 200
    assert ask(connection, "?cookie&scope=read", Cookie=cookie(bob)).status == 403
    assert ask(connection, "?cookie&path=/x&scope=admin", Cookie=cookie(ann)).status == 403


@pytest.mark.parametrize("filler", ["x" * 9000, "&" * 200])
def test_a_long_path_of_a_client_forgets_no_switch(connection: Connection, filler: str) -> None:
    answer = ask(connection, f"?cookie&login=redirect&path=/{filler}", Accept="text/html", Sec_Fetch_Mode="navigate")
    assert answer.status == 302
    assert answer.headers["location"].startswith(f"{AUTH}/login?rd=")
