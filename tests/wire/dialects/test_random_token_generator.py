"""The contract of wire/random-token-generator.md: a bounded pool of UUIDs."""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock
from tests.wire.dialects.conftest import Reply, Wire, advance_a_day, at_once, fill, reply, rows

PREFIX = "/random-token-generator"
CAPACITY = 100
FULL = reply(400, {"error": "Pool max size exceeded"})
NONE_FREE = reply(404, {"error": "No free token available or token TTL expired"})
NOT_FOUND = reply(404, {"error": "Token not found"})
NOT_ASSIGNED = reply(404, {"error": "Token not assigned"})
REQUIRED = reply(400, {"message": "Token is a required field"})
UNKNOWN = "00000000-0000-4000-8000-000000000000"
UNNAMED = [None, {}, {"token": None}, {"token": ""}, {"other": "x"}]

At = Callable[[float], None]


@pytest.fixture(scope="module")
def wire(clients: Sequence[httpx.Client]) -> Wire:
    """Send requests to both workers."""
    return Wire(clients, PREFIX)


def generate(wire: Wire, count: int = 1) -> list[str]:
    """Generate tokens."""
    answer = wire.post("/generate", {"count": count})
    tokens: list[str] = answer.document["tokens"]
    assert answer == reply(200, {"tokens": tokens})
    assert len(set(tokens)) == count
    return tokens


def assigned(token: str) -> Reply:
    """Return the answer that hands out a token."""
    return reply(200, {"token": token})


def message(text: str) -> Reply:
    """Return the answer with a message."""
    return reply(200, {"message": text})


def state_of(wire: Wire, token: str) -> str:
    """Return the state of a token. If it is free, it stays unchanged."""
    answer = wire.post("/unblock", {"token": token})
    return {NOT_FOUND: "gone", NOT_ASSIGNED: "free"}.get(answer, "assigned")


@pytest.mark.parametrize(
    ("body", "count"), [(None, 1), ({}, 1), ({"other": 3}, 1), ({"count": 1}, 1), ({"count": 7}, 7)]
)
def test_it_generates_the_requested_number_of_uuids(wire: Wire, body: object, count: int) -> None:
    answer = wire.post("/generate", body)
    tokens = answer.document["tokens"]
    assert answer == reply(200, {"tokens": tokens})
    assert len(set(tokens)) == count
    assert [str(uuid.UUID(token, version=4)) for token in tokens] == tokens


def test_generating_above_capacity_makes_none(wire: Wire, config_file: Path) -> None:
    generate(wire, CAPACITY - 1)
    before = rows(config_file, "bounded")
    for count in (2, 3, CAPACITY + 1, 1001, 2**63, 2**80):
        assert wire.post("/generate", {"count": count}) == FULL
    assert rows(config_file, "bounded") == before
    generate(wire)
    for body in (None, {"count": 1}):
        assert wire.post("/generate", body) == FULL


def test_the_bound_counts_free_and_assigned_tokens(wire: Wire, at: At) -> None:
    """The original counts free tokens only."""
    at(0)
    [deleted, *_] = generate(wire, CAPACITY)
    for _ in range(3):
        assert wire.post("/assign").status == 200
        assert wire.post("/generate") == FULL
    assert wire.ask("DELETE", "/delete", {"token": deleted}).status == 200
    generate(wire)
    at(300)  # the assigned tokens are free since 60
    assert wire.post("/generate", {"count": CAPACITY - 1}) == FULL
    generate(wire, CAPACITY - 2)


def test_tokens_are_assigned_until_the_pool_is_empty(wire: Wire, at: At) -> None:
    tokens = []
    for seconds in range(3):
        at(seconds)
        tokens += generate(wire)
    assert [wire.post("/assign") for _ in tokens] == [assigned(token) for token in tokens], "longest free first"
    for _ in range(2):
        assert wire.post("/assign") == NONE_FREE


def test_an_assigned_token_is_free_after_a_minute(wire: Wire, at: At) -> None:
    at(0)
    [token] = generate(wire)
    for seconds in (0, 60, 120):
        at(seconds)
        assert wire.post("/assign") == assigned(token)
        at(seconds + 59.9)
        assert wire.post("/assign") == NONE_FREE
    at(180)
    assert state_of(wire, token) == "free"
    at(479.9)
    assert state_of(wire, token) == "free"
    at(480)
    assert state_of(wire, token) == "gone"
    assert wire.post("/assign") == NONE_FREE


def test_a_free_token_expires_after_five_minutes(wire: Wire, at: At) -> None:
    at(0)
    [token] = generate(wire)
    at(299.9)
    assert state_of(wire, token) == "free"
    at(300)
    assert state_of(wire, token) == "gone"
    assert wire.post("/assign") == NONE_FREE
    assert wire.post("/keep-alive", {"token": token}) == NOT_FOUND
    assert wire.ask("DELETE", "/delete", {"token": token}) == NOT_FOUND


def test_an_expired_token_does_not_hide_the_next_one(wire: Wire, at: At) -> None:
    """The original drops it and answers that no token is free."""
    at(0)
    generate(wire, 3)
    at(200)
    [token] = generate(wire)
    at(300)
    assert wire.post("/assign") == assigned(token)
    assert wire.post("/assign") == NONE_FREE


def test_an_unblocked_token_lives_five_minutes_more(wire: Wire, at: At) -> None:
    at(0)
    [token] = generate(wire)
    at(299)
    assert wire.post("/assign") == assigned(token)
    at(310)
    assert wire.post("/unblock", {"token": token}) == message(f"Token {token} unblocked successfully")
    assert wire.post("/unblock", {"token": token}) == NOT_ASSIGNED
    at(609.9)
    assert wire.post("/assign") == assigned(token)
    assert wire.post("/unblock", {"token": token}) == message(f"Token {token} unblocked successfully")
    at(909.9)
    assert wire.post("/unblock", {"token": token}) == NOT_FOUND


@pytest.mark.parametrize("state", ["free", "assigned"])
def test_free_and_assigned_tokens_can_be_deleted(wire: Wire, state: str) -> None:
    [token] = generate(wire)
    if state == "assigned":
        assert wire.post("/assign") == assigned(token)
    assert wire.ask("DELETE", "/delete", {"token": token}) == message(f"Token {token} deleted successfully")
    assert wire.ask("DELETE", "/delete", {"token": token}) == NOT_FOUND
    assert state_of(wire, token) == "gone"
    assert wire.post("/assign") == NONE_FREE


def test_keep_alive_extends_a_lease_by_a_minute(wire: Wire, at: At) -> None:
    at(0)
    [token] = generate(wire)
    assert wire.post("/assign") == assigned(token)
    for seconds in (59, 118, 177, 236, 295, 354):
        at(seconds)
        assert wire.post("/assign") == NONE_FREE
        kept = message(f"Assigned token {token} TTL extended successfully")
        assert wire.post("/keep-alive", {"token": token}) == kept
    at(413.9)
    assert wire.post("/assign") == NONE_FREE
    at(414)
    assert wire.post("/assign") == assigned(token)


def test_keep_alive_extends_a_free_token_by_5_minutes(wire: Wire, at: At) -> None:
    at(0)
    kept, left = generate(wire, 2)
    at(299.9)
    assert wire.post("/keep-alive", {"token": kept}) == message(f"Token {kept} TTL extended successfully")
    at(300)
    assert (state_of(wire, kept), state_of(wire, left)) == ("free", "gone")
    at(599.8)
    assert state_of(wire, kept) == "free"
    at(599.9)
    assert state_of(wire, kept) == "gone"


@pytest.mark.parametrize("body", UNNAMED)
def test_keep_alive_without_a_token_extends_all_free(wire: Wire, at: At, body: object) -> None:
    at(0)
    assert wire.post("/keep-alive", body) == message("TTL extended successfully for 0 tokens")
    first, second, leased = generate(wire, 3)
    for token in (first, second, leased):
        assert wire.post("/assign") == assigned(token)
    for token in (first, second):
        assert wire.post("/unblock", {"token": token}).status == 200
    at(30)
    assert wire.post("/keep-alive", body) == message("TTL extended successfully for 2 tokens")
    at(59.9)
    assert state_of(wire, first) == "free"
    assert wire.post("/keep-alive", {"token": UNKNOWN}) == NOT_FOUND
    at(60)
    assert state_of(wire, leased) == "free", "the lease was not extended"
    at(329.9)
    assert (state_of(wire, first), state_of(wire, second)) == ("free", "free")
    at(330)
    assert (state_of(wire, first), state_of(wire, second), state_of(wire, leased)) == ("gone", "gone", "free")
    assert wire.post("/keep-alive", body) == message("TTL extended successfully for 1 tokens")


@pytest.mark.parametrize(("method", "path"), [("POST", "/unblock"), ("DELETE", "/delete"), ("POST", "/keep-alive")])
@pytest.mark.parametrize("token", [UNKNOWN, "not a uuid", "\0", "x" * 9000, "grün", "' OR 1=1 --"])
def test_an_unknown_token_is_not_found(wire: Wire, config_file: Path, method: str, path: str, token: str) -> None:
    generate(wire)
    before = rows(config_file, "bounded")
    assert wire.ask(method, path, {"token": token}) == NOT_FOUND
    assert rows(config_file, "bounded") == before


@pytest.mark.parametrize(("method", "path"), [("POST", "/unblock"), ("DELETE", "/delete")])
@pytest.mark.parametrize("body", UNNAMED)
def test_a_missing_token_is_400(wire: Wire, method: str, path: str, body: object) -> None:
    assert wire.ask(method, path, body) == REQUIRED


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/generate", "POST"), ("/assign", "POST"), ("/unblock", "POST"), ("/delete", "DELETE"), ("/keep-alive", "POST")],
)
def test_other_methods_are_405_with_an_allow_header(wire: Wire, config_file: Path, path: str, allowed: str) -> None:
    before = rows(config_file, "bounded")
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - {allowed}:
        answer = wire.send(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert rows(config_file, "bounded") == before


def test_a_limit_of_100_allows_exactly_100_tokens(ports: Sequence[int], config_file: Path, clock: HandClock) -> None:
    """The original made 101. Nine rounds, since the race is rare."""

    def one(connection: Connection, _: int) -> Answer:
        return connection.ask("POST", f"{PREFIX}/generate")

    for room in (CAPACITY, *[4] * 8):
        advance_a_day(clock)
        fill(config_file, "bounded", CAPACITY - room, clock())
        answers = at_once(ports, room + 28, one)
        made = [token for answer in answers if answer.status == 200 for token in answer.json()["tokens"]]
        assert len(set(made)) == len(made) == room
        assert [answer.body for answer in answers if answer.status != 200] == [FULL.body.encode()] * 28


def test_concurrent_batches_never_exceed_the_limit(ports: Sequence[int], config_file: Path, clock: HandClock) -> None:
    def several(connection: Connection, number: int) -> Answer:
        return connection.ask("POST", f"{PREFIX}/generate", {"count": number % 5 + 3})

    answers = at_once(ports, 48, several)
    made = [token for answer in answers if answer.status == 200 for token in answer.json()["tokens"]]
    assert CAPACITY - 3 < len(set(made)) == len(made) <= CAPACITY
    assert len([row for row in rows(config_file, "bounded") if row[3] == clock()]) == len(made)
