"""No input to the pools makes a 5xx. Invalid input changes nothing and is refused with a description of the fault."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.connections import Answer, Connection
from tests.support.pool_users import PoolUser
from tests.support.servers import USERS, HandClock, Server, write_config

KIB = 1024
DIGITS = "9" * 5000
ODD_NAMES = ["жанна\u0301 \N{BLACK CHESS KING}", "\N{LATIN SMALL LIGATURE FFI}" * 256]


@pytest.fixture(scope="module")
def config_file(directory: Any) -> Any:
    """Configure a pool, and users with unusual names and the password of ann."""
    ann = USERS.partition('username = "ann"\n')[2].partition("\n")[0]
    odd = [f"[[users]]\nusername = {json.dumps(name)}\n{ann}\n" for name in ODD_NAMES]
    return write_config(directory, "[pools.fuzzed]\n[pools.any]\nlease_ttl = 1000000", USERS + "\n".join(odd))


class Scene(NamedTuple):
    """An admin, and a pool with a free token and a leased one."""

    connection: Connection
    port: int
    admin: PoolUser
    leased: str

    def send(self, method: str, path: str, body: bytes = b"", headers: bytes = b"", sized: bool = True) -> Answer:
        """Send a request with any bytes as its body."""
        lines = f"{method} /api/pools/any{path.replace('LEASED', self.leased)} HTTP/1.1\r\nHost: x\r\n"
        length = f"Content-Length: {len(body)}\r\n" if sized else ""
        head = f"{lines}X-Token: {self.admin.token}\r\n{length}".encode() + headers
        with Connection(self.port) as connection:
            return connection.send(head + b"\r\n" + body)


@pytest.fixture(scope="module")
def shared(server: Server, clock: HandClock) -> Iterator[Scene]:
    """Lease one of two tokens, for longer than the tests last."""
    with Connection(server.port) as connection:
        admin = PoolUser(connection)
        admin.generate("any", 2)
        yield Scene(connection, server.port, admin, admin.assign("any", "ci-7").token)


@pytest.fixture
def scene(shared: Scene, server: Server) -> Iterator[Scene]:
    """Check after the test that the pool is unchanged and that no error was logged."""
    scene = shared._replace(admin=PoolUser(shared.connection))
    before = scene.admin.call("GET", "/any")
    yield scene
    assert scene.admin.call("GET", "/any") == before
    assert server.errors() == []
    assert "Traceback" not in server.log.read_text()


def refused(answer: Answer, status: int, named: str) -> None:
    """Assert that a response is a refusal that names the fault."""
    assert answer.status == status, answer
    assert answer.json()["error"] == "invalid_request"
    assert named.lower() in answer.json()["error_description"].lower()


WITH_BODY = [("POST", "/tokens"), ("POST", "/leases"), ("PUT", "/leases/LEASED"), ("DELETE", "/leases/LEASED")]
NOT_INTEGERS = ["true", '"2"', "1.5", "1.0", "1e0", "1e400", DIGITS, "[]", "[1]", "{}"]
NOT_STRINGS = ["1", "1.5", "true", "[]", '["x"]', "{}", '{"x": 1}']


@pytest.mark.parametrize(
    "count", [*NOT_INTEGERS, "0", "-1", "1001", str(2**63), str(2**64), "-" + DIGITS, "null"], ids=range(17)
)
def test_a_count_is_a_whole_number_from_1_to_1000(scene: Scene, count: str) -> None:
    refused(scene.send("POST", "/tokens", f'{{"count": {count}}}'.encode()), 400, "count")


@pytest.mark.parametrize("route", [("PUT", "/leases/LEASED"), ("DELETE", "/leases/LEASED")], ids=str)
@pytest.mark.parametrize("fence", NOT_INTEGERS, ids=range(len(NOT_INTEGERS)))
def test_a_fence_is_a_whole_number(scene: Scene, route: tuple[str, str], fence: str) -> None:
    refused(scene.send(*route, f'{{"holder": "ci-7", "fence": {fence}}}'.encode()), 400, "fence")


@pytest.mark.parametrize("route", WITH_BODY[1:], ids=str)
@pytest.mark.parametrize("holder", NOT_STRINGS)
def test_a_holder_is_text(scene: Scene, route: tuple[str, str], holder: str) -> None:
    refused(scene.send(*route, f'{{"holder": {holder}}}'.encode()), 400, "holder")


@pytest.mark.parametrize(
    "holder",
    [
        "",
        "x" * 257,
        "é" * 257,
        "\0",
        "ci\0",
        "\n",
        "ci\r\nX-Evil: 1",
        "\x1b[2J",
        "\x7f",
        "\x85",
        "\u200b",
        "\u202e7-ic",
    ],
    ids=range(12),
)
def test_a_holder_is_1_to_256_visible_characters(scene: Scene, holder: str) -> None:
    refused(scene.send("POST", "/leases", json.dumps({"holder": holder}).encode()), 400, "holder: ")


@pytest.mark.parametrize("holder", ["a", " ", "x" * 256, "жанна", "\U0001f511" * 256, 'ci-7 "<b>" \\ %00 {} ${HOME}'])
def test_any_other_text_is_a_holder(shared: Scene, holder: str) -> None:
    admin = PoolUser(shared.connection)
    lease = admin.assign("any", holder)
    assert lease.holder == holder
    assert admin.keep_alive("any", lease.token, holder=holder)[0] == 200
    assert admin.release("any", lease.token, holder=holder) == (204, None)


@pytest.mark.parametrize("name", ["admin", "bob", *ODD_NAMES], ids=range(4))
def test_every_user_can_lease_under_its_own_name(shared: Scene, name: str) -> None:
    """The default holder is the username."""
    password = {"admin": "admin", "bob": "bob-secret"}.get(name, "ann-secret")
    token = shared.connection.log_in(name, password)
    mine = shared.connection.ask("GET", "/api/me", X_Token=token).json()["username"]
    answer = shared.connection.ask("POST", "/api/pools/any/leases", X_Token=token)
    assert (answer.status, answer.json().get("holder")) == (201, mine)
    path = f"/api/pools/any/leases/{answer.json()['token']}"
    assert shared.connection.ask("DELETE", path, {"holder": mine}, X_Token=token).status == 204


CHUNKED = b"Transfer-Encoding: chunked\r\n"
JUNK = b"".join(b"400\r\n" + b" " * KIB + b"\r\n" for _ in range(17)) + b"0\r\n\r\n"
BODIES: dict[str, tuple[bytes, bytes, int, str]] = {
    "an array": (b"[]", b"", 400, "must be a JSON object"),
    "a number": (b"1", b"", 400, "must be a JSON object"),
    "a string": (b'"ci-7"', b"", 400, "must be a JSON object"),
    "null": (b"null", b"", 400, "must be a JSON object"),
    "half an object": (b'{"holder": ', b"", 400, "body"),  # on a route without `holder`
    "more after the end": (b"{}{}", b"", 400, "not JSON"),
    "a blank": (b" ", b"", 400, "not JSON"),
    "NaN": (b"{NaN}", b"", 400, "not JSON"),
    "a bare NUL": (b'{"\0": 1}', b"", 400, "not JSON"),
    "a lone surrogate escaped": (rb'{"\ud800": 1}', b"", 400, "not JSON"),
    "a lone surrogate in bytes": (b'{"holder": "\xed\xa0\x80"}', b"", 400, "UTF-8"),
    "invalid UTF-8": (b'{"x": "\xff"}', b"", 400, "UTF-8"),
    "a BOM": (b"\xef\xbb\xbf{}", b"", 400, "UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), b"", 400, "UTF-8"),
    "8,000 levels": (b'{"x": ' + b"[" * 8000 + b"]" * 8000 + b"}", b"", 400, "deep"),
    "a body over the limit": (b" " * 16 * KIB + b"{}", b"", 413, "16 KiB"),
    "chunks over the limit": (JUNK, CHUNKED, 413, "16 KiB"),
    "a form": (b"count=1", b"Content-Type: application/x-www-form-urlencoded\r\n", 415, "JSON"),
    "text": (b"{}", b"Content-Type: text/plain\r\n", 415, "JSON"),
    "another charset": (b"{}", b"Content-Type: application/json; charset=latin-1\r\n", 415, "UTF-8"),
    "gzip": (b"{}", b"Content-Encoding: gzip\r\n", 415, "has a Content-Encoding"),
    "no content type from a page": (b"{}", b"Origin: https://app.example.com\r\n", 415, "Content-Type is missing"),
}  # fmt: skip


@pytest.mark.parametrize("route", WITH_BODY, ids=str)
@pytest.mark.parametrize("fault", BODIES)
def test_a_hostile_body_is_refused_with_a_reason(scene: Scene, route: tuple[str, str], fault: str) -> None:
    body, headers, status, named = BODIES[fault]
    refused(scene.send(*route, body, headers, headers != CHUNKED), status, named)


@pytest.mark.parametrize("headers", [b"", b"Content-Type: text/plain\r\n", b"Content-Encoding: gzip\r\n", CHUNKED])
def test_an_empty_body_is_accepted_with_any_content_type(shared: Scene, headers: bytes) -> None:
    shared = shared._replace(admin=PoolUser(shared.connection))
    body = b"0\r\n\r\n" if headers == CHUNKED else b""
    for (method, path), status in zip(WITH_BODY, (201, 201, 200, 204), strict=True):
        if path == "/leases":
            shared = shared._replace(leased=shared.send(method, path, body, headers, not body).json()["token"])
        else:
            assert shared.send(method, path, body, headers, not body).status == status


@pytest.mark.parametrize(
    "body", [b"x" * 20 * KIB, b'{"holder": 1', b"\0", b"GET /healthz HTTP/1.1\r\n\r\n"], ids=range(4)
)
def test_an_unexpected_body_is_not_read_as_a_request(shared: Scene, body: bytes) -> None:
    """The next request on the same connection is answered normally."""
    admin = PoolUser(shared.connection)
    (token,) = admin.generate("any")
    for method, path in [("GET", ""), ("GET", "/tokens/TOKEN"), ("DELETE", "/tokens/TOKEN")]:
        head = (
            f"{method} /api/pools/any{path.replace('TOKEN', token)} HTTP/1.1\r\nHost: x\r\nX-Token: {admin.token}\r\n"
        )
        answer = shared.connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert answer.status == 400
        assert admin.call("GET", f"/any/tokens/{token}")[0] == 200


segments = st.sampled_from(["fuzzed", "tokens", "leases", "LEASED", "", ".."]) | st.binary(max_size=20).map(
    lambda junk: "".join(f"%{byte:02x}" for byte in junk)
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["count", "holder", "fence"]) | st.text(max_size=3), inner)
    ),
    max_leaves=8,
)


@hypothesis_settings(max_examples=60)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    path=st.lists(segments, max_size=4),
    query=st.binary(max_size=20).map(lambda junk: "".join(f"%{byte:02x}" for byte in junk)),
    body=st.binary() | documents.map(lambda document: json.dumps(document).encode()),
)
def test_no_bytes_of_a_user_make_a_5xx(shared: Scene, method: str, path: list[str], query: str, body: bytes) -> None:
    admin = PoolUser(shared.connection)
    leased = next((member["token"] for member in admin.members("fuzzed") if "holder" in member), "unknown")
    target = "/".join(["/api/pools", *path]).replace("LEASED", leased)
    head = f"{method} {target}?limit={query}&after={query} HTTP/1.1\r\nHost: x\r\nX-Token: {admin.token}\r\n"
    answer = shared.connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert 200 <= answer.status < 500, answer
    assert answer.status != 401
