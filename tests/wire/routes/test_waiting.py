"""The waiting line over sockets."""

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.main_process import workers_of
from tests.support.servers import NO_TLS, Server, log_in, serve, write_config
from tests.support.wrapped import ended

POOLS = """
[server]
workers = 2
[pools.p]
capacity = 3
prefill = true
lease_ttl = "60s"
[pools.one]
capacity = 1
prefill = true
"""
PASSWORD = {"X-API-PASSWORD": "secret"}
ISSUED = {"message": "Token issued successfully.", "info": "job-7"}
LEASE = ["token", "holder", "fence", "expiry_time", "expires_in"]


class User:
    """A user, with one connection for each request."""

    def __init__(self, server: Server, username: str) -> None:
        self._url = server.url
        self._threads = ThreadPoolExecutor(24)
        with server.client() as client:
            self._token = log_in(client, username, {"admin": "admin"}.get(username, f"{username}-secret"))

    def ask(self, method: str, path: str, **document: Any) -> httpx.Response:
        with httpx.Client(base_url=self._url, timeout=90, verify=NO_TLS) as client:
            headers = {"X-Token": self._token}
            return client.request(method, f"/api/pools/{path}", json=document or None, headers=headers)

    def lease(self, pool: str = "one", **terms: Any) -> httpx.Response:
        return self.ask("POST", f"{pool}/leases", **terms)

    def wait(self, pool: str = "one", **terms: Any) -> Future[httpx.Response]:
        """Ask in the background, and return when the request is in the line."""
        before = self.line(pool)["waiting"]
        waiting = self._threads.submit(self.lease, pool, **{"wait": 50, **terms})
        while self.line(pool)["waiting"] == before:
            assert not waiting.done(), waiting.result().text
        return waiting

    def line(self, pool: str = "one") -> Any:
        return self.ask("GET", f"{pool}/requests").json()

    def release(self, token: str, pool: str = "one") -> None:
        assert self.ask("DELETE", f"{pool}/leases/{token}").status_code == 204


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(write_config(tmp_path_factory.mktemp("waiting"), POOLS)) as running:
        yield running


@pytest.fixture
def ann(server: Server) -> User:
    return User(server, "ann")


@pytest.fixture
def bob(server: Server) -> User:
    return User(server, "bob")


@pytest.fixture
def admin(server: Server) -> User:
    return User(server, "admin")


def test_who_waits_gets_the_token_that_is_released(ann: User, bob: User) -> None:
    held = ann.lease().json()["token"]
    waiting = bob.wait(holder="job")
    ann.release(held)
    answer = waiting.result()
    assert answer.status_code == 201
    assert [*answer.json()] == [*LEASE, "request"]
    assert (answer.json()["token"], answer.json()["expires_in"]) == (held, 60)
    bob.release(held)


def test_a_request_that_waits_too_long_keeps_its_place(ann: User, bob: User) -> None:
    held = ann.lease().json()["token"]
    answer = bob.lease(wait=0.01, request="mine/1")
    assert (answer.status_code, answer.headers["retry-after"]) == (202, "0")
    assert answer.json() == {"request": "mine/1", "position": 1, "waiting": 1, "retry_after": 0}
    polled = ann.lease(wait=0)
    assert (polled.status_code, polled.headers["retry-after"]) == (202, "1")
    assert (polled.json()["position"], polled.json()["waiting"]) == (2, 2)
    assert ann.lease().status_code == 409
    assert bob.lease(wait=0, request="mine/1", holder="other").json()["error"] == "request_differs"
    assert bob.ask("DELETE", "one/requests/mine%2F1").status_code == 204
    assert ann.ask("DELETE", f"one/requests/{polled.json()['request']}").status_code == 204
    ann.release(held)


def test_a_lost_answer_costs_nothing(ann: User) -> None:
    first = ann.lease(request="r1").json()
    again = ann.lease(request="r1").json()
    assert {**again, "expires_in": 60} == {**first, "expires_in": 60}
    assert 0 < again["expires_in"] <= 60
    ann.release(first["token"])
    lost = ann.lease(request="r1")
    assert (lost.status_code, lost.json()["error"]) == (409, "lease_lost")
    over = "This request was granted, and its lease is over: use a new id for a new lease."
    assert lost.json()["error_description"] == over


def test_the_copy_that_was_sent_last_gets_the_lease(ann: User) -> None:
    """In whichever worker the copies wait: twelve requests, so that it is not always the same one."""
    held = ann.lease().json()["token"]
    requests = [f"sent twice/{number}" for number in range(12)]
    first = [ann.wait(request=request) for request in requests]
    last = [ann._threads.submit(ann.lease, wait=50, request=request) for request in requests]
    assert [copy.result(60).status_code for copy in first] == [202] * 12
    for copy in last:
        ann.release(held)
        assert copy.result(60).status_code == 201
    ann.release(held)


def test_several_tokens_are_leased_together(ann: User) -> None:
    answer = ann.lease("p", count=2, ttl=5, request="both")
    assert (answer.status_code, [*answer.json()]) == (201, ["leases", "request"])
    leases = answer.json()["leases"]
    assert [[*lease] for lease in leases] == [LEASE, LEASE]
    assert {lease["expires_in"] for lease in leases} == {5}
    assert ann.lease("p", count=2).json()["error"] == "no_free_token"
    one = ann.lease("p", count=1).json()
    assert [*one] == ["leases"]
    for lease in (*leases, *one["leases"]):
        ann.release(lease["token"], "p")
    assert ann.lease("p", count=4).status_code == 400


def test_the_line_shows_others_all_but_the_ids(ann: User, bob: User, admin: User) -> None:
    held = ann.lease().json()["token"]
    ann.lease(wait=0, request="a", holder="ci", count=1, priority=-1)
    bob.lease(wait=0, request="b")
    shown = bob.line()["requests"]
    assert [(each["position"], each["user"], each["holder"], each["priority"]) for each in shown] == [
        (1, "bob", "bob", 0),
        (2, "ann", "ci", -1),
    ]
    assert [each.get("request") for each in shown] == ["b", None]
    assert [each["request"] for each in admin.line()["requests"]] == ["b", "a"]
    assert admin.ask("GET", "one/requests?limit=1").json()["waiting"] == 2
    assert bob.ask("DELETE", "one/requests/a?user=ann").json()["error"] == "insufficient_scope"
    for path in ("a?user=ann", "b?user=bob"):
        assert admin.ask("DELETE", f"one/requests/{path}").status_code == 204
    assert admin.ask("DELETE", "one/requests/b?user=bob").json()["error"] == "not_found"
    ann.release(held)


def test_a_manager_may_raise_a_priority(ann: User, admin: User) -> None:
    assert ann.lease(wait=0, priority=1).json()["error"] == "insufficient_scope"
    held = ann.lease().json()["token"]
    first = ann.wait()
    urgent = admin.wait(priority=1)
    ann.release(held)
    assert urgent.result().status_code == 201
    assert not first.done()
    admin.release(held)
    assert first.result().status_code == 201
    ann.release(held)


@pytest.mark.parametrize(
    "terms",
    [
        {"wait": 61},
        {"wait": -1},
        {"wait": "1"},
        {"request": ""},
        {"request": "x" * 129},
        {"request": "a\nb"},
        {"count": 101},
        {"count": 0},
        {"ttl": 0},
        {"ttl": 61},
        {"priority": 101},
        {"labels": ["x"]},
        {"labels": "x"},
    ],
    ids=str,
)
def test_wrong_terms_are_refused(ann: User, terms: dict[str, Any]) -> None:
    answer = ann.lease(**terms)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    [field] = terms
    assert answer.json()["error_description"].startswith(field)


@pytest.mark.parametrize("id", [".", ".."])
def test_an_id_that_no_url_can_have_is_refused(ann: User, id: str) -> None:
    answer = ann.lease(wait=0, request=id)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


def test_a_disconnected_client_leaves_the_line(server: Server, ann: User, bob: User) -> None:
    held = ann.lease().json()["token"]
    with pytest.raises(httpx.ReadTimeout), server.client() as client:
        client.post("/api/pools/one/leases", json={"wait": 60}, headers={"X-Token": bob._token}, timeout=0.5)
    while ann.line()["waiting"]:
        pass
    ann.release(held)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_stops_lets_clients_ask_again(tmp_path: Path, number: signal.Signals) -> None:
    """At a reload, new workers serve them."""
    with serve(write_config(tmp_path, POOLS)) as server:
        ann = User(server, "ann")
        held = ann.lease().json()["token"]
        waiting = ann.wait(request="mine")
        server.process.send_signal(number)
        answer = waiting.result()
        assert (answer.status_code, answer.json()["position"], answer.json()["retry_after"]) == (202, 1, 0)
        if number == signal.SIGHUP:
            again = ann._threads.submit(ask_until_served, ann)
            ann.release(held)
            assert again.result().status_code == 201


def ask_until_served(user: User) -> httpx.Response:
    """Ask as clients do: a worker that is stopping says at once that the request has to be sent again."""
    while (answer := user.lease(wait=50, request="mine")).status_code == 202:
        pass
    return answer


def test_a_lower_capacity_lets_others_pass_who_want_too_much(tmp_path: Path) -> None:
    dialect = '[dialects.simple-token-implement]\npool = "p"\nprefix = "/simple"\npassword = "secret"\n'
    with serve(write_config(tmp_path, POOLS + dialect)) as server:
        ann, bob = User(server, "ann"), User(server, "bob")
        held = [ann.lease("p").json()["token"] for _ in range(3)]
        big, small = ann.wait("p", count=3, request="big"), bob.wait("p", request="small")
        old = workers_of(server)
        assert len(old) == 2
        write_config(tmp_path, POOLS.replace("capacity = 3", "capacity = 2") + dialect)
        server.process.send_signal(signal.SIGHUP)
        assert [(each.result().status_code, each.result().json()["position"]) for each in (big, small)] == [
            (202, 1),
            (202, 2),
        ]
        until(lambda: all(map(ended, old)), "the workers with the earlier capacity have ended")
        refused = ann.lease("p", count=3, request="big", wait=50)
        assert (refused.status_code, refused.json()["error_description"]) == (400, "count: must be from 1 to 2.")
        again = bob._threads.submit(bob.lease, "p", request="small", wait=50)
        for token in held:
            ann.release(token, "p")
        assert again.result().status_code == 201
        assert ann.line("p")["waiting"] == 0, "the refused one has left"
        assert issue(server) == (200, {**ISSUED, "available_tokens": 0})
        bob.release(again.result().json()["token"], "p")
        assert issue(server) == (200, {**ISSUED, "available_tokens": 0})
        with server.client(headers=PASSWORD) as client:
            assert client.post("/simple/recycle_token?info=job-7").json()["available_tokens"] == 1
            assert client.post("/simple/recycle_token?info=job-7").json()["available_tokens"] == 2
        assert issue(server) == (200, {**ISSUED, "available_tokens": 1})


def issue(server: Server) -> tuple[int, Any]:
    """Lease a token through the dialect."""
    with server.client(headers=PASSWORD) as client:
        answer = client.post("/simple/issue_token?info=job-7")
        return answer.status_code, answer.json()
