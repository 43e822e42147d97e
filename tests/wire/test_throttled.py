"""GET and DELETE /api/throttle: who is throttled, shown without what strangers typed, and cleared on every worker."""

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.main_process import workers_of
from tests.support.servers import HandClock, Server, log_in, serve, write_config

FREE, NETWORK_FREE = 5, 20
TYPED = "hunter2-is-my-password"

_regions = count(1)


@pytest.fixture(scope="module")
def settings() -> str:
    return f'[server]\ntrusted_proxies = ["127.0.0.1"]\n[throttle]\nnetwork_free = {NETWORK_FREE}'


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all failures, so that tests are independent."""
    clock.advance(25 * 3600)


@pytest.fixture
def admin(client: httpx.Client) -> dict[str, str]:
    return {"X-Token": log_in(client)}


@pytest.fixture
def region() -> str:
    """Return the beginning of addresses in a new region."""
    return f"10.{next(_regions)}"


def attempt(client: httpx.Client, address: str, username: str = "ann", password: str = "wrong") -> int:
    body = {"username": username, "password": password}
    return client.post("/api/token", json=body, headers={"X-Forwarded-For": address}).status_code


def fill(client: httpx.Client, address: str, username: str = "ann") -> None:
    """Fail until attempts are refused."""
    assert [attempt(client, address, username) for _ in range(FREE + 1)] == [401] * FREE + [429]


def listed(client: httpx.Client, admin: dict[str, str]) -> list[dict[str, Any]]:
    answer = client.get("/api/throttle", headers=admin)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    return list(answer.json()["throttled"])


def clear(client: httpx.Client, admin: dict[str, str], **query: str) -> int:
    return client.delete("/api/throttle", headers=admin, params=query).status_code


def test_who_is_throttled_is_listed_until_then(
    client: httpx.Client, admin: dict[str, str], clock: HandClock, region: str
) -> None:
    home = f"{region}.1.7"
    assert listed(client, admin) == []
    fill(client, home)
    [found] = listed(client, admin)
    until = int(clock()) + 1
    assert found == {"kind": "user", "user": "ann", "address": home, "failures": FREE, "until": until}
    clock.advance(1)
    assert listed(client, admin) == []
    assert attempt(client, home, password="ann-secret") == 200


def test_clearing_applies_on_every_worker(
    client: httpx.Client, sibling_client: httpx.Client, admin: dict[str, str], region: str
) -> None:
    home = f"{region}.1.7"
    fill(client, home)
    assert attempt(sibling_client, home, password="ann-secret") == 429
    assert clear(sibling_client, admin, user="Ann", address=home) == 204
    assert listed(client, admin) == listed(sibling_client, admin) == []
    for worker in (sibling_client, client):
        assert attempt(worker, home, password="ann-secret") == 200
    assert clear(client, admin, user="ann", address=home) == 404


def test_clearing_is_logged_with_who_did_it(
    client: httpx.Client, admin: dict[str, str], server: Server, region: str
) -> None:
    fill(client, f"{region}.1.7")
    assert clear(client, admin, user="ann", address=f"{region}.1.7") == 204
    event = server.events("throttle_cleared")[-1]
    assert (event["user"], event["addresses"], event["by"]) == ("ann", f"{region}.1.0/24", "admin")


def test_after_clearing_attempts_are_counted_again(client: httpx.Client, admin: dict[str, str], region: str) -> None:
    home = f"{region}.1.7"
    fill(client, home)
    assert clear(client, admin, user="ann", address=home) == 204
    fill(client, home)
    assert [each["failures"] for each in listed(client, admin)] == [FREE]


def test_a_user_throttled_everywhere_is_cleared(client: httpx.Client, admin: dict[str, str], region: str) -> None:
    """Failures from many networks throttle a name in its region."""
    for network in range(2, 4):
        for _ in range(FREE):
            assert attempt(client, f"{region}.{network}.1") == 401
    home = f"{region}.9.7"
    assert attempt(client, home, password="ann-secret") == 429
    [found] = listed(client, admin)
    assert (found["kind"], found["user"], found["address"], found["failures"]) == ("user", "ann", home, 2 * FREE)
    assert clear(client, admin, user="ann", address=home) == 204
    assert attempt(client, home, password="ann-secret") == 200


def test_a_network_is_throttled_and_cleared(client: httpx.Client, admin: dict[str, str], region: str) -> None:
    for number in range(NETWORK_FREE):
        assert attempt(client, f"{region}.1.{number}", f"name{number}") == 401
    assert attempt(client, f"{region}.1.200", password="ann-secret") == 429
    [found] = listed(client, admin)
    shown = {"kind": "network", "user": None, "address": f"{region}.1.0/24", "failures": NETWORK_FREE}
    assert shown.items() <= found.items()
    assert clear(client, admin, network=f"{region}.2.0/24") == 404
    assert clear(client, admin, network=found["address"]) == 204
    assert attempt(client, f"{region}.1.200", password="ann-secret") == 200
    assert listed(client, admin) == []


def test_clearing_a_user_leaves_the_failures_of_others(
    client: httpx.Client, admin: dict[str, str], region: str
) -> None:
    fill(client, f"{region}.1.7")
    fill(client, f"{region}.1.7", "bob")
    assert clear(client, admin, user="ann", address=f"{region}.1.7") == 204
    assert attempt(client, f"{region}.1.7", "bob", "bob-secret") == 429
    assert [each["user"] for each in listed(client, admin)] == ["bob"]


def test_names_that_no_user_has_are_never_shown(
    client: httpx.Client, admin: dict[str, str], server: Server, region: str
) -> None:
    fill(client, f"{region}.1.7", TYPED)
    answer = client.get("/api/throttle", headers=admin)
    [found] = answer.json()["throttled"]
    assert (found["kind"], found["user"], found["address"]) == ("unknown", None, f"{region}.1.0/24")
    assert TYPED not in answer.text
    refused = client.delete("/api/throttle", headers=admin, params={"user": TYPED, "address": f"{region}.1.7"})
    assert (refused.status_code, refused.json()["error"]) == (404, "not_found")
    assert TYPED not in refused.text
    assert TYPED not in server.log.read_text()


def test_ipv6_users_and_networks_are_cleared(client: httpx.Client, admin: dict[str, str]) -> None:
    fill(client, "2001:db8:5:1::7")
    assert [each["address"] for each in listed(client, admin)] == ["2001:db8:5:1::7"]
    assert clear(client, admin, user="ann", address="2001:db8:5:1::8") == 204, "one /64 is one location"
    assert clear(client, admin, network="2001:db8:5:1::/64") == 204
    assert clear(client, admin, network="2001:db8:5:1::/64") == 404
    assert clear(client, admin, network="2001:db8:5::/48") == 204, "a region is counted by itself"


def test_only_admins_list_and_clear(client: httpx.Client, region: str) -> None:
    token = {"X-Token": log_in(client, "ann", "ann-secret")}
    for method in ("GET", "DELETE"):
        answer = client.request(method, "/api/throttle", headers=token, params=None)
        assert (answer.status_code, answer.json()["error"]) == (403, "insufficient_scope")
        assert client.request(method, "/api/throttle").status_code == 401
    assert client.post("/api/throttle", headers=token).headers["allow"] == "GET, HEAD, DELETE"


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"user": "ann"},
        {"address": "10.0.0.1"},
        {"user": "ann", "address": "10.0.0.1", "network": "10.0.0.0/24"},
        {"user": "ann", "address": "home"},
        {"user": "ann", "address": "10.0.0.0/24"},
        {"network": "10.0.0.1"},
        {"network": "10.0.0.0/8"},
        {"network": "10.0.0.1/24"},
        {"network": "::/0"},
        {"network": ""},
        {"name": "ann"},
    ],
)
def test_a_request_to_clear_says_whom(client: httpx.Client, admin: dict[str, str], query: dict[str, str]) -> None:
    answer = client.delete("/api/throttle", headers=admin, params=query)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


def test_all_workers_of_a_machine_are_listed(tmp_path: Path) -> None:
    """Also those that were replaced at a reload."""
    config = write_config(tmp_path, '[server]\ntrusted_proxies = ["127.0.0.1"]\n[throttle]\ndelay = "10m"')
    with serve(config, "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        first, second = workers_of(server)
        for worker, address in ((first, "10.0.0.7"), (second, "10.1.0.7")):
            with suspended(worker, tmp_path / "tokenauth.db"), server.client() as client:
                fill(client, address)
        with server.client() as client:
            admin = {"X-Token": log_in(client)}

            def both() -> bool:
                return {each["address"] for each in listed(client, admin)} == {"10.0.0.7", "10.1.0.7"}

            until(both, "both workers have reported")
        server.process.send_signal(signal.SIGHUP)
        server.wait("reloaded")
        until(lambda: not {first, second} & set(workers_of(server)), "both workers are replaced")
        with server.client() as client:
            until(both, "both are listed after a reload")
            assert clear(client, admin, user="ann", address="10.0.0.7") == 204
            assert [each["address"] for each in listed(client, admin)] == ["10.1.0.7"]


@contextmanager
def suspended(process: int, database: Path) -> Iterator[None]:
    """Suspend a worker while it does not write: otherwise it would keep the lock, and nobody could."""
    with closing(sqlite3.connect(database, timeout=30)) as db:
        db.execute("BEGIN IMMEDIATE")
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.fixture(scope="module", autouse=True)
def _no_error(server: Server) -> Iterator[None]:
    yield
    assert server.errors() == []
