"""Client secrets and logins share one throttle."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from passlib.hash import argon2

from tests.support.servers import HandClock, Server, exchange, read_answer, worker, write_config
from tests.wire.oauth.forms import (
    ANN,
    ENDPOINTS,
    FULL_FORMS,
    GATEWAY,
    UNKNOWN,
    basic,
    fetch,
    form_bytes,
    post,
    refusal,
    send,
)

FREE = 5

Attempt = Callable[[httpx.Client, str], httpx.Response]


@pytest.fixture(scope="module")
def settings() -> str:
    return '[server]\nworkers = 2\n[throttle]\ndelay = "5m"'


ATTEMPTS: dict[str, Attempt] = {
    "token": lambda client, secret: post(client, "token", ("ann", secret), **FULL_FORMS["token"]),
    "introspect": lambda client, secret: post(client, "introspect", ("ann", secret), token=UNKNOWN),
    "revoke in the form": lambda client, secret: post(
        client, "revoke", None, token=UNKNOWN, client_id="ANN", client_secret=secret
    ),
    "two readings": lambda client, secret: post(client, "revoke", ("ann", f"{secret}+%41"), token=UNKNOWN),
    "api": lambda client, secret: client.post("/api/token", json={"username": "ann", "password": secret}),
}


def guess(client: httpx.Client, attempts: list[Attempt]) -> list[int]:
    """Try wrong secrets and return the statuses."""
    return [attempt(client, f"wrong-{number}").status_code for number, attempt in enumerate(attempts)]


def test_failures_on_all_endpoints_count_together(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock
) -> None:
    assert guess(client, list(ATTEMPTS.values())) == [401] * FREE
    for each in (client, sibling_client):
        for attempt in ATTEMPTS.values():
            throttled = attempt(each, "ann-secret")
            assert refusal(throttled) == (429, "too_many_attempts")
            assert throttled.headers["retry-after"] == "300"
            assert throttled.json()["error_description"] == "Too many failed logins. Try again in 300 seconds."
    clock.advance(300)
    assert ATTEMPTS["token"](client, "ann-secret").status_code == 200


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_each_failure_counts_once(client: httpx.Client, attempt: str) -> None:
    assert guess(client, [ATTEMPTS[attempt]] * (FREE + 1)) == [401] * FREE + [429]


@pytest.mark.parametrize("name", ["nobody", "no+body", "odd%20name", ""])
def test_unknown_names_are_counted_like_known_ones(client: httpx.Client, name: str) -> None:
    tries = [post(client, "introspect", (name, "a+%41"), token=UNKNOWN).status_code for _ in range(FREE + 1)]
    assert tries == [401] * FREE + [429]


def test_a_right_secret_clears_the_failure_counter(client: httpx.Client) -> None:
    for _ in range(3):
        assert guess(client, [ATTEMPTS["token"], ATTEMPTS["api"]] * 2) == [401] * (FREE - 1)
        assert fetch(client)
        post(client, "token", ANN, grant_type="client_credentials")
        client.post("/api/token", json={"username": "ann", "password": "ann-secret"})


@pytest.mark.parametrize("endpoint", ATTEMPTS)
def test_a_recent_success_does_not_bypass_the_throttle(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock, endpoint: str
) -> None:
    """Otherwise an attacker could recognize the right secret: it alone would not be throttled."""
    for each in (client, sibling_client):
        assert fetch(each)
    assert guess(client, [ATTEMPTS[endpoint]] * (FREE + 1)) == [401] * FREE + [429]
    clock.advance(1)  # the other worker sees the failures within a second
    for each in (client, sibling_client):
        for attempt in ATTEMPTS.values():
            assert refusal(attempt(each, "ann-secret")) == (429, "too_many_attempts")


def test_a_wrong_secret_after_a_success_counts(client: httpx.Client) -> None:
    assert fetch(client)
    assert guess(client, [ATTEMPTS["token"]] * (FREE + 1)) == [401] * FREE + [429]


def test_a_caller_with_a_token_is_not_throttled(client: httpx.Client) -> None:
    token = fetch(client, GATEWAY)
    guesses = [post(client, "introspect", ("gateway", "wrong"), token=UNKNOWN).status_code for _ in range(FREE + 1)]
    assert guesses[-1] == 429
    assert send(client, "introspect", f"Bearer {token}", token=token).json()["active"]


def test_a_request_without_a_secret_is_not_counted(client: httpx.Client) -> None:
    for _ in range(2 * FREE):
        assert send(client, "token", None, **FULL_FORMS["token"], client_id="ann").status_code == 401
        assert send(client, "token", "Basic !", **FULL_FORMS["token"]).status_code == 400
    assert guess(client, [ATTEMPTS["token"]] * (FREE + 1)) == [401] * FREE + [429]


def test_concurrent_guesses_do_not_pass_the_limit(tmp_path: Path, clock: HandClock) -> None:
    guesses = [basic(f"ann:wrong-{number}") for number in range(40)]
    with worker(write_config(tmp_path), clock) as server, ThreadPoolExecutor(20) as threads:
        form = {"token": "x", "grant_type": "x"}
        sent = [form_bytes(ENDPOINTS[number % 3], each, form) for number, each in enumerate(guesses)]
        answered = sorted(threads.map(lambda each: exchange(server.port, each)[0], sent))
    assert answered == [401] * FREE + [429] * (40 - FREE)


@pytest.fixture
def busy_server(tmp_path: Path) -> Iterator[Server]:
    """Run a worker that checks one password at a time, with room for one more to wait, and a user with a slow hash."""
    slow = argon2.using(type="ID", memory_cost=65536, time_cost=4, parallelism=1).hash("slow-secret")
    users = f'[passwords]\nthreads = 1\nqueue = 1\n[[users]]\nusername = "slow"\npassword = "{slow}"'
    with worker(write_config(tmp_path, users=users)) as running:
        yield running


def test_secrets_beyond_the_login_queue_are_503(busy_server: Server) -> None:
    sent = [form_bytes("introspect", basic(f"slow:wrong-{number}"), {"token": UNKNOWN}) for number in range(4)]
    address = ("127.0.0.1", busy_server.port)
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in sent]
        for connection, request in zip(connections, sent, strict=True):  # all arrive while the first one is hashed
            connection.sendall(request)
        answers = sorted(map(read_answer, connections), key=lambda answer: answer[0])
    first, second, *others = [status for status, _, _ in answers]
    assert (first, others) == (401, [503, 503])
    assert second in {401, 503}, "503: on a busy machine it has waited too long"
    for _, headers, body in answers[2:]:
        assert b'"error":"overloaded"' in body
        assert int(headers["retry-after"]) >= 1
