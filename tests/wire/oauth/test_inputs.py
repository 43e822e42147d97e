"""Malformed forms and headers get a 4xx with a description, never a 5xx, and never access."""

import json
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.connections import Answer, Closed, Connection
from tests.support.servers import Server, exchange
from tests.wire.oauth.forms import ENDPOINTS, GATEWAY, INACTIVE, basic, form_bytes

KIB = 1024
FORM = "application/x-www-form-urlencoded"
GATEWAY_BASIC = basic(":".join(GATEWAY))


@pytest.fixture(scope="module")
def settings() -> str:
    """Disable the throttle in effect, so that each attempt is checked."""
    return "[throttle]\nfree = 1000000\nnetwork_free = 1000000"


class KeptConnection:
    """A connection that is reused, and replaced after the server has closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = Connection(port)

    def send(self, request: bytes) -> Answer:
        """Send bytes and read the response."""
        try:
            return self._connection.send(request)
        except Closed:
            self.close()
            self._connection = Connection(self.port)
            return self._connection.send(request)

    def close(self) -> None:
        self._connection.close()


@pytest.fixture(scope="module")
def kept(server: Server) -> Iterator[KeptConnection]:
    connection = KeptConnection(server.port)
    yield connection
    connection.close()


def with_type(kind: str | None, body: bytes, *lines: str) -> bytes:
    """Return an introspection request of the gateway with this content type."""
    sent = form_bytes("introspect", GATEWAY_BASIC, body, *lines)
    return sent.replace(f"Content-Type: {FORM}\r\n".encode(), f"Content-Type: {kind}\r\n".encode() if kind else b"")


def introspection(body: bytes) -> bytes:
    """Return an introspection request of the gateway."""
    return form_bytes("introspect", GATEWAY_BASIC, body)


def padded(size: int) -> bytes:
    """Return a valid form of this size."""
    return b"token=x&y=" + b"z" * (size - 10)


CHUNKS = b"1000\r\n" + b"x" * 4096 + b"\r\n"

HOSTILE: dict[str, tuple[bytes, int, str]] = {
    # B37, B42: size and type
    "no type": (with_type(None, b"token=x"), 400, "Content-Type"),
    "JSON": (with_type("application/json", b'{"token": "x"}'), 400, "Content-Type"),
    "text": (with_type("text/plain", b"token=x"), 400, "Content-Type"),
    "multipart": (with_type("multipart/form-data; boundary=x", b"--x--"), 400, "Content-Type"),
    "a type with the right prefix": (with_type(FORM + "2", b"token=x"), 400, "Content-Type"),
    "two types": (with_type(FORM, b"token=x", "Content-Type: text/plain"), 400, "Content-Type"),
    "gzip": (with_type(FORM, b"token=x", "Content-Encoding: gzip"), 400, "Content-Encoding"),
    "a body over the limit": (introspection(padded(16 * KIB + 1)), 413, "16 KiB"),
    "an endless body": (
        introspection(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + CHUNKS * 8, 413, "16 KiB",
    ),
    "no body": (introspection(b""), 400, "token"),
    "101 fields": (introspection(b"&".join(b"f%d=x" % number for number in range(101))), 400, "100 fields"),
    # a field twice (RFC 6749 section 3.2)
    "a token twice": (introspection(b"token=x&token=y"), 400, "twice"),
    "the same token twice": (introspection(b"token=x&token=x"), 400, "twice"),
    "an unknown field twice": (introspection(b"token=x&y=1&y=2"), 400, "twice"),
    "a field twice, once encoded": (introspection(b"token=x&%74oken=y"), 400, "twice"),
    # B39: text
    "bytes that are not UTF-8": (introspection(b"token=\xff\xfe"), 400, "UTF-8"),
    "encoded bytes that are not UTF-8": (introspection(b"token=%ff%fe"), 400, "UTF-8"),
    "overlong UTF-8": (introspection(b"token=%c0%ae"), 400, "UTF-8"),
    "a lone surrogate": (introspection(b"token=%ed%a0%80"), 400, "UTF-8"),
    "a field name that is not UTF-8": (introspection(b"token=x&%ff=y"), 400, "UTF-8"),
    "UTF-16": (introspection("token=x".encode("utf-16")), 400, "UTF-8"),
    # names and secrets of clients
    "NUL in a name": (form_bytes("token", "", b"grant_type=x&client_id=a%00b&client_secret=x"), 400, "username"),
    "NUL in a secret": (form_bytes("token", "", b"grant_type=x&client_id=a&client_secret=x%00"), 400, "password"),
    "NUL in Basic": (form_bytes("token", basic("ann:\0"), b"grant_type=x"), 400, "password"),
    "a name too long": (form_bytes("token", basic("x" * 257 + ":y"), b"grant_type=x"), 400, "username"),
    "a secret too long": (form_bytes("token", basic("x:" + "y" * 1025), b"grant_type=x"), 400, "password"),
    "a secret of the maximum length": (form_bytes("token", basic("x:" + "y" * 1024), b"grant_type=x"), 401, "client"),
    "a header over the limit": (form_bytes("token", basic("x:" + "y" * 16 * KIB), b"grant_type=x"), 431, ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_form_is_refused_with_a_reason(server: Server, fault: str) -> None:
    sent, status, named = HOSTILE[fault]
    answered, _, body = exchange(server.port, sent)
    assert answered == status, body
    assert named in body.decode()


@pytest.mark.parametrize(
    "sent",
    [
        with_type(FORM.upper() + "; charset=UTF-8", b"token=x"),
        with_type(FORM + " ;charset=utf-8", b"token=x"),
        introspection(padded(16 * KIB)),
        introspection(b"&".join([b"token=x", *(b"f%d=x" % number for number in range(99))])),
        introspection(b"&&token=x&&"),
        introspection(b"token=x;token=y"),
        introspection(b"token=x&empty=&empty="),
        introspection(b"token=%zz%"),
        introspection(b"token=%c3%a4&%c3%a4=+"),
        introspection(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"7\r\ntoken=x\r\n0\r\n\r\n",
    ],
    ids=range(10),
)
def test_unusual_but_valid_input_is_accepted(server: Server, sent: bytes) -> None:
    status, _, body = exchange(server.port, sent)
    assert (status, body) == (200, INACTIVE)


FIELDS = ["grant_type", "scope", "token", "token_type_hint", "client_id", "client_secret", "username", "password"]
WORDS = [
    "client_credentials",
    "password",
    "refresh_token",
    "ann",
    "gateway",
    "introspect",
    "read",
    "access_token",
    "nobody",
]

printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=40)
words = st.sampled_from(WORDS) | st.text(max_size=20)
fields = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), words, max_size=6)
bodies = (
    fields.map(lambda form: urlencode(form, errors="surrogatepass").encode())
    | st.binary(max_size=60)
    | st.binary(max_size=30).map(lambda junk: b"token=" + junk + b"&grant_type=client_credentials")
    | fields.map(lambda form: json.dumps(form).encode())
)
kinds = st.sampled_from([FORM, FORM, FORM, FORM + "; charset=utf-8", "application/json", "text/plain"]) | printable
headers = (
    st.none()
    | printable
    | printable.map(lambda junk: "Basic " + junk)
    | printable.map(lambda junk: "Bearer " + junk)
    | st.binary(max_size=30).map(basic)
    | st.tuples(words, words).map(lambda pair: basic(":".join(pair).encode("utf-8", "surrogatepass")))
)


def request_bytes(endpoint: str, kind: str, authorization: str | None, body: bytes) -> bytes:
    """Return the bytes of a request, with headers in latin-1."""
    head = f"POST /oauth/{endpoint} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    if authorization is not None:
        head += f"Authorization: {authorization}\r\n"
    return f"{head}\r\n".encode("latin-1") + body


@hypothesis_settings(max_examples=120)
@given(endpoint=st.sampled_from(ENDPOINTS), kind=kinds, authorization=headers, body=bodies)
def test_random_input_without_a_client_gets_an_error(
    kept: KeptConnection, endpoint: str, kind: str, authorization: str | None, body: bytes
) -> None:
    answer = kept.send(request_bytes(endpoint, kind, authorization, body))
    assert answer.status in {400, 401, 413}, answer
    assert set(answer.json()) == {"error", "error_description"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"


@hypothesis_settings(max_examples=80)
@given(endpoint=st.sampled_from(ENDPOINTS), kind=kinds, in_form=st.booleans(), form=fields, junk=st.binary(max_size=20))
def test_random_input_of_a_client_grants_no_extra_scope(
    kept: KeptConnection, endpoint: str, kind: str, in_form: bool, form: dict[str, str], junk: bytes
) -> None:
    if in_form:
        form |= {"client_id": GATEWAY[0], "client_secret": GATEWAY[1]}
    body = urlencode(form, errors="surrogatepass").encode() + junk
    answer = kept.send(request_bytes(endpoint, kind, None if in_form else GATEWAY_BASIC, body))
    if answer.status == 200 and endpoint == "token":
        assert form["grant_type"] == "client_credentials"
        assert answer.json()["scope"] == "introspect"
    elif answer.status == 200:
        assert answer.body == (INACTIVE if endpoint == "introspect" else b"")
    else:
        assert answer.status in {400, 401}
        assert set(answer.json()) == {"error", "error_description"}
