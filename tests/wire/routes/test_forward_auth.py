"""/auth answers 200, 401, 403 or 503, for any request that a client sends through a proxy."""

import string
from pathlib import Path
from urllib.parse import quote, unquote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.connections import Answer, Connection
from tests.support.servers import USERS, HandClock, Server, write_config
from tokenauth.metrics import ValidationCounts
from tokenauth.models import Token
from tokenauth.tokens import Tokens
from tokenauth.web.routes.forward_auth import ForwardAuth

DAY = 24 * 3600
MORE_USERS = USERS + '[[users]]\nusername = "Jörg, 100% a"\npassword = "{}"\nscopes = []\n'.format(
    "$argon2id$v=19$m=8,t=1,p=1$LIVwzhljLKW0tvbeW2tNqQ$9JC3XMtZhQy2Oi5GB4ktwLx5ktUmIdEa8FXN6h6E8S4"  # bob-secret
)
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"]
FRAMING = {"content-length", "transfer-encoding", "connection", "upgrade", "expect"}


@pytest.fixture(scope="module")
def config_file(directory: Path) -> Path:
    return write_config(directory, users=MORE_USERS)


def ask(connection: Connection, query: str = "", method: str = "GET", **headers: str) -> Answer:
    return connection.ask(method, f"/auth{query}", **headers)


@pytest.mark.parametrize("method", METHODS)
def test_any_method_gets_the_user_in_a_header(connection: Connection, clock: HandClock, ann: str, method: str) -> None:
    answer = ask(connection, method=method, X_Token=ann)
    assert (answer.status, answer.body) == (200, b"")
    found = {name: value for name, value in answer.headers.items() if name.startswith("x-auth-")}
    assert found == {"x-auth-user": "ann", "x-auth-scopes": "read write", "x-auth-expires": str(int(clock()) + DAY)}
    assert answer.headers["cache-control"] == "no-store"


def test_a_bearer_token_is_accepted(connection: Connection, ann: str) -> None:
    assert ask(connection, Authorization=f"Bearer {ann}").status == 200


def test_a_name_that_is_not_ascii_is_percent_encoded(connection: Connection) -> None:
    token = connection.log_in("Jörg, 100% a", "bob-secret")
    answer = ask(connection, X_Token=token)
    assert (answer.headers["x-auth-user"], answer.headers["x-auth-scopes"]) == ("j%C3%B6rg, 100%25 a", "")


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("?scope=read", 200),
        ("?scope=read+write", 200),
        ("?scope=write%20read", 200),
        ("?scope=read&scope=write", 200),
        ("?path=/x?scope=admin", 200),  # part of the value of path
        ("?", 200),
        ("?&", 200),
        ("?scope=read&path=/x?a=1&b=2&scope%5B%5D", 403),
        ("?scope=read&path=/x?a=1&b=2&c", 200),  # everything after `path` comes from the client; it may only add scopes
        ("?scope=read&path=/x&scope=admin", 403),
        ("?scope=admin&path=/x&scope=read", 403),
        ("?Scope=read", 403),  # an unknown parameter may be a mistyped `scope`
        ("?scope[]=read", 403),
        ("??scope=read", 403),
        ("?scopes=read", 403),
        ("?socpe=read", 403),
        ("?scope=read&x=1", 403),
        ("?x=1;scope=read", 403),
        ("?=read", 403),
        ("?Path=/x", 403),
        ("?%73cope=read", 200),
        ("?scope=admin", 403),
        ("?scope=read+admin", 403),
        ("?scope=read&scope=admin", 403),  # more parameters never require less
        ("?scope=admin&scope=read", 403),
        ("?scope=READ", 403),
        ("?scope=rea", 403),
        ("?scope=", 403),  # an unset variable in the configuration of the proxy
        ("?scope=+", 403),
        ("?scope=read&scope=", 403),
        ("?scope=read%0d%0aX-Evil:1", 403),
        ("?scope=%22", 403),
        ("?scope=%00", 403),
        ("?scope=%ff", 403),
        pytest.param("?" + "&".join(["x=1"] * 101), 403, id="many"),
        pytest.param("?" + "x" * 9000, 403, id="long"),
    ],
)
def test_a_scope_that_the_user_lacks_is_403(connection: Connection, ann: str, query: str, status: int) -> None:
    answer = ask(connection, query, X_Token=ann)
    assert answer.status == status
    assert "x-evil" not in answer.headers
    assert ("x-auth-user" in answer.headers) is (status == 200)


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ({}, 'Bearer realm="tokenauth"'),
        ({"X_Token": ""}, 'Bearer realm="tokenauth"'),
        ({"X_Token": "x"}, 'Bearer realm="tokenauth", error="invalid_token"'),
        ({"X_Token": "A" * 64}, 'Bearer realm="tokenauth", error="invalid_token"'),
        ({"Authorization": "Basic YW5uOmFubi1zZWNyZXQ="}, 'Bearer realm="tokenauth"'),
        ({"Cookie": "X-Token=GOOD; token=GOOD"}, 'Bearer realm="tokenauth"'),
        ({"X_Forwarded_Uri": "/?token=GOOD", "X_Original_URI": "/?X-Token=GOOD"}, 'Bearer realm="tokenauth"'),
        ({"X_Auth_User": "ann", "X_Auth_Scopes": "read"}, 'Bearer realm="tokenauth"'),
        ({"X_Token": "GOOD", "Authorization": "Bearer x"}, 'Bearer realm="tokenauth", error="invalid_token"'),
    ],
)
def test_a_request_without_a_valid_token_is_401(
    connection: Connection, ann: str, headers: dict[str, str], challenge: str
) -> None:
    sent = {name: value.replace("GOOD", ann) for name, value in headers.items()}
    answer = ask(connection, "?scope=read&token=" + ann, **sent)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, challenge)
    assert "x-auth-user" not in answer.headers


def test_an_underscore_is_not_a_dash(connection: Connection, ann: str) -> None:
    assert connection.send(f"GET /auth HTTP/1.1\r\nHost: x\r\nX_Token: {ann}\r\n\r\n".encode()).status == 401


def test_revoked_and_expired_are_401(connection: Connection, clock: HandClock) -> None:
    token, other = connection.log_in("bob", "bob-secret"), connection.log_in("bob", "bob-secret")
    assert ask(connection, X_Token=token).status == ask(connection, X_Token=other).status == 200
    connection.log_out(token)
    assert ask(connection, X_Token=token).status == 401
    now = clock()
    try:
        clock.advance(DAY)
        assert ask(connection, X_Token=other).status == 401
    finally:
        clock.set(now)


@pytest.mark.parametrize(
    "head",
    [b"Cookie: " + b"x" * 17_000, b"X-Token: a\0b", b"X: \x7f\x01", b"no colon", b": empty", b"X Y: z"],
    ids=["too long", "NUL", "control characters", "no colon", "no name", "blank in the name"],
)
@pytest.mark.parametrize("query", ["", "?scope=read"])
def test_unreadable_headers_are_401(server: Server, head: bytes, query: str) -> None:
    with Connection(server.port) as fresh:
        request = b"GET /auth%s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n" % (query.encode(), head)
        assert fresh.send(request).status == 401
    with Connection(server.port) as fresh:
        assert fresh.send(request.replace(b"/auth", b"/api/me")).status in {400, 401, 431}


def test_a_long_head_in_pieces_is_401(server: Server) -> None:
    with Connection(server.port) as fresh:
        fresh._socket.sendall(b"GET /auth HTTP/1.1\r\nHost: x\r\nCookie: " + b"x" * 1000)
        assert fresh.send(b"x" * 16_000).status == 401


def typos(word: str) -> st.SearchStrategy[str]:
    """Return misspellings of a parameter name."""
    around = st.text(string.punctuation + string.ascii_letters + " ", max_size=2).map(quote)
    case = st.lists(st.booleans(), min_size=len(word), max_size=len(word)).map(
        lambda upper: "".join(letter.upper() if up else letter for letter, up in zip(word, upper, strict=True))
    )
    cut = st.integers(0, len(word) - 1).map(lambda at: word[:at] + word[at + 1 :])
    typed = st.tuples(around, case | cut, around).map("".join)
    return typed.filter(lambda name: unquote(name) not in {"scope", "path"})


def test_a_mistyped_query_never_skips_the_scope_check(connection: Connection, ann: str) -> None:
    @settings(max_examples=60, derandomize=True)
    @given(typos("scope"), st.sampled_from(["", "scope=read&", "&"]), st.sampled_from(["", "&scope=read", "&path=/x"]))
    def check(name: str, before: str, after: str) -> None:
        assert ask(connection, f"?{before}{name}=admin{after}", X_Token=ann).status == 403

    check()


def lookalikes(word: str) -> st.SearchStrategy[str]:
    """Return lookalikes of a word: full-width, mathematical or accented letters, any case, separators."""

    def spellings(letter: str) -> list[str]:
        shifted = [chr(start + ord(letter) - ord("a")) for start in (0xFF41, 0x1D41A, 0x24D0)]
        separated = [f"{letter}\u0301", f"{letter}\u200b", f"_{letter}-"]
        return [letter, letter.upper(), *shifted, *separated, *(["\u017f"] if letter == "s" else [])]

    return st.tuples(*(st.sampled_from(spellings(letter)) for letter in word)).map("".join)


def test_a_lookalike_of_scope_after_path_is_403(connection: Connection, ann: str) -> None:
    @settings(max_examples=100, derandomize=True)
    @given(lookalikes("scope"), st.sampled_from(["", "s", "[]", "\uff3b\uff3d"]), st.sampled_from(["", "scope=read&"]))
    def check(name: str, after: str, before: str) -> None:
        if name + after != "scope":
            assert ask(connection, f"?{before}path=/x&{quote(name + after)}=admin", X_Token=ann).status == 403

    check()
    for name in ("s", "cope", "scope_id", "telescope", "periscopes", "\u0441\u043a\u043e\u043f"):
        assert ask(connection, f"?scope=read&path=/x&{quote(name)}=admin", X_Token=ann).status == 200


NAMES = st.sampled_from(["X-Token", "Authorization", "Cookie", "Accept", "X-Forwarded-For", "Content-Type"]) | (
    st.text(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~", min_size=1, max_size=20)
)
VALUES = st.binary(max_size=100) | st.sampled_from([b"Bearer ", b"Bearer " + b"a" * 64, b"Basic YTpi", b"\xff" * 64])


def test_no_random_headers_are_let_through(server: Server) -> None:
    """Random names and values, malformed ones too, get 401."""

    @settings(max_examples=60, derandomize=True)
    @given(st.lists(st.tuples(NAMES, VALUES), max_size=6), st.sampled_from(["", "?scope=read", "?scope=admin"]))
    def check(headers: list[tuple[str, bytes]], query: str) -> None:
        clean = [(name.encode(), value) for name, value in headers if name.lower() not in FRAMING]
        lines = b"".join(b"%s: %s\r\n" % header for header in clean)
        with Connection(server.port) as fresh:
            status = fresh.send(b"GET /auth%s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (query.encode(), lines)).status
        assert status == 401

    check()


class BrokenTokens(Tokens):
    """Raises an unexpected exception."""

    def __init__(self) -> None:
        pass

    async def validate(self, value: bytes, touch: bool = True, digest: bytes | None = None) -> Token | None:
        raise ZeroDivisionError(value)


async def test_an_unexpected_error_is_503() -> None:
    transport = httpx.ASGITransport(ForwardAuth(BrokenTokens(), ValidationCounts()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/auth", headers={"X-Token": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == "internal_error"
