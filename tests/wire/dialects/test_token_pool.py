"""The contract of wire/token-pool.md: UUIDs that expire, and that are blocked for a while."""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock
from tests.wire.dialects.conftest import Reply, Wire, at_once, fill, reply, rows

PREFIX = "/token-pool"
DELETED = reply(200, {"response": "Token deleted successfully"})
REFRESHED = reply(200, {"response": "Token refreshed successfully"})
INVALID = reply(400, ["Invalid token id"])
NONE_FREE = reply(404, {"error": "No free tokens"})
UNKNOWN = "00000000-0000-4000-8000-000000000000"

At = Callable[[float], None]


@pytest.fixture(scope="module")
def wire(clients: Sequence[httpx.Client]) -> Wire:
    """Send requests to both workers."""
    return Wire(clients, PREFIX)


def generate(wire: Wire) -> str:
    """Generate a token."""
    answer = wire.post("/api/token_pool/")
    token = str(answer.document["token"])
    assert answer == reply(200, {"token": token})
    return token


def blocked(token: str) -> Reply:
    """Return the answer that hands out a token."""
    return reply(200, {"blocked_token": token})


@pytest.mark.parametrize("slash", ["/", ""])
def test_each_operation_works_with_and_without_slash(wire: Wire, slash: str) -> None:
    made = wire.post(f"/api/token_pool{slash}")
    token = made.document["token"]
    assert made == reply(200, {"token": token})
    assert str(uuid.UUID(token)) == token
    assert uuid.UUID(token).version == 4
    assert wire.post(f"/api/block_token{slash}") == blocked(token)
    assert wire.post(f"/api/block_token{slash}") == NONE_FREE
    assert wire.post(f"/api/keep_alive/{token}{slash}") == REFRESHED
    assert wire.ask("DELETE", f"/api/token_pool{slash}", {"token": token}) == DELETED
    assert wire.ask("DELETE", f"/api/token_pool{slash}", {"token": token}) == INVALID
    assert wire.post(f"/api/keep_alive/{token}{slash}") == INVALID


@pytest.mark.parametrize("field", ["token", "token_uuid"])
@pytest.mark.parametrize("state", ["free", "blocked"])
def test_both_delete_bodies_delete_any_token(wire: Wire, field: str, state: str) -> None:
    token, other = generate(wire), generate(wire)
    if state == "blocked":
        assert wire.post("/api/block_token/") == blocked(token)
    assert wire.ask("DELETE", "/api/token_pool/", {field: token}) == DELETED
    assert wire.post("/api/keep_alive/" + token) == INVALID
    assert wire.post("/api/block_token/") == blocked(other), "only the other token is left"
    assert wire.post("/api/block_token/") == NONE_FREE


@pytest.mark.parametrize("field", ["token", "token_uuid"])
@pytest.mark.parametrize("named", [UNKNOWN, "not a uuid", "", None, 5, 1.5, True, [], ["x"], {}, "\0", "x" * 9000])
def test_a_body_without_a_valid_token_deletes_none(wire: Wire, field: str, named: object) -> None:
    token = generate(wire)
    assert wire.ask("DELETE", "/api/token_pool/", {field: named}) == INVALID
    assert wire.post("/api/block_token/") == blocked(token)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"uuid": "x"}'])
def test_a_delete_without_a_token_is_refused(wire: Wire, content: bytes) -> None:
    assert wire.ask("DELETE", "/api/token_pool/", content=content) == INVALID


def test_a_uuid_is_case_insensitive(wire: Wire) -> None:
    token = generate(wire)
    assert wire.post(f"/api/keep_alive/{token.upper()}") == REFRESHED
    assert wire.ask("DELETE", "/api/token_pool/", {"token": token.upper()}) == DELETED


@pytest.mark.parametrize("slash", ["/", ""])
@pytest.mark.parametrize(
    "element",
    ["x", "no-uuid", "%00", "%ff", UNKNOWN[:-1], f"{UNKNOWN}0", UNKNOWN.replace("8", "g"), f"{UNKNOWN}/x",
     "1_" * 15 + "11", "%20" * 4 + "1" * 28, "0x" + "1" * 30],
)  # fmt: skip
def test_a_path_element_that_is_not_a_uuid_is_404(wire: Wire, element: str, slash: str) -> None:
    answer = wire.post(f"/api/keep_alive/{element}{slash}")
    assert answer.status == 404, answer.body
    assert answer.document["error"] == "not_found"


@pytest.mark.parametrize("slash", ["/", ""])
def test_keep_alive_refuses_an_unknown_uuid(wire: Wire, slash: str) -> None:
    assert wire.post(f"/api/keep_alive/{UNKNOWN}{slash}") == INVALID


def test_a_free_token_expires_after_five_minutes(wire: Wire, at: At) -> None:
    at(0)
    kept, left = generate(wire), generate(wire)
    at(299.9)
    assert wire.post(f"/api/keep_alive/{kept}") == REFRESHED
    at(300)
    assert wire.post(f"/api/keep_alive/{left}") == INVALID
    assert wire.ask("DELETE", "/api/token_pool/", {"token": left}) == INVALID
    assert wire.post("/api/block_token/") == blocked(kept)
    assert wire.post("/api/block_token/") == NONE_FREE


def test_keep_alive_extends_a_free_token_by_5_minutes(wire: Wire, at: At) -> None:
    at(0)
    kept, left = generate(wire), generate(wire)
    at(200)
    assert wire.post(f"/api/keep_alive/{left}") == REFRESHED
    assert wire.post(f"/api/keep_alive/{kept}") == REFRESHED
    at(499.9)
    assert wire.post(f"/api/keep_alive/{kept}") == REFRESHED
    at(500)
    assert wire.post(f"/api/keep_alive/{left}") == INVALID


def test_a_blocked_token_is_free_after_a_minute(wire: Wire, at: At) -> None:
    at(0)
    token = generate(wire)
    assert wire.post("/api/block_token/") == blocked(token)
    at(59.9)
    assert wire.post("/api/block_token/") == NONE_FREE
    at(60)
    assert wire.post("/api/block_token/") == blocked(token)
    assert wire.post("/api/block_token/") == NONE_FREE


def test_keep_alive_extends_a_block_by_a_minute(wire: Wire, at: At) -> None:
    at(0)
    token = generate(wire)
    assert wire.post("/api/block_token/") == blocked(token)
    for seconds in (59, 118, 177, 236, 295, 354):  # longer than the five minutes of a free token
        at(seconds)
        assert wire.post("/api/block_token/") == NONE_FREE
        assert wire.post(f"/api/keep_alive/{token}") == REFRESHED
    at(413.9)
    assert wire.post("/api/block_token/") == NONE_FREE
    at(414)
    assert wire.post("/api/block_token/") == blocked(token)


def test_a_blocked_token_expires_5_minutes_after_its_block(wire: Wire, at: At) -> None:
    """Not five minutes after the end of its block."""
    at(0)
    kept, left = generate(wire), generate(wire)
    for token in (kept, left):
        assert wire.post("/api/block_token/") == blocked(token)
    at(299.9)
    assert wire.post(f"/api/keep_alive/{kept}") == REFRESHED
    at(300)
    assert wire.post(f"/api/keep_alive/{left}") == INVALID
    assert wire.post("/api/block_token/") == blocked(kept)
    assert wire.post("/api/block_token/") == NONE_FREE


def test_keep_alive_after_a_block_adds_five_minutes(wire: Wire, at: At) -> None:
    at(0)
    token = generate(wire)
    assert wire.post("/api/block_token/") == blocked(token)
    at(100)
    assert wire.post(f"/api/keep_alive/{token}") == REFRESHED
    at(399.9)
    assert wire.post(f"/api/keep_alive/{token}") == REFRESHED
    at(699.9)
    assert wire.post(f"/api/keep_alive/{token}") == INVALID


def test_the_longest_free_token_is_blocked_first(wire: Wire, at: At) -> None:
    tokens = []
    for seconds in range(5):
        at(seconds)
        tokens.append(generate(wire))
    at(5)
    assert wire.post(f"/api/keep_alive/{tokens.pop(0)}") == REFRESHED
    assert [wire.post("/api/block_token/").document["blocked_token"] for _ in tokens] == tokens


def test_concurrent_requests_make_distinct_tokens(ports: Sequence[int], config_file: Path, clock: HandClock) -> None:
    fill(config_file, "uuids", 2000, clock())
    answers = at_once(ports, 200, lambda connection, _: connection.ask("POST", f"{PREFIX}/api/token_pool/"))
    assert [answer.status for answer in answers] == [200] * 200
    assert len({answer.json()["token"] for answer in answers}) == 200


def test_concurrent_blocks_get_distinct_tokens(ports: Sequence[int], config_file: Path, clock: HandClock) -> None:
    """In 400 requests to two workers the original gave out only 299 distinct tokens."""
    values = fill(config_file, "uuids", 350, clock())

    def block(connection: Connection, _: int) -> Answer:
        return connection.ask("POST", f"{PREFIX}/api/block_token/")

    answers = at_once(ports, 400, block)
    given = [answer.json()["blocked_token"] for answer in answers if answer.status == 200]
    assert sorted(given) == sorted(values)
    assert [answer.body for answer in answers if answer.status != 200] == [b'{"error":"No free tokens"}'] * 50
    assert {answer.status for answer in answers} == {200, 404}


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff\0", b"x" * 17 * 1024, b'{"token": 5}'])
def test_an_unneeded_body_is_ignored(wire: Wire, body: bytes) -> None:
    headers = {"Content-Type": "text/plain"}
    token = wire.post("/api/token_pool/", content=body, headers=headers).document["token"]
    assert wire.post("/api/block_token/", content=body, headers=headers) == blocked(token)
    assert wire.post(f"/api/keep_alive/{token}", content=body, headers=headers) == REFRESHED


@pytest.mark.parametrize("slash", ["/", ""])
@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/api/token_pool", {"POST", "DELETE"}), ("/api/block_token", {"POST"}), (f"/api/keep_alive/{UNKNOWN}", {"POST"})],
)
def test_other_methods_are_405_with_an_allow_header(
    wire: Wire, path: str, allowed: set[str], slash: str, config_file: Path
) -> None:
    before = rows(config_file, "uuids")
    for method in {"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"} - allowed:
        answer = wire.send(method, path + slash)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == allowed
    assert rows(config_file, "uuids") == before
