"""Unknown fields and parameters are refused: ignoring one would change the meaning of the request."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.connections import Answer, Connection
from tests.support.pool_users import PoolUser
from tests.support.servers import Server, write_config

BODIES = {
    ("POST", "/api/pools/p/tokens"): ["count"],
    ("POST", "/api/pools/p/leases"): ["holder"],
    ("PUT", "/api/pools/p/leases/LEASED"): ["holder", "fence"],
    ("DELETE", "/api/pools/p/leases/LEASED"): ["holder", "fence", "reason"],
}
QUERIES = {
    ("GET", "/api/me"): [],
    ("GET", "/api/tokens"): ["user"],
    ("DELETE", "/api/tokens"): ["user", "keep"],
    ("DELETE", "/api/tokens/ID"): ["user"],
    ("GET", "/api/pools"): [],
    ("GET", "/api/pools/p"): ["after", "limit"],
    ("GET", "/api/pools/p/tokens/LEASED"): [],
    ("DELETE", "/api/pools/p/tokens/LEASED"): [],
    **{route: [] for route in BODIES},
}
"""The native routes that need a token, with the query parameters of each."""


@pytest.fixture(scope="module")
def config_file(directory: Path) -> Path:
    return write_config(directory, "[pools.p]\nlease_ttl = 1000000")


class Scene:
    """An admin with a second login, and a pool with one leased token."""

    def __init__(self, connection: Connection, port: int) -> None:
        self._port = port
        self.connection = connection
        self.admin = PoolUser(connection)
        self.admin.generate("p")
        self._leased = self.admin.assign("p", "ci-7").token
        self._id = ""
        self._id = self.ask("GET", "/api/me").json()["id"]

    def ask(self, method: str, path: str, document: object = None) -> Answer:
        """Send a request as the admin."""
        path = path.replace("LEASED", self._leased) if "LEASED" in path else path.replace("ID", self._id)
        return self.connection.ask(method, path, document, X_Token=self.admin.token)

    def send(self, method: str, path: str, body: bytes, chunked: bool) -> Answer:
        """Send a request as the admin, with any body."""
        framed = b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        if chunked:
            parts = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
            framed = b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"
        path = path.replace("ID", self._id).replace("LEASED", self._leased)  # a token may contain "ID"
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Token: {self.admin.token}\r\n"
        with Connection(self._port) as fresh:
            return fresh.send(head.encode() + framed)

    def state(self) -> object:
        """Return everything that a request could change."""
        return self.admin.members("p"), self.ask("GET", "/api/tokens").json()


@pytest.fixture
def scene(server: Server) -> Iterator[Scene]:
    with Connection(server.port) as connection:
        yield Scene(connection, server.port)


def typos(name: str) -> st.SearchStrategy[str]:
    """Return misspellings of a name: a letter missing, doubled, swapped or in capitals, or extra characters."""
    places = st.integers(0, len(name) - 1)
    return st.one_of(
        places.map(lambda at: name[:at] + name[at + 1 :]),
        places.map(lambda at: name[:at] + name[at].upper() + name[at + 1 :]),
        places.map(lambda at: name[:at] + name[at] * 2 + name[at + 1 :]),
        places.map(lambda at: name[:at] + name[at : at + 2][::-1] + name[at + 2 :]),
        st.sampled_from(["{}[]", " {}", "{} ", "?{}", "_{}", "{}s", "{}\0", "{}\N{ZERO WIDTH SPACE}"]).map(
            lambda form: form.format(name)
        ),
    ).filter(lambda typo: typo != name)


def test_an_unknown_field_is_400_and_changes_nothing(scene: Scene) -> None:
    @settings(max_examples=60, derandomize=True)
    @given(st.sampled_from(list(BODIES)).flatmap(lambda route: st.tuples(st.just(route), _typo(BODIES[route]))))
    def check(found: tuple[tuple[str, str], tuple[str, str]]) -> None:
        (method, path), (name, typo) = found
        _refused(scene.ask(method, path, {typo: 9}), "field", name, typo)

    before = scene.state()
    check()
    assert scene.state() == before


def test_an_unknown_parameter_is_400_and_changes_nothing(scene: Scene) -> None:
    @settings(max_examples=50, derandomize=True)
    @given(st.sampled_from(list(QUERIES)).flatmap(lambda route: st.tuples(st.just(route), _typo(QUERIES[route]))))
    def check(found: tuple[tuple[str, str], tuple[str, str]]) -> None:
        (method, path), (name, typo) = found
        escaped = "".join(f"%{byte:02X}" for byte in typo.encode())
        _refused(scene.ask(method, f"{path}?{escaped}=9"), "query parameter", name, typo)

    before = scene.state()
    check()
    assert scene.state() == before


def test_an_unexpected_body_is_400_and_changes_nothing(scene: Scene) -> None:
    """Otherwise `{"keep": "current"}` would end all logins, and `{"user": "bob"}` those of the admin."""
    bodies = [b'{"keep": "current"}', b'{"user": "bob"}', b"keep=current", b"[]", b"null", b"\0", b"x" * 100_000]

    @settings(max_examples=60, derandomize=True)
    @given(st.sampled_from([route for route in QUERIES if route not in BODIES]), st.sampled_from(bodies), st.booleans())
    def check(route: tuple[str, str], body: bytes, chunked: bool) -> None:
        answer = scene.send(*route, body, chunked)
        assert (answer.status, answer.json()["error"]) == (400, "invalid_request")
        description: str = answer.json()["error_description"]
        assert description.startswith("The body must be empty")
        assert [name for name in QUERIES[route] if f'"{name}"' not in description] == []

    before = scene.state()
    check()
    assert scene.state() == before


@pytest.mark.parametrize("body", [b"", b"{}", b" {}\r\n"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_empty_body_or_object_is_accepted(scene: Scene, body: bytes, chunked: bool) -> None:
    assert scene.send("GET", "/api/me", body, chunked).status == 200
    assert scene.send("DELETE", "/api/pools/p/tokens/LEASED", body, chunked).status == 204


def test_a_reason_without_force_is_400_and_ends_no_lease(scene: Scene) -> None:
    before = scene.state()
    answer = scene.ask("DELETE", "/api/pools/p/leases/LEASED", {"reason": "device is stuck"})
    assert (answer.status, answer.json()["error_description"][:8]) == (400, "reason: ")
    assert scene.state() == before


def _typo(known: list[str]) -> st.SearchStrategy[tuple[str, str]]:
    """Return a name and a misspelling of it. A route without names gets those of other routes."""
    names = st.sampled_from(known or ["fence", "holder", "count", "user"])
    return names.flatmap(lambda name: st.tuples(st.just(name), typos(name))).filter(lambda pair: pair[1] not in known)


def _refused(answer: Answer, what: str, name: str, typo: str) -> None:
    assert answer.status == 400, (answer, typo)
    refusal: dict[str, Any] = answer.json()
    assert refusal["error"] == "invalid_request"
    assert refusal["error_description"].startswith(f"Unknown {what}")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"fenc": 9}, 'Unknown field "fenc": did you mean "fence"?'),
        ({"HOLDER": "x"}, 'Unknown field "HOLDER": did you mean "holder"?'),
        ({"x": 9}, 'Unknown field "x": known are "holder", "fence".'),
        ({"u" * 64: 9}, 'Unknown field: known are "holder", "fence".'),  # a token is not repeated
        ({"a\nb": 9}, 'Unknown field: known are "holder", "fence".'),
        ({"": 9}, 'Unknown field: known are "holder", "fence".'),
    ],
)
def test_the_refusal_suggests_the_intended_field(scene: Scene, sent: dict[str, Any], message: str) -> None:
    answer = scene.ask("PUT", "/api/pools/p/leases/LEASED", sent)
    assert answer.json()["error_description"] == message


def test_a_field_twice_is_400_also_escaped(scene: Scene) -> None:
    """Also if the second one is escaped: the server cannot know which of the two is meant."""
    for name in ("holder", "fence"):
        for second in (name, f"\\u{ord(name[0]):04x}{name[1:]}"):
            body = f'{{"{name}": null, "{second}": null}}'.encode()
            head = f"DELETE /api/pools/p/leases/x HTTP/1.1\r\nHost: x\r\nX-Token: {scene.admin.token}\r\n"
            answer = scene.connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert (answer.status, answer.json()["error_description"]) == (400, f'The body has "{name}" twice.')


def test_the_token_api_ignores_unknown_fields(server: Server) -> None:
    """The contract does not mention unknown fields, and the original service ignores them."""
    with Connection(server.port) as connection:
        answer = connection.ask("POST", "/api/token?x=1", {"username": "admin", "password": "admin", "x": [1]})
        assert answer.status == 200
        assert connection.ask("GET", f"/api/token?x=1&token={answer.json()['token']}").json()["valid"]
        assert connection.ask("DELETE", "/api/token?x=1", {"token": answer.json()["token"], "x": 1}).status == 200
        assert not connection.valid(answer.json()["token"])
