"""TokenAuth: when it logs in, what it repeats, and which requests a failed login fails."""

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import ROOT, HandClock, Server
from tests.wire.client.issuers import Hand
from tests.wire.client.sites import EXPIRY, OPTIONS, Answer, Issuer, Kind, Site, queued, site
from tokenauth.client import TokenAuth
from tokenauth.errors import InvalidCredentials, IssuerUnavailable, RetryLater, TooManyAttempts


@pytest.fixture(params=["threads", "tasks"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def home(issuer: Issuer) -> Iterator[Site]:
    """Serve an issuer and a guarded service at one origin."""
    with site(issuer) as running:
        yield running


@pytest.fixture
def auth(home: Site, wall: Hand) -> TokenAuth:
    return TokenAuth(home.url, "ann", "ann-secret", clock=wall)


def test_it_logs_in_once_and_sends_its_token_each_time(kind: Kind, home: Site, auth: TokenAuth) -> None:
    for number in range(3):
        assert kind.send(auth, "POST", f"{home.url}/x", content=f"body {number}").text == f"body {number}"
    assert home.paths() == ["POST /api/token"] + ["POST /x"] * 3


def test_it_logs_in_again_when_the_token_has_expired(kind: Kind, home: Site, auth: TokenAuth, wall: Hand) -> None:
    kind.send(auth, "GET", f"{home.url}/x")
    wall.now = EXPIRY - 0.001
    kind.send(auth, "GET", f"{home.url}/x")
    assert home.paths() == ["POST /api/token", "GET /x", "GET /x"]
    wall.now = EXPIRY
    kind.send(auth, "GET", f"{home.url}/x")
    assert home.paths()[3:] == ["POST /api/token", "GET /x"]


def test_a_clock_far_ahead_only_costs_a_login_each_time(kind: Kind, home: Site, auth: TokenAuth, wall: Hand) -> None:
    wall.now = EXPIRY + 1
    for _ in range(2):
        assert kind.send(auth, "GET", f"{home.url}/x").status_code == 200
    assert home.paths() == ["POST /api/token", "GET /x"] * 2


def test_after_a_401_it_logs_in_and_repeats_the_request(
    kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth
) -> None:
    kind.send(auth, "GET", f"{home.url}/x")
    issuer.valid.clear()
    assert kind.send(auth, "POST", f"{home.url}/x", json={"a": 1}).json() == {"a": 1}
    assert home.paths() == ["POST /api/token", "GET /x", "POST /x", "POST /api/token", "POST /x"]


def test_a_401_that_stays_is_returned_after_one_login(kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    home.answer = lambda request: issuer(request) if request.path == "/api/token" else (401, {}, b"")
    kind.send(auth, "GET", f"{home.url}/x")
    assert home.paths() == ["POST /api/token", "GET /x"] * 2


def test_a_401_that_stays_costs_a_login_every_10_s(
    kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth, wall: Hand
) -> None:
    """A service may have its own reasons. A clock that is set back does not hold up a login."""
    home.answer = lambda request: issuer(request) if request.path == "/api/token" else (401, {}, b"")
    kind.send(auth, "GET", f"{home.url}/x")
    for seconds, logins in ((0, 0), (9.9, 0), (0.1, 1), (9.9, 0), (-3600, 1)):
        wall.now += seconds
        home.seen.clear()
        for _ in range(2):
            assert kind.send(auth, "GET", f"{home.url}/x").status_code == 401
        assert home.paths().count("POST /api/token") == logins


def test_a_hook_that_raises_costs_a_login_every_10_s(
    kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth, wall: Hand
) -> None:
    home.answer = lambda request: issuer(request) if request.path == "/api/token" else (401, {}, b"")
    for seconds in (0, 0, 0, 10, 0):
        wall.now += seconds
        with pytest.raises(httpx.HTTPStatusError):
            raise_for_status(kind, auth, f"{home.url}/x")
    assert issuer.logins == 3


def test_a_body_that_cannot_be_repeated_is_sent_once(kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    kind.send(auth, "GET", f"{home.url}/x")
    issuer.valid.clear()
    assert kind.send(auth, "POST", f"{home.url}/x", content=kind.generator(b"once")).status_code == 401
    assert kind.send(auth, "POST", f"{home.url}/x", content=kind.generator(b"once")).text == "once"
    assert home.paths() == ["POST /api/token", "GET /x", "POST /x", "POST /api/token", "POST /x"]


def test_concurrent_requests_share_one_login(kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    issuer.gate.clear()
    answers = kind.storm(auth, f"{home.url}/x", 10, issuer.gate.set)
    assert [answer.status_code for answer in answers if isinstance(answer, httpx.Response)] == [200] * 10
    assert issuer.logins == 1


def test_after_a_revocation_one_login_serves_all_requests(
    kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth
) -> None:
    kind.send(auth, "GET", f"{home.url}/x")
    issuer.valid.clear()
    issuer.gate.clear()
    answers = kind.storm(auth, f"{home.url}/x", 10, issuer.gate.set)
    assert [answer.status_code for answer in answers if isinstance(answer, httpx.Response)] == [200] * 10
    assert issuer.logins == 2


def test_a_late_401_uses_the_new_token(kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    kind.send(auth, "GET", f"{home.url}/x")
    issuer.valid.clear()
    first = True

    def answer(request: Any) -> Answer:
        nonlocal first
        if first and request.path == "/slow":
            first = False
            Kind("threads").send(auth, "GET", f"{home.url}/x")
            return 401, {}, b""
        return issuer(request)

    home.answer = answer
    assert kind.send(auth, "GET", f"{home.url}/slow").status_code == 200
    assert issuer.logins == 2


FAILURES: dict[str, tuple[Answer, Exception]] = {
    "wrong password": ((401, {}, b"invalid credentials"), InvalidCredentials()),
    "throttled": ((429, {"Retry-After": "7"}, b"{}"), TooManyAttempts(retry_after=7)),
    "down": ((503, {"Retry-After": "3"}, b"{}"), IssuerUnavailable(retry_after=3)),
    "401 of a proxy": ((401, {}, b"<h1>Unauthorized</h1>"), IssuerUnavailable()),
    "404": ((404, {"Retry-After": "soon"}, b""), IssuerUnavailable()),
    "200 of a proxy": ((200, {}, b"<h1>Welcome</h1>"), IssuerUnavailable()),
    "200 with no token": ((200, {}, b'{"token": "a\\r\\nb: c", "expiry_time": 1900000000}'), IssuerUnavailable()),
    "302": ((302, {"Location": "/x"}, b""), IssuerUnavailable()),
}


@pytest.mark.parametrize(("answer", "error"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failed_login_raises_with_its_reason(
    kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth, answer: Answer, error: Exception
) -> None:
    issuer.refuse = answer
    with pytest.raises(type(error)) as caught:
        kind.send(auth, "GET", f"{home.url}/x")
    assert str(caught.value) == str(error)
    if isinstance(caught.value, RetryLater) and isinstance(error, RetryLater):
        assert caught.value.retry_after == error.retry_after
    assert home.paths() == ["POST /api/token"]
    issuer.refuse = None
    assert kind.send(auth, "GET", f"{home.url}/x").status_code == 200


def test_a_failed_login_fails_all_waiting_requests(kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    issuer.gate.clear()
    issuer.refuse = (429, {"Retry-After": "7"}, b"{}")
    answers = kind.storm(auth, f"{home.url}/x", 10, issuer.gate.set)
    assert [answer.retry_after for answer in answers if isinstance(answer, TooManyAttempts)] == [7] * 10
    assert issuer.logins == 1


def test_a_login_without_a_connection_is_issuer_unavailable(kind: Kind, home: Site) -> None:
    auth = TokenAuth("http://127.0.0.1:1", "ann", "ann-secret")
    for _ in range(2):
        with pytest.raises(IssuerUnavailable):
            kind.send(auth, "GET", f"{home.url}/x")
    assert home.seen == []


def test_a_login_timeout_fails_all_waiting_requests(kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    """The timeout is that of the request that needs the login."""
    issuer.gate.clear()
    with pytest.raises(IssuerUnavailable):
        kind.send(auth, "GET", f"{home.url}/x", timeout=0.05)
    issuer.gate.set()
    assert kind.send(auth, "GET", f"{home.url}/x").status_code == 200


def test_an_error_of_the_request_is_not_changed(kind: Kind, home: Site, auth: TokenAuth) -> None:
    kind.send(auth, "GET", f"{home.url}/x")
    auth._origins = {"http://127.0.0.1:1"}
    with pytest.raises(httpx.ConnectError):
        kind.send(auth, "GET", "http://127.0.0.1:1/x")


async def test_a_cancelled_login_is_taken_over_by_another_task(home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    issuer.gate.clear()
    async with httpx.AsyncClient(auth=auth, **OPTIONS) as client:
        first = asyncio.create_task(client.get(f"{home.url}/x"))
        await asyncio.to_thread(issuer.asked.wait)
        others = [asyncio.create_task(client.get(f"{home.url}/x")) for _ in range(3)]
        await queued(auth, 3)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        issuer.gate.set()
        assert [(await other).status_code for other in others] == [200] * 3
    assert issuer.logins == 2


async def test_a_login_cancelled_in_its_answer_blocks_no_other(wall: Hand) -> None:
    """Also if the exception is kept, and with it the frames of its traceback."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"ann-secret")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        login_received.set()
        await reader.read()
        writer.close()

    login_received = asyncio.Event()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        auth = TokenAuth(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "ann", "ann-secret", clock=wall)
        async with httpx.AsyncClient(auth=auth, **OPTIONS) as client:
            kept: list[Any] = []
            for _ in range(2):
                login_received.clear()
                task = asyncio.create_task(client.get(f"{auth._url.copy_with(path='/x')}"))
                async with asyncio.timeout(20):
                    await login_received.wait()  # the second request logs in too
                task.cancel()
                kept += await asyncio.gather(task, return_exceptions=True)
            assert [type(error) for error in kept] == [asyncio.CancelledError] * 2


def test_the_response_keeps_no_password_and_no_token(kind: Kind, home: Site, auth: TokenAuth) -> None:
    """The login is in the history of the response."""
    answer = kind.send(auth, "GET", f"{home.url}/x")
    assert [b.request.url.path for b in answer.history] == ["/api/token"]
    kept = pickle.dumps(answer)
    assert b"ann-secret" not in kept
    assert b"1".zfill(64) not in kept
    assert "x-token" not in copy.copy(answer.request.headers)


def raise_for_status(kind: Kind, auth: TokenAuth, url: str) -> httpx.Response:
    """Send a request with a client whose hook raises for an error status."""
    if kind.name == "threads":
        with httpx.Client(auth=auth, event_hooks={"response": [httpx.Response.raise_for_status]}, **OPTIONS) as sync:
            return sync.get(url)

    async def check(response: httpx.Response) -> None:
        await response.aread()
        response.raise_for_status()

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(auth=auth, event_hooks={"response": [check]}, **OPTIONS) as client:
            return await client.get(url)

    return asyncio.run(run())


def test_a_hook_that_raises_only_prevents_the_retry(kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    assert raise_for_status(kind, auth, f"{home.url}/x").status_code == 200
    issuer.valid.clear()
    with pytest.raises(httpx.HTTPStatusError):
        raise_for_status(kind, auth, f"{home.url}/x")
    assert raise_for_status(kind, auth, f"{home.url}/x").status_code == 200
    assert issuer.logins == 2


def test_a_401_behind_a_redirect_is_not_about_the_token(
    kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth
) -> None:
    """X-Token is not carried along, so another login would change nothing."""

    def answer(request: Any) -> Answer:
        return (307, {"Location": "/y"}, b"") if request.path == "/x" else issuer(request)

    home.answer = answer
    for _ in range(3):
        assert kind.send(auth, "GET", f"{home.url}/x", follow_redirects=True).status_code == 401
    assert issuer.logins == 1


def test_waiting_for_a_shared_login_keeps_its_own_timeout(
    kind: Kind, home: Site, issuer: Issuer, auth: TokenAuth
) -> None:
    issuer.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(kind.send, auth, "GET", f"{home.url}/x", timeout=None)
        issuer.asked.wait()
        with pytest.raises(IssuerUnavailable):
            kind.send(auth, "GET", f"{home.url}/x", timeout=httpx.Timeout(5, read=0.05))
        issuer.gate.set()
        assert first.result().status_code == 200
    assert issuer.logins == 1


async def test_a_cancelled_waiter_leaves_the_login_to_the_others(home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    issuer.gate.clear()
    async with httpx.AsyncClient(auth=auth, **OPTIONS) as client:
        tasks = [asyncio.create_task(client.get(f"{home.url}/x")) for _ in range(3)]
        await queued(auth, 2)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        issuer.gate.set()
        assert [(await task).status_code for task in (tasks[0], tasks[2])] == [200] * 2
    assert issuer.logins == 1


@pytest.mark.parametrize("password", ["hidden-word", "hidden-\udc00"], ids=["text", "surrogate"])
def test_no_text_contains_the_password_or_the_token(kind: Kind, password: str, wall: Hand) -> None:
    value = "7" * 64

    def answer(request: Any) -> Answer:
        if request.path != "/api/token" or len(running.seen) > 1:
            return 401, {}, f"no: {request.token}".encode()
        return 200, {}, b'{"token": "%b", "expiry_time": %d}' % (value.encode(), EXPIRY)

    with site(answer) as running:
        auth = TokenAuth(running.url, "ann", password, origins=[], clock=wall)
        texts = [repr(auth), str(auth)]
        with pytest.raises(IssuerUnavailable) as caught:
            kind.send(auth, "GET", f"{running.url}/x")
        texts += [repr(caught.value), *traceback.format_exception(caught.value)]
        with pytest.raises(ValueError, match="origins") as refused:
            kind.send(auth, "GET", "http://127.0.0.1:1/x")
        texts += [repr(refused.value), *traceback.format_exception(refused.value)]
    assert not [text for text in texts if "hidden" in text or value in text]


def test_a_task_does_not_wait_for_the_login_of_a_thread(home: Site, issuer: Issuer, auth: TokenAuth) -> None:
    """A thread that runs an event loop could wait for itself."""
    held = issuer.gate
    held.clear()
    slow = threading.Thread(target=Kind("threads").send, args=(auth, "GET", f"{home.url}/x"))
    slow.start()
    assert issuer.asked.wait(60)
    issuer.gate = threading.Event()
    issuer.gate.set()
    assert Kind("tasks").send(auth, "GET", f"{home.url}/x").status_code == 200
    assert slow.is_alive()
    held.set()
    slow.join()


FORKING = """
import os, sys, threading, httpx
from tokenauth.client import TokenAuth

def get():
    return httpx.get(f"{url}/x", auth=auth, trust_env=False, timeout=20).status_code

url = sys.argv[1]
auth = TokenAuth(url, "ann", "ann-secret")
first = threading.Thread(target=get)
first.start()
sys.stdin.readline()
child = os.fork()
if not child:
    os._exit(0 if get() == 200 else 1)
first.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""A program that forks while it logs in."""


def test_a_fork_does_not_wait_for_a_login_of_its_parent(home: Site, issuer: Issuer) -> None:
    issuer.expiry = 2**40
    issuer.gate.clear()
    command = [sys.executable, "-c", FORKING, home.url]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as program:
        try:
            assert issuer.asked.wait(20)
            assert program.stdin is not None
            program.stdin.write(b"\n")
            program.stdin.close()
            until(lambda: issuer.logins == 2, "the child logs in")
            issuer.gate.set()
            assert program.wait(20) == 0
        finally:
            program.kill()


def test_it_works_with_a_real_issuer(kind: Kind, server: Server, clock: HandClock) -> None:
    auth = TokenAuth(server.url, "ann", "ann-secret", clock=clock)
    assert kind.send(auth, "GET", f"{server.url}/api/me").json()["username"] == "ann"
    assert kind.send(auth, "DELETE", f"{server.url}/api/tokens").json() == {"revoked": 1}
    assert kind.send(auth, "GET", f"{server.url}/api/me").json()["username"] == "ann"
    listed = kind.send(auth, "GET", f"{server.url}/api/tokens").json()["tokens"]
    assert [found["user_agent"] for found in listed] == ["tokenauth.client"]
    kind.send(auth, "DELETE", f"{server.url}/api/tokens")
    with pytest.raises(InvalidCredentials):
        kind.send(TokenAuth(server.url, "ann", "wrong", clock=clock), "GET", f"{server.url}/api/me")
    clock.advance(3600)
