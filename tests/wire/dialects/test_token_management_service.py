"""The contract of wire/token-management-service.md: a bounded pool of tokens that are assigned to clients."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock
from tests.wire.dialects.conftest import Reply, Wire, advance_a_day, at_once, fill, reply, rows

PREFIX = "/token-management-service"
CAPACITY = 100
FULL = reply(403, {"message": "Token pool size limit reached"})
NONE_FREE = reply(404, {"message": "No free token available"})
REFRESHED = reply(200, {"message": "Token keep-alive refreshed"})
FOREIGN = reply(403, {"message": "Token does not belong to this client"})
UNBLOCKED = reply(200, {"message": "Token unblocked"})
NOT_ASSIGNED = reply(403, {"message": "Token not assigned to any client"})
DELETED = reply(200, {"message": "Token deleted successfully!"})
NOT_FOUND = reply(404, {"message": "Token not found"})
UNKNOWN = f"token_{'u' * 64}"

At = Callable[[float], None]


@pytest.fixture(scope="module")
def wire(clients: Sequence[httpx.Client]) -> Wire:
    """Send requests to both workers."""
    return Wire(clients, PREFIX)


def generate(wire: Wire) -> str:
    """Generate a token."""
    answer = wire.post("/generate-token")
    token = str(answer.document["token"])
    assert answer == reply(201, {"token": token})
    return token


def assign(wire: Wire, client: str = "ann") -> Reply:
    """Assign a token to a client."""
    return wire.post("/assign-token", {"client_id": client})


def assigned(token: str) -> Reply:
    """Return the answer that hands out a token."""
    return reply(200, {"token": token})


def leased(wire: Wire, client: str = "ann") -> str:
    """Generate a token and assign it to a client."""
    token = generate(wire)
    assert assign(wire, client) == assigned(token)
    return token


def test_a_token_has_the_documented_form_and_is_random(wire: Wire) -> None:
    tokens = [generate(wire) for _ in range(20)]
    assert all(re.fullmatch(r"token_[A-Za-z0-9]{64}", token) for token in tokens)
    for place in range(len("token_"), len(tokens[0])):
        assert len({token[place] for token in tokens}) > 3, f"the character at {place} is hardly random"


def test_a_full_pool_generates_no_token(wire: Wire, config_file: Path, clock: HandClock) -> None:
    fill(config_file, "owned", CAPACITY - 1, clock())
    generate(wire)
    before = rows(config_file, "owned")
    for _ in range(2):
        assert wire.post("/generate-token") == FULL
    assert rows(config_file, "owned") == before
    token = assign(wire).document["token"]
    assert wire.post("/generate-token") == FULL, "assigned tokens count"
    assert wire.post("/delete-token", {"token": token}) == DELETED
    generate(wire)
    assert wire.post("/generate-token") == FULL


def test_tokens_are_assigned_until_the_pool_is_empty(wire: Wire, at: At) -> None:
    tokens = []
    for seconds in range(3):
        at(seconds)
        tokens.append(generate(wire))
    owners = ["ann", "bob", "ann"]
    assert [assign(wire, owner) for owner in owners] == [assigned(token) for token in tokens], "longest free first"
    for owner in owners:
        assert assign(wire, owner) == NONE_FREE
    for owner, token in zip(owners, tokens, strict=True):
        assert wire.post("/keep-alive", {"token": token, "client_id": owner}) == REFRESHED


def test_a_free_token_expires_after_five_minutes(wire: Wire, at: At) -> None:
    at(0)
    early, late = generate(wire), generate(wire)
    at(299.9)
    assert wire.post("/delete-token", {"token": early}) == DELETED
    at(300)
    assert wire.post("/delete-token", {"token": late}) == NOT_FOUND
    assert assign(wire) == NONE_FREE


def test_an_assigned_token_is_free_after_a_minute(wire: Wire, at: At) -> None:
    at(0)
    early, late = leased(wire, "ann"), leased(wire, "bob")
    at(59.9)
    assert assign(wire, "eve") == NONE_FREE
    at(60)
    assert wire.post("/keep-alive", {"token": early, "client_id": "ann"}) == FOREIGN
    assert wire.post("/unblock-token", {"token": early}) == NOT_ASSIGNED
    at(359.9)
    assert wire.post("/delete-token", {"token": early}) == DELETED
    at(360)
    assert wire.post("/delete-token", {"token": late}) == NOT_FOUND
    assert assign(wire, "eve") == NONE_FREE


def test_a_reassigned_token_is_lost_for_its_first_owner(wire: Wire, at: At) -> None:
    at(0)
    token = leased(wire, "ann")
    at(60)
    assert assign(wire, "bob") == assigned(token)
    assert wire.post("/keep-alive", {"token": token, "client_id": "ann"}) == FOREIGN
    at(119.9)
    assert assign(wire, "eve") == NONE_FREE
    at(120)
    assert assign(wire, "eve") == assigned(token)


@pytest.mark.parametrize("owner", [{"client_id": "ann"}, {}, {"client_id": None}])
def test_keep_alive_extends_a_token_by_a_minute(wire: Wire, at: At, owner: dict[str, str]) -> None:
    """The documentation of the original has no client_id here, but its code requires one."""
    at(0)
    token = leased(wire, "ann")
    for seconds in (59, 118, 177, 236, 295, 354):
        at(seconds)
        assert wire.post("/keep-alive", {"token": token, **owner}) == REFRESHED
        assert assign(wire, "bob") == NONE_FREE
    at(413.9)
    assert assign(wire, "bob") == NONE_FREE
    at(414)
    assert wire.post("/keep-alive", {"token": token, **owner}) == FOREIGN
    assert assign(wire, "bob") == assigned(token)


def test_keep_alive_refuses_the_token_of_another_client(wire: Wire, at: At) -> None:
    at(0)
    token = leased(wire, "ann")
    at(30)
    for other in ("bob", "ANN", "an", "ann ", ""):
        assert wire.post("/keep-alive", {"token": token, "client_id": other}) == FOREIGN
    at(60)
    assert assign(wire, "bob") == assigned(token), "the lease was not extended"


@pytest.mark.parametrize("owner", [{"client_id": "ann"}, {}])
def test_keep_alive_refuses_an_unassigned_token(wire: Wire, at: At, owner: dict[str, str]) -> None:
    at(0)
    token = generate(wire)
    at(200)
    assert wire.post("/keep-alive", {"token": token, **owner}) == FOREIGN
    assert wire.post("/keep-alive", {"token": UNKNOWN, **owner}) == FOREIGN
    at(300)
    assert assign(wire) == NONE_FREE


def test_an_unblocked_token_lives_five_minutes_more(wire: Wire, at: At) -> None:
    at(0)
    early, late = leased(wire, "ann"), leased(wire, "bob")
    at(30)
    for token in (early, late):
        assert wire.post("/unblock-token", {"token": token}) == UNBLOCKED
        assert wire.post("/unblock-token", {"token": token}) == NOT_ASSIGNED
        assert wire.post("/keep-alive", {"token": token, "client_id": "ann"}) == FOREIGN
    at(329.9)
    assert assign(wire, "eve") == assigned(early)
    at(330)
    assert assign(wire, "eve") == NONE_FREE
    assert wire.post("/delete-token", {"token": late}) == NOT_FOUND


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize("state", ["free", "assigned"])
def test_both_delete_methods_delete_any_token(wire: Wire, method: str, state: str) -> None:
    token = leased(wire) if state == "assigned" else generate(wire)
    assert wire.ask(method, "/delete-token", {"token": token}) == DELETED
    assert wire.ask(method, "/delete-token", {"token": token}) == NOT_FOUND
    assert wire.post("/unblock-token", {"token": token}) == NOT_ASSIGNED
    assert assign(wire) == NONE_FREE


@pytest.mark.parametrize("token", [UNKNOWN, "token_", "\0", "x" * 9000, "grün", "' OR 1=1 --"])
def test_an_unknown_token_is_refused_everywhere(wire: Wire, config_file: Path, token: str) -> None:
    leased(wire)
    before = rows(config_file, "owned")
    assert wire.post("/keep-alive", {"token": token}) == FOREIGN
    assert wire.post("/keep-alive", {"token": token, "client_id": "ann"}) == FOREIGN
    assert wire.post("/unblock-token", {"token": token}) == NOT_ASSIGNED
    for method in ("POST", "DELETE"):
        assert wire.ask(method, "/delete-token", {"token": token}) == NOT_FOUND
    assert rows(config_file, "owned") == before


@pytest.mark.parametrize(
    ("method", "path", "field"),
    [
        ("POST", "/assign-token", "client_id"),
        ("POST", "/keep-alive", "token"),
        ("POST", "/unblock-token", "token"),
        ("POST", "/delete-token", "token"),
        ("DELETE", "/delete-token", "token"),
    ],
)
@pytest.mark.parametrize("value", ["missing", "no body", None, ""])
def test_a_missing_field_is_400_and_named(
    wire: Wire, config_file: Path, method: str, path: str, field: str, value: str | None
) -> None:
    """The original answers 200, or 403 with a token without an owner."""
    token = generate(wire)
    other = {"client_id": token, "token": "ann"}[field]
    fields = {"client_id": "ann", "token": token, "other": other}
    del fields[field]
    body = {"missing": fields, "no body": None}.get(str(value), {**fields, field: value})
    before = rows(config_file, "owned")
    answer = wire.ask(method, path, body)
    assert answer.status == 400
    assert list(answer.document) == ["message"]
    assert re.search(rf"\b{field}\b", answer.document["message"])
    assert rows(config_file, "owned") == before
    assert assign(wire) == assigned(token)


@pytest.mark.parametrize("client", ["a", "x" * 256, "жанна", "' OR 1=1 --", "🔑", " ", "token_"])
def test_a_client_is_text_of_up_to_256_characters(wire: Wire, client: str) -> None:
    token = leased(wire, client)
    assert wire.post("/keep-alive", {"token": token, "client_id": client}) == REFRESHED
    assert wire.post("/keep-alive", {"token": token, "client_id": f"{client}x"}) == FOREIGN


@pytest.mark.parametrize("client", ["x" * 257, "x" * 9000, "a\0", "\n", "\u202e"])
def test_an_invalid_client_is_400_and_gets_nothing(wire: Wire, config_file: Path, client: str) -> None:
    generate(wire)
    before = rows(config_file, "owned")
    answer = assign(wire, client)
    assert (answer.status, answer.document["error"]) == (400, "invalid_request")
    assert rows(config_file, "owned") == before


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/generate-token", {"POST"}),
        ("/assign-token", {"POST"}),
        ("/keep-alive", {"POST"}),
        ("/unblock-token", {"POST"}),
        ("/delete-token", {"POST", "DELETE"}),
    ],
)
def test_other_methods_are_405_with_an_allow_header(
    wire: Wire, config_file: Path, path: str, allowed: set[str]
) -> None:
    before = rows(config_file, "owned")
    for method in {"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"} - allowed:
        answer = wire.send(method, path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == allowed
    assert rows(config_file, "owned") == before


def test_a_limit_of_100_allows_exactly_100_tokens(ports: Sequence[int], config_file: Path, clock: HandClock) -> None:
    """The original made 105. Nine rounds, since the race is rare."""

    def one(connection: Connection, _: int) -> Answer:
        return connection.ask("POST", f"{PREFIX}/generate-token")

    for room in (CAPACITY, *[4] * 8):
        advance_a_day(clock)
        fill(config_file, "owned", CAPACITY - room, clock())
        answers = at_once(ports, room + 28, one)
        made = [answer.json()["token"] for answer in answers if answer.status == 201]
        assert len(set(made)) == len(made) == room
        assert [answer.body for answer in answers if answer.status != 201] == [FULL.body.encode()] * 28


def test_no_token_gets_two_owners(wire: Wire, ports: Sequence[int], config_file: Path, clock: HandClock) -> None:
    values = fill(config_file, "owned", 80, clock())

    def client(connection: Connection, number: int) -> Answer:
        return connection.ask("POST", f"{PREFIX}/assign-token", {"client_id": f"client-{number}"})

    answers = at_once(ports, 120, client)
    owned = [answer.json()["token"] for answer in answers if answer.status == 200]
    assert sorted(owned) == sorted(values)
    assert {answer.status for answer in answers} == {200, 404}
    holders = {row[4] for row in rows(config_file, "owned")}
    assert len(holders) == len(values), "each token has another holder"
    assert assign(wire) == NONE_FREE
