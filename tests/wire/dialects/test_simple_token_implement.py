"""The contract of wire/simple-token-implement.md: N anonymous permits behind one password."""

from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest

from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock, Server
from tests.wire.dialects.conftest import API_PASSWORD, Reply, Wire, at_once, reply, rows

PREFIX = "/simple-token-implement"
PATHS = ["/issue_token", "/recycle_token", "/tokens"]
UNAUTHORIZED = reply(401, {"error": "Unauthorized"})

At = Callable[[float], None]


@pytest.fixture(scope="module")
def wire(clients: Sequence[httpx.Client]) -> Wire:
    """Send requests with the password."""
    return Wire(clients, PREFIX, X_API_PASSWORD=API_PASSWORD)


@pytest.fixture(scope="module")
def anonymous(clients: Sequence[httpx.Client]) -> Wire:
    """Send requests without the password."""
    return Wire(clients, PREFIX)


def issued(left: int, info: str = "No info provided") -> Reply:
    """Return the answer to an issue that succeeds."""
    return reply(200, {"message": "Token issued successfully.", "available_tokens": left, "info": info})


def none_left(info: str = "No info provided") -> Reply:
    """Return the answer to an issue while no permit is free."""
    return reply(429, {"message": "No tokens available.", "available_tokens": 0, "info": info})


def recycled(left: int, info: str = "No info provided") -> Reply:
    """Return the answer to a recycle that succeeds."""
    return reply(200, {"message": "Token recycled successfully.", "available_tokens": left, "info": info})


def available(count: int) -> Reply:
    """Return the answer with the number of free permits."""
    return reply(200, {"available_tokens": count})


@pytest.mark.parametrize(
    "sent",
    [None, b"", b"wrong", API_PASSWORD.upper().encode(), API_PASSWORD[:-1].encode(), API_PASSWORD.encode() + b"x",
     b"p\xe4ss\xff", b"x" * 4000],
)  # fmt: skip
def test_without_the_right_password_nothing_is_done(wire: Wire, anonymous: Wire, sent: bytes | None) -> None:
    headers = {} if sent is None else {"X-API-PASSWORD": sent}
    assert wire.ask("GET", "/issue_token") == issued(2)
    for path in PATHS:
        for method in ("GET", "POST"):
            assert anonymous.ask(method, f"{path}?info=I", headers=headers) == UNAUTHORIZED
        assert wire.ask("GET", "/tokens") == available(2), "a success also resets the failure counter"


@pytest.mark.parametrize("spaces", [b" %s", b"%s ", b"\t%s \t"])
def test_spaces_around_the_password_are_ignored(server: Server, spaces: bytes) -> None:
    """RFC 9110 section 5.5."""
    head = f"GET {PREFIX}/tokens HTTP/1.1\r\nHost: x\r\nX-API-PASSWORD:".encode()
    with Connection(server.port) as connection:
        assert connection.send(head + spaces % API_PASSWORD.encode() + b"\r\n\r\n").status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_all_permits_are_issued_and_recycled(wire: Wire, method: str) -> None:
    assert wire.ask(method, "/tokens") == available(3)
    for left in (2, 1, 0):
        assert wire.ask(method, "/issue_token?info=job-7") == issued(left, "job-7")
        assert wire.ask(method, "/tokens") == available(left)
    for _ in range(2):
        assert wire.ask(method, "/issue_token?info=job-8") == none_left("job-8")
    for left in (1, 2, 3):
        assert wire.ask(method, "/recycle_token?info=job-7") == recycled(left, "job-7")
        assert wire.ask(method, "/tokens") == available(left)
    all_available = {"message": "All tokens are already available.", "available_tokens": 3, "info": "job-9"}
    for _ in range(2):
        assert wire.ask(method, "/recycle_token?info=job-9") == reply(400, all_available)
    assert wire.ask(method, "/issue_token") == issued(2)


@pytest.mark.parametrize(
    ("query", "info"),
    [
        ("", "No info provided"),
        ("?other=x", "No info provided"),
        ("?info=", ""),
        ("?info=%22a%22+%26%3Cb%3E%5C", '"a" &<b>\\'),
        ("?info=gr%C3%BC%C3%9Fe%20%F0%9F%94%91", "grüße 🔑"),
        ("?info=%FF%ED%A0%80", "\ufffd" * 4),
        ("?info=first&info=second", "first"),
        (f"?info={'x' * 8000}", "x" * 8000),
    ],
)
def test_info_is_echoed_by_every_answer(wire: Wire, query: str, info: str) -> None:
    for left in (2, 1, 0):
        assert wire.ask("GET", f"/issue_token{query}") == issued(left, info)
    assert wire.ask("GET", f"/issue_token{query}") == none_left(info)
    for left in (1, 2, 3):
        assert wire.ask("GET", f"/recycle_token{query}") == recycled(left, info)
    assert wire.ask("GET", f"/recycle_token{query}").document["info"] == info


def test_info_with_control_characters_is_echoed_as_json(wire: Wire) -> None:
    answer = wire.ask("GET", "/issue_token?info=%00%0D%0AX-Evil:%201")
    assert answer.document["info"] == "\0\r\nX-Evil: 1"
    assert "\0" not in answer.body


def test_a_too_long_query_is_400_and_issues_nothing(wire: Wire) -> None:
    answer = wire.ask("GET", f"/issue_token?info={'x' * 8192}")
    assert (answer.status, answer.document["error"]) == (400, "invalid_request")
    assert wire.ask("GET", "/tokens") == available(3)


def test_each_permit_has_its_own_deadline(wire: Wire, at: At) -> None:
    """The original has one timer for all permits and restarts it at each issue."""
    at(0)
    assert wire.ask("GET", "/issue_token") == issued(2)
    at(10)
    assert wire.ask("GET", "/issue_token") == issued(1)
    for seconds, free in ((29.9, 1), (30.0, 2), (39.9, 2), (40.0, 3), (1000.0, 3)):
        at(seconds)
        assert wire.ask("GET", "/tokens") == available(free)
    assert wire.ask("GET", "/recycle_token").status == 400


def test_permits_expire_under_constant_demand(wire: Wire, at: At) -> None:
    """Every 10 seconds a client takes a permit and never recycles it. Another client is always refused."""
    for turn in range(12):
        at(turn * 10)
        assert wire.ask("GET", "/issue_token") == issued(max(0, 2 - turn))
        if turn >= 2:
            at(turn * 10 + 9.9)
            assert wire.ask("GET", "/issue_token") == none_left()


def test_recycling_frees_the_oldest_permit(wire: Wire, at: At) -> None:
    for seconds, left in ((0.0, 2), (10.0, 1), (20.0, 0)):
        at(seconds)
        assert wire.ask("GET", "/issue_token") == issued(left)
    at(25)
    assert wire.ask("GET", "/recycle_token") == recycled(1)
    for seconds, free in ((39.9, 1), (40.0, 2), (49.9, 2), (50.0, 3)):
        at(seconds)
        assert wire.ask("GET", "/tokens") == available(free)


def test_concurrent_issues_never_exceed_the_permits(ports: Sequence[int]) -> None:
    def issue(connection: Connection, number: int) -> Answer:
        return connection.ask("POST", f"{PREFIX}/issue_token?info={number}", X_API_PASSWORD=API_PASSWORD)

    answers = at_once(ports, 100, issue)
    assert sorted(answer.status for answer in answers) == [200] * 3 + [429] * 97
    assert sorted(answer.json()["available_tokens"] for answer in answers if answer.status == 200) == [0, 1, 2]


def test_concurrent_recycles_free_only_issued_permits(wire: Wire, ports: Sequence[int]) -> None:
    for _ in range(3):
        wire.post("/issue_token")

    def recycle(connection: Connection, _: int) -> Answer:
        return connection.ask("POST", f"{PREFIX}/recycle_token", X_API_PASSWORD=API_PASSWORD)

    answers = at_once(ports, 50, recycle)
    assert sorted(answer.status for answer in answers) == [200] * 3 + [400] * 47
    assert wire.ask("GET", "/tokens") == available(3)


@pytest.mark.parametrize("body", [b"{", b'{"info": 1}', b"\xff\0", b"x" * 17 * 1024, b'"\\ud800"'])
def test_a_request_body_is_ignored(wire: Wire, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    assert wire.post("/issue_token?info=I", content=body, headers=headers) == issued(2, "I")
    assert wire.post("/recycle_token?info=I", content=body, headers=headers) == recycled(3, "I")
    assert wire.post("/tokens", content=body, headers=headers) == available(3)


@pytest.mark.parametrize("path", PATHS)
def test_other_methods_are_405_with_an_allow_header(wire: Wire, path: str) -> None:
    """Also HEAD: it must have no effect (RFC 9110 section 9.2.1), and GET has one here."""
    assert wire.post("/issue_token").status == 200
    assert wire.send("HEAD", path).status_code == 405
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = wire.send(method, path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == {"GET", "POST"}
        assert answer.json()["error"] == "method_not_allowed"
    assert wire.ask("GET", "/tokens") == available(2)


def test_password_guesses_are_throttled(wire: Wire, anonymous: Wire, clock: HandClock) -> None:
    wrong = {"X-API-PASSWORD": "wrong"}
    for _ in range(5):
        assert anonymous.ask("GET", "/tokens", headers=wrong) == UNAUTHORIZED
    for seconds in (1, 2, 4):
        for answer in (anonymous.send("GET", "/tokens", headers=wrong), wire.send("POST", "/issue_token")):
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == str(seconds)
            assert answer.json()["error"] == "too_many_attempts"
        assert anonymous.ask("GET", "/tokens") == UNAUTHORIZED, "a request without a password is not counted"
        clock.advance(seconds)
        assert anonymous.ask("GET", "/tokens", headers=wrong) == UNAUTHORIZED
    clock.advance(8)
    assert wire.ask("GET", "/tokens") == available(3), "throttled requests took no permit"
    for _ in range(5):
        assert anonymous.ask("GET", "/tokens", headers=wrong) == UNAUTHORIZED, "the count starts again"


def test_there_is_one_row_per_permit(wire: Wire, config_file: Path) -> None:
    for method in ("GET", "POST") * 4:
        wire.ask(method, "/issue_token")
    assert len(rows(config_file, "permits")) == 3
    assert wire.ask("GET", "/tokens") == available(0)
