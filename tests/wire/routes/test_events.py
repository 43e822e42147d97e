"""GET /api/events: hints to read again, for those who may, until the token ends."""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import NOTHING, HandClock, Server, exchange, log_in, worker, write_config
from tests.support.streaming import EventStream
from tokenauth import event_streams

SECRET = "write"


@pytest.fixture(scope="module")
def settings() -> str:
    return f"""
    [server]
    access_log = true
    cors_origins = ["https://app.example.com"]
    [pools.open]
    capacity = 2
    prefill = true
    lease_ttl = "10m"
    [pools.secret]
    scope = "{SECRET}"
    capacity = 1
    prefill = true
    [pools.phones]
    [[pools.phones.members]]
    name = "pixel"
    """


@pytest.fixture(name="server", scope="module")
def quick_server(config_file: Path, clock: HandClock) -> Iterator[Server]:
    """Run a worker that looks for changes ten times as often as usual, and says so to admins after each check."""
    with worker(config_file, clock, {"EVENTS": '{"LOOK": 0.1, "STATUS": 0.1}'}) as running:
        yield running


@pytest.fixture
def admin(client: httpx.Client) -> dict[str, str]:
    return {"X-Token": log_in(client)}


def open_stream(server: Server, token: str, headers: Mapping[str, str] = NOTHING) -> EventStream:
    stream = EventStream(server.port, token, headers)
    assert stream.status == 200
    return stream


def lease(client: httpx.Client, token: str, pool: str = "open", **terms: Any) -> httpx.Response:
    return client.post(f"/api/pools/{pool}/leases", json=terms, headers={"X-Token": token})


def test_a_stream_begins_with_who_i_am(server: Server, ann: str) -> None:
    with open_stream(server, ann) as stream:
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["cache-control"] == "no-store"
        assert stream.headers["x-accel-buffering"] == "no"
        assert stream.headers["transfer-encoding"] == "chunked"
        hello = stream.next()
        assert (hello.name, hello.data) == ("hello", {"user": "ann", "scopes": ["read", "write"]})
        assert hello.id


def test_a_stream_to_an_http10_client_has_no_chunks(server: Server, client: httpx.Client, ann: str) -> None:
    """It ends with the connection."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(f"GET /api/events HTTP/1.0\r\nX-Token: {ann}\r\n\r\n".encode())
        received = b""
        while b"event: hello" not in received:
            received += connection.recv(65536)
        client.delete("/api/token", headers={"X-Token": ann})
        while part := connection.recv(65536):
            received += part
    head, _, body = received.decode().partition("\r\n\r\n")
    assert "connection: close" in head.lower()
    assert "transfer-encoding" not in head.lower()
    assert body.startswith("id: ")
    assert body.endswith('event: bye\ndata: {"reason":"logged_out"}\n\n')


def test_leases_line_and_reservations_are_told(
    server: Server, sibling_client: httpx.Client, ann: str, admin: dict[str, str]
) -> None:
    """Also those of another worker."""
    with open_stream(server, ann) as stream:
        stream.next()
        leased = lease(sibling_client, ann).json()["token"]
        assert stream.wait("pool").data == {"name": "open"}
        sibling_client.delete(f"/api/pools/open/leases/{leased}", headers={"X-Token": ann})
        assert stream.wait("pool").data == {"name": "open"}
        for _ in range(2):
            assert lease(sibling_client, ann).status_code == 201
        stream.wait("pool")
        assert lease(sibling_client, ann, wait=0, request="r").status_code == 202
        assert stream.wait("pool").data == {"name": "open"}
        reservation = {"until": "1h"}
        sibling_client.put("/api/pools/phones/members/pixel/reservation", json=reservation, headers=admin)
        assert stream.wait("pool").data == {"name": "phones"}


def test_a_lapsed_lease_is_told(server: Server, client: httpx.Client, ann: str, clock: HandClock) -> None:
    assert lease(client, ann).status_code == 201
    with open_stream(server, ann) as stream:
        stream.next()
        clock.advance(601)
        assert stream.wait("pool").data == {"name": "open"}


def test_my_tokens_are_told_and_those_of_others_not(server: Server, sibling_client: httpx.Client, ann: str) -> None:
    with open_stream(server, ann) as stream:
        stream.next()
        mine = log_in(sibling_client, "ann", "ann-secret")
        assert stream.wait("tokens").data == {}
        sibling_client.delete("/api/token", headers={"X-Token": mine})
        stream.wait("tokens")
        log_in(sibling_client, "bob", "bob-secret")
        assert lease(sibling_client, ann).status_code == 201
        assert stream.next().name == "pool", "not the tokens of bob, which changed before"


def test_nobody_is_told_of_what_needs_another_scope(
    config_file: Path, clock: HandClock, client: httpx.Client, admin: dict[str, str], ann: str
) -> None:
    bob = log_in(client, "bob", "bob-secret")
    with (
        worker(config_file, clock, {"EVENTS": '{"LOOK": 0.1, "STATUS": 0.2}'}) as server,
        open_stream(server, bob) as of_bob,
        open_stream(server, ann) as of_ann,
        open_stream(server, admin["X-Token"]) as of_admin,
    ):
        of_bob.next(), of_ann.next()
        assert lease(client, ann, "secret").status_code == 201
        assert of_ann.wait("pool").data == {"name": "secret"}
        for _ in range(3):
            of_admin.wait("status")
        assert set(of_bob.names(0.3)) == set(), "nor of the status, nor of the throttle"


def test_admins_are_told_of_the_throttle_and_the_status(
    server: Server, client: httpx.Client, admin: dict[str, str]
) -> None:
    with open_stream(server, admin["X-Token"]) as stream:
        stream.next()
        assert stream.wait("status").data == {}
        while client.post("/api/token", json={"username": "bob", "password": "no"}).status_code != 429:
            pass
        assert stream.wait("throttle").data == {}


def test_a_quiet_stream_has_comments(config_file: Path, clock: HandClock, ann: str) -> None:
    assert event_streams.QUIET <= 15
    with worker(config_file, clock, {"EVENTS": '{"QUIET": 0.5}'}) as server, open_stream(server, ann) as stream:
        stream.next()
        until(lambda: stream.next(20).name == "", "a comment came", 40)


CHECKS = range(6)
"""Checks of the tokens within which a stream ends. Two do; one that a busy machine is too slow for does not count."""


@pytest.mark.parametrize("end", ["logged out", "revoked elsewhere", "expired"])
def test_the_stream_of_a_token_that_ended_ends_at_once(
    server: Server, client: httpx.Client, sibling_client: httpx.Client, ann: str, clock: HandClock, end: str
) -> None:
    """After each check, an admin gets an event: so the time is that of the server, however busy the machine is."""
    clock.advance(12 * 3600)
    with open_stream(server, ann) as stream, open_stream(server, log_in(client)) as of_admin:
        stream.next(), of_admin.wait("status")
        if end == "expired":
            clock.advance(12 * 3600)
        else:
            caller = client if end == "logged out" else sibling_client
            caller.delete("/api/token", headers={"X-Token": ann})
        for _ in CHECKS:
            of_admin.wait("status")
        assert stream.wait("bye", 0.1).data == {"reason": "logged_out"}
        assert stream.names(60) == []
        assert stream.ended
        with EventStream(server.port, ann) as again:
            assert again.status == 401


def test_a_stream_that_comes_back_is_told_what_it_missed(server: Server, client: httpx.Client, ann: str) -> None:
    with open_stream(server, ann) as stream, open_stream(server, ann) as other:
        stream.next(), other.next()
        for _ in range(2):  # with the first one comes what earlier tests have changed
            log_in(client, "ann", "ann-secret")
            other.wait("tokens")
        with open_stream(server, ann) as current:
            first = current.next().id
        with open_stream(server, ann, {"Last-Event-ID": first}) as back:
            assert back.next().name == "hello"
            assert back.names(0.3) == [], "nothing was missed"
        stream.close()
        assert lease(client, ann).status_code == 201
        last = other.wait("pool")
        assert last.id
    with open_stream(server, ann, {"Last-Event-ID": first}) as back:
        assert back.next().name == "hello"
        assert back.next() == ("pool", {"name": "open"}, last.id)
    with open_stream(server, ann, {"Last-Event-ID": last.id}) as back:
        assert back.next().name == "hello"
        assert back.names(0.3) == []


@pytest.mark.parametrize("unknown", ["0", "00000000-1", "x" * 5000, "%00", "-", "1-2-3", "²"])
def test_an_id_of_another_worker_has_everything_read_again(server: Server, ann: str, unknown: str) -> None:
    with open_stream(server, ann, {"Last-Event-ID": unknown}) as stream:
        assert [stream.next().name for _ in range(2)] == ["hello", "reset"]


def test_a_stream_is_no_use_of_the_token(server: Server, client: httpx.Client, ann: str) -> None:
    console = {"X-Tokenauth-Console": "1"}
    with open_stream(server, ann, console) as stream:
        stream.next()
    listed = client.get("/api/tokens", headers={"X-Token": ann, "X-Tokenauth-Console": "1"}).json()["tokens"]
    assert [each["last_used_at"] for each in listed if each["current"]] == [None]


def test_head_and_other_methods_are_answered_at_once(server: Server, client: httpx.Client, ann: str) -> None:
    header = {"X-Token": ann}
    answer = client.head("/api/events", headers=header)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    refused = client.post("/api/events", headers=header)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    assert client.get("/api/events").status_code == 401
    assert client.get("/api/events?x=1", headers=header).status_code == 400
    assert exchange(server.port, b"GET /api/events HTTP/1.1\r\nHost: a\r\nX-Token: x\r\n\r\n")[0] == 401


def test_the_access_log_has_one_line_at_the_end(tmp_path: Path) -> None:
    def lines() -> list[dict[str, Any]]:
        return [line for line in server.events("request") if line["route"] == "/api/events"]

    with worker(write_config(tmp_path, "[server]\naccess_log = true")) as server, server.client() as client:
        with open_stream(server, log_in(client)) as stream:
            stream.next(), stream.wait("status")
            assert lines() == []
        until(lambda: len(lines()) == 1, "the end was logged")
        assert (lines()[0]["status"], lines()[0]["ms"] > 500) == (200, True)


def test_pages_of_allowed_origins_may_read_it(server: Server, ann: str) -> None:
    with open_stream(server, ann, {"Origin": "https://app.example.com"}) as stream:
        assert stream.headers["access-control-allow-origin"] == "https://app.example.com"


def test_a_user_has_a_limited_number_of_streams(server: Server, client: httpx.Client, ann: str) -> None:
    streams = []
    try:
        while (stream := EventStream(server.port, ann)).status == 200:
            streams.append(stream)
        assert 240 < len(streams) <= 250  # some of earlier tests may not have ended yet
        assert (stream.status, stream.headers["retry-after"]) == (503, "30")
        with open_stream(server, log_in(client, "bob", "bob-secret")) as other:
            assert other.next().name == "hello"
    finally:
        for each in [*streams, stream]:
            each.close()

    def may_open() -> bool:
        with EventStream(server.port, ann) as again:
            return again.status == 200

    until(may_open, "streams of clients that have gone are forgotten")
