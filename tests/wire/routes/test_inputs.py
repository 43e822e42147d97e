"""No input makes a 5xx: invalid input is refused with a description of the fault, and the server keeps working.

The hostile inputs are B37 to B42 of the list of known attacks (security-and-reliability.md).
"""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.servers import Server, exchange, log_in, probe

T = "u" * 64
KIB = 1024

CAROL = """
[[users]]  # the password is carol-secret
username = "carol"
password = "$2b$04$vzBnxZ6ElN8eTQOKNG8uRuSwRMLK9A9/Ua6BvU94kRMClFIrWaP3W"
"""


@pytest.fixture(scope="module")
def settings() -> str:
    return f"[pools.p]\n{CAROL}"


@pytest.fixture(autouse=True)
def _server_still_works(server: Server) -> Iterator[None]:
    """Check after each test that the server answers and has logged no error."""
    yield
    assert exchange(server.port, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
    assert server.errors() == []
    assert "Traceback" not in server.log.read_text()


def request(method: str, target: str, headers: bytes = b"", body: bytes = b"", sized: bool = True) -> bytes:
    """Return the bytes of a request; `headers` end with CRLF."""
    length = f"Content-Length: {len(body)}\r\n" if sized else ""
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n{length}".encode() + headers + b"\r\n" + body


def login(body: bytes, headers: bytes = b"Content-Type: application/json\r\n") -> bytes:
    return request("POST", "/api/token", headers, body)


def probe_bytes(query: str) -> bytes:
    return request("GET", f"/api/token?{query}", sized=False)


def guarded(headers: bytes, method: str = "GET", target: str = "/api/me") -> bytes:
    return request(method, target, headers, sized=False)


def chunked(*chunks: bytes) -> bytes:
    """Return a login with a chunked body."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return request("POST", "/api/token", b"Transfer-Encoding: chunked\r\n", body + b"0\r\n\r\n", sized=False)


def with_name(name: str) -> bytes:
    """Return a login with this JSON as the username."""
    return login(f'{{"username": {name}, "password": "x"}}'.encode("utf-8", "surrogatepass"))


def with_password(password: str) -> bytes:
    """Return a login with this JSON as the password."""
    return login(f'{{"username": "admin", "password": {password}}}'.encode("utf-8", "surrogatepass"))


LOGIN = b'{"username": "admin", "password": "admin"}'
LOGIN_TEXT = LOGIN.decode()
MALFORMED = "Invalid HTTP request"

HOSTILE: dict[str, tuple[bytes, int, str]] = {
    # B37: size
    "a body over the limit": (login(b" " * (16 * KIB + 1 - len(LOGIN)) + LOGIN), 413, "16 KiB"),
    "chunks over the limit": (chunked(*[b" " * KIB] * 16, LOGIN), 413, "16 KiB"),
    "a length that is not reached": (
        request("POST", "/api/token", b"Content-Length: 999999999\r\n", b" " * 17 * KIB, sized=False), 413, "16 KiB",
    ),
    "a length below 0": (request("POST", "/api/token", b"Content-Length: -1\r\n", sized=False), 400, MALFORMED),
    "a length in letters": (request("POST", "/api/token", b"Content-Length: ten\r\n", sized=False), 400, MALFORMED),
    "a length of 23 digits": (
        request("POST", "/api/token", b"Content-Length: 99999999999999999999999\r\n", sized=False), 400, MALFORMED,
    ),
    "two lengths": (login(LOGIN, b"Content-Length: 3\r\n"), 400, MALFORMED),
    "a length and chunks": (login(LOGIN, b"Transfer-Encoding: chunked\r\n"), 400, MALFORMED),
    "an unknown transfer encoding": (login(LOGIN, b"Transfer-Encoding: xchunked\r\n"), 400, MALFORMED),
    "a chunk of no size": (
        request("POST", "/api/token", b"Transfer-Encoding: chunked\r\n", b"zz\r\n", sized=False), 400, MALFORMED,
    ),
    "gzip": (login(LOGIN, b"Content-Encoding: gzip\r\n"), 415, "has a Content-Encoding."),
    "a header block over 16 KiB": (guarded(b"X-Junk: " + b"x" * 20 * KIB + b"\r\n"), 431, ""),
    "a query over 8 KiB": (probe_bytes(f"token={T}&x=" + "x" * 8 * KIB), 400, "8 KiB"),
    "a path over 16 KiB": (request("GET", "/" + "x" * 17 * KIB), 431, "16 KiB"),
    "more than 100 fields": (probe_bytes("x=1&" * 101 + f"token={T}"), 400, "100 fields"),
    # B42: form
    "a form": (login(b"username=admin", b"Content-Type: application/x-www-form-urlencoded\r\n"), 415, "JSON"),
    "text": (login(LOGIN, b"Content-Type: text/plain\r\n"), 415, "JSON"),
    "an empty content type": (login(LOGIN, b"Content-Type:\r\n"), 415, "JSON"),
    "another charset": (login(LOGIN, b"Content-Type: application/json; charset=latin-1\r\n"), 415, "UTF-8"),
    "a charset like UTF-8": (login(LOGIN, b"Content-Type: application/json; charset=utf-8x\r\n"), 415, "UTF-8"),
    # B38: JSON
    "an array": (login(b"[]"), 400, "must be a JSON object"),
    "a number": (login(b"1"), 400, "must be a JSON object"),
    "a string": (login(b'"admin"'), 400, "must be a JSON object"),
    "null": (login(b"null"), 400, "must be a JSON object"),
    "no fields": (login(b"{}"), 400, r'Missing field \"username\".'),
    "no password": (login(b'{"username": "admin"}'), 400, r'Missing field \"password\".'),
    "no password, and a number as name": (login(b'{"username": 1}'), 400, "username: must be a string, not a number."),
    "a huge number as name": (with_name("9" * 5000), 400, "username"),
    "a number out of range": (with_password("1e400"), 400, "password"),
    "NaN": (with_password("NaN"), 400, "not JSON"),
    "Infinity": (with_password("-Infinity"), 400, "not JSON"),
    "true": (with_password("true"), 400, "password"),
    "100,000 levels": (login(b"[" * 100_000), 413, "16 KiB"),
    "100,000 levels in chunks": (chunked(*[b'{"x":' * 200] * 100), 413, "16 KiB"),
    "16,000 levels": (login(b"[" * 16_000), 400, "deep"),
    "nesting in an unknown field": (login(b'{"x": ' + b"[" * 8000 + b"]" * 8000 + b"}"), 400, "deep"),
    "levels of objects": (login(b'{"x":' * 3000), 400, "deep"),
    "a BOM": (login(b"\xef\xbb\xbf" + LOGIN), 400, "byte order mark. Send UTF-8 without one."),
    "UTF-16": (login(LOGIN_TEXT.encode("utf-16")), 400, "UTF-8"),
    "UTF-16 without a BOM": (login(LOGIN_TEXT.encode("utf-16-le")), 400, "not JSON: object keys must be strings"),
    "UTF-32": (login(LOGIN_TEXT.encode("utf-32-be")), 400, "not JSON"),
    "a key twice": (login(b'{"username": "admin", "password": "x", "password": "admin"}'), 400, "password"),
    "a key twice, once wrong": (login(b'{"username": 1, "username": "admin", "password": "admin"}'), 400, "twice"),
    "a key twice, once escaped": (
        login(rb'{"username": "bob", "\u0075sername": "admin", "password": "admin"}'), 400, "twice",
    ),
    "more after the end": (login(LOGIN + LOGIN), 400, "not JSON: trailing characters (byte 43)."),
    "single quotes": (login(b"{'username': 'admin'}"), 400, "not JSON: object keys must be strings (byte 1)."),
    "no brace at the end": (login(LOGIN[:-1]), 400, "not JSON: it ends too early, or an escape sequence in it does."),
    "a trailing comma": (login(LOGIN[:-1] + b",}"), 400, "not JSON: trailing comma in object (byte 42)."),
    "a comment": (login(b"/**/" + LOGIN), 400, "not JSON"),
    # B39: text
    "a lone surrogate escaped": (with_name(r'"\ud800"'), 400, "not JSON"),
    "a lone surrogate in bytes": (with_name('"\ud800"'), 400, "UTF-8"),
    "an escaped surrogate in a password": (with_password(r'"\udfff\ud800"'), 400, "not JSON"),
    "NUL in a name": (with_name(r'"admin\u0000"'), 400, "username"),
    "NUL in a password": (with_password(r'"admin\u0000"'), 400, "password"),
    "a bare NUL": (with_name('"admin\0"'), 400, "not JSON"),
    "overlong UTF-8": (login(b'{"username": "\xc0\xae", "password": "x"}'), 400, "UTF-8"),
    "invalid UTF-8": (login(b'{"username": "\xff\xfe", "password": "x"}'), 400, "not UTF-8 (byte 14)."),
    "cut UTF-8": (login(b'{"username": "\xe2\x82", "password": "x"}'), 400, "UTF-8"),
    "invalid UTF-8 in an unknown field": (login(LOGIN[:-1] + b', "x": "\xff"}'), 400, "UTF-8"),
    "a very long name": (with_name(json.dumps("x" * 257)), 400, "username"),
    "a very long non-ASCII name": (with_name(json.dumps("\N{LATIN SMALL LIGATURE FFI}" * 257)), 400, "username"),
    "a password of 1,025 characters": (with_password(json.dumps("x" * 1025)), 400, "password"),
    "a password of 1,024 characters": (with_password(json.dumps("é" * 1024)), 401, "invalid credentials"),
    "bcrypt over 72 bytes": (
        login(json.dumps({"username": "carol", "password": "carol-secret" * 7}).encode()), 401, "invalid credentials",
    ),
    "a name with a right-to-left override": (with_name(r'"\u202enimda"'), 401, "invalid credentials"),
    "an invisible character": (with_name(r'"admin\u200b"'), 401, "invalid credentials"),
    # B40, B41: queries, ids and headers
    "a token twice": (probe_bytes("token=a&token=b"), 400, "several different"),
    "a very long id": (guarded(b"X-Token: x\r\n", "DELETE", "/api/tokens/" + "x" * 5000), 401, "invalid_token"),
    "an id with a quote": (guarded(b"X-Token: x\r\n", "DELETE", "/api/tokens/'%20OR%201=1--"), 401, "invalid_token"),
    "an id with .. in it": (guarded(b"", "DELETE", "/api/tokens/..%2F..%2Fetc"), 404, "nothing at this address"),
    "bytes as token": (guarded(b"X-Token: \xff\xfe\x80\r\n"), 401, "invalid_token"),
    "NUL in a header": (guarded(b"X-Token: x\0x\r\n"), 400, MALFORMED),
    "a bare CR in a header": (guarded(b"X-Token: x\rX: y\r\n"), 400, MALFORMED),
    "a folded header": (guarded(b"X-Token: x\r\n y\r\n"), 400, MALFORMED),
    "a blank before the colon": (guarded(b"X-Token : x\r\n"), 400, MALFORMED),
    "a header without a name": (guarded(b": x\r\n"), 400, MALFORMED),
    "a header without a colon": (guarded(b"junk\r\n"), 400, MALFORMED),
    "two tokens": (guarded(b"X-Token: x\r\nX-Token: y\r\n"), 400, "two different tokens"),
    # B42: paths and methods
    "a path traversal": (request("GET", "/../../etc/passwd"), 404, "nothing at this address"),
    "an encoded path traversal": (request("GET", "/%2e%2e/%2e%2e/etc/passwd"), 404, "nothing at this address"),
    "a doubled slash": (request("GET", "//api/me"), 404, "nothing at this address"),
    "a slash too many": (request("GET", "/api/me/"), 404, "Remove the slash at the end."),
    "a slash too many after an id": (request("GET", "/api/tokens/x/"), 404, "Remove the slash at the end."),
    "a slash after an unknown path": (request("GET", "/api/nothing/"), 404, 'nothing at this address."'),
    "a path after the asterisk": (request("GET", "*/api/token"), 400, MALFORMED),
    "CRLF in a path": (request("GET", "/api/token%0d%0aX-Token:%20x"), 404, "nothing at this address"),
    "a blank in a path": (request("GET", "/api/token x"), 400, MALFORMED),
    "invalid UTF-8 in a path": (request("GET", "/%ff%fe%c0%ae"), 404, "nothing at this address"),
    "TRACE": (request("TRACE", "/api/token"), 405, "supports GET"),
    "CONNECT": (request("CONNECT", "example.com:443"), 400, MALFORMED),
    "CONNECT to a route": (request("CONNECT", "/api/token", sized=False), 400, MALFORMED),
    "an unknown method": (request("BREW", "/api/token"), 400, MALFORMED),
    "a method in small letters": (request("get", "/api/token"), 400, MALFORMED),
    "an upgrade": (guarded(b"Upgrade: websocket\r\nConnection: Upgrade\r\n"), 401, "token_required"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, MALFORMED),
    "HTTP/9.9": (b"GET /healthz HTTP/9.9\r\n\r\n", 400, MALFORMED),
    "half a request line": (b"GET\r\n\r\n", 400, MALFORMED),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400, MALFORMED),
    "garbage": (bytes(range(128, 256)) * 8, 400, MALFORMED),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_input_is_refused_with_a_reason(server: Server, fault: str) -> None:
    sent, status, named = HOSTILE[fault]
    answered, _, body = exchange(server.port, sent)
    assert answered == status, body
    assert named.lower() in body.decode().lower()


@pytest.mark.parametrize("query", ["token=", "token", "token=%00", "token=%ff%fe", "token=%ed%a0%80", f"token={T};x=1"])
def test_a_query_without_a_token_is_200_and_invalid(server: Server, query: str) -> None:
    status, _, body = exchange(server.port, probe_bytes(query))
    assert (status, json.loads(body)) == (200, {"valid": False, "expiry_time": None})


@pytest.mark.parametrize(
    "sent",
    [
        login(LOGIN + b" " * (16 * KIB - len(LOGIN))),
        login(LOGIN, b""),
        login(LOGIN, b"Content-Type: application/json\r\nAccept: image/png\r\n"),
        login(LOGIN, b'Content-Type: Application/JSON; charset="UTF-8"\r\n'),
        login(LOGIN[:-1] + b', "more": [{"is": "ignored"}]}'),
        login(b'{"username": "carol", "password": "carol-secret"}'),
        login(rb'{"username": "\u0061dmin", "password": "\u0061dmin"}'),
        chunked(LOGIN[:20], LOGIN[20:]),
    ],
)
def test_unusual_but_valid_input_is_accepted(server: Server, sent: bytes) -> None:
    assert exchange(server.port, sent)[0] == 200


@pytest.mark.parametrize(("method", "status"), [("POST", 413), ("DELETE", 200)])
def test_an_endless_body_is_answered_early(server: Server, method: str, status: int) -> None:
    head = request(method, "/api/token", b"Transfer-Encoding: chunked\r\n", sized=False)
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    assert exchange(server.port, head + chunk * 20)[0] == status


def test_an_endless_header_is_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Junk: " + b"x" * 128 * KIB)
        assert b" 431 " in connection.recv(KIB) or not connection.recv(KIB)


def test_a_header_cannot_inject_a_header_or_log_line(server: Server, client: httpx.Client) -> None:
    agent = '"}\\n{"event": "unexpected_error", "level": "error"} %s {0} ${HOME}'
    token = log_in(client, headers={"User-Agent": agent})
    shown = client.get("/api/tokens", headers={"X-Token": token}).json()["tokens"][0]["user_agent"]
    assert shown == agent
    assert client.delete("/api/tokens/%0d%0aX-Evil:%201", headers={"X-Token": token}).status_code == 404
    assert client.get("/api/tokens?user=%0d%0aX-Evil:%201", headers={"X-Token": token}).status_code == 200
    assert probe(client, token)


POOLS = ["/api/pools", "/api/pools/p", "/api/pools/p/tokens", "/api/pools/p/leases", "/api/pools/p/leases/t"]
ROUTES = ["/api/token", "/api/me", "/api/tokens", f"/api/tokens/{'0' * 24}", *POOLS, "/healthz", "/readyz", "/", "*"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
HEADERS = [
    "X-Token",
    "Authorization",
    "Content-Type",
    "Content-Encoding",
    "X-Forwarded-For",
    "User-Agent",
    "Cookie",
    "Origin",
]

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["username", "password", "token"]) | st.text(), inner)
    ),
)
bodies = st.binary() | documents.map(lambda document: json.dumps(document).encode())
values = st.binary() | st.binary().map(lambda junk: b"Bearer " + junk) | st.text().map(str.encode)
queries = (
    st.binary() | st.binary().map(lambda junk: b"token=" + junk) | st.text().map(lambda text: b"user=" + text.encode())
)


@hypothesis_settings(max_examples=60)
@given(
    method=st.sampled_from(METHODS),
    route=st.sampled_from(ROUTES),
    query=queries,
    headers=st.lists(st.tuples(st.sampled_from(HEADERS), values), max_size=3),
    body=bodies,
)
def test_no_bytes_make_a_5xx_or_open_a_guarded_route(
    server: Server, method: str, route: str, query: bytes, headers: list[tuple[str, bytes]], body: bytes
) -> None:
    lines = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers)
    sent = b"%s %s?%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % (method.encode(), route.encode(), query)
    status = first_status(server.port, sent + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert 200 <= status < 500
    assert not (route.startswith(("/api/me", "/api/tokens", "/api/pools")) and status < 300)


@hypothesis_settings(max_examples=60)
@given(junk=st.binary(min_size=1))
def test_random_bytes_on_a_socket_are_400(server: Server, junk: bytes) -> None:
    assert first_status(server.port, junk + b"\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") in {200, 400}


def first_status(port: int, sent: bytes) -> int:
    """Send bytes and return the status of the first response, without reading its body."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        data = b""
        while len(data) < 12:
            more = connection.recv(4096)
            assert more, f"the connection was closed after {data!r}"
            data += more
    return int(data[9:12])
