"""GET /api/status: the sums of all workers of a node, with and without a main process."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.main_process import workers_of
from tests.support.servers import Server, log_in, serve, worker, write_config

POOLS = """
[server]
trusted_proxies = ["0.0.0.0/0"]
accept_risks = ["broad_trusted_proxies"]
[pools.phones]
capacity = 3
prefill = true
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run two workers."""
    with serve(write_config(tmp_path_factory.mktemp("status"), POOLS), "--workers", "2") as running:
        yield running


@pytest.fixture
def admin(client: httpx.Client) -> dict[str, str]:
    return {"X-Token": log_in(client)}


def status(client: httpx.Client, admin: dict[str, str]) -> Any:
    answer = client.get("/api/status", headers=admin)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


def test_all_workers_are_summed(server: Server, client: httpx.Client, admin: dict[str, str]) -> None:
    expected = status(client, admin)["totals"]["logins"]["ok"] + 8
    for _ in range(8):  # connections go to both workers
        with server.client() as other:
            log_in(other, "ann", "ann-secret")
            other.post("/api/token", json={"username": "ann", "password": "wrong"})

    def are_reported() -> bool:
        logins = status(client, admin)["totals"]["logins"]
        return bool(logins["ok"] >= expected and logins["invalid_credentials"] >= 5)

    until(are_reported, "the reports")
    pids = set(workers_of(server))
    until(lambda: {each["pid"] for each in status(client, admin)["workers"]} == pids, "both workers have reported")
    found = status(client, admin)
    assert (found["workers_configured"], found["worker_crashes"]) == (2, 0)
    assert sum(each or 0 for each in found["history"]["logins"]) == found["totals"]["logins"]["ok"]
    assert found["history"]["logins"][0] is None
    assert [len(found["history"][name]) for name in ("logins", "failures", "validations", "leases", "waiting")] == [
        60
    ] * 5
    assert found["store"]["kind"] == "sqlite"
    assert found["audit"] is None
    assert "broad_trusted_proxies" in [risk["name"] for risk in found["risks"]]


def test_a_configuration_that_others_can_change_is_a_risk(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.chmod(0o646)
    with serve(config) as running, running.client() as client:
        found = status(client, {"X-Token": log_in(client)})
        assert {risk["name"] for risk in found["risks"]} >= {"readable_config", "writable_config"}


def test_an_audit_log_that_cannot_be_written_is_shown(tmp_path: Path) -> None:
    directory = tmp_path / "later"
    config = write_config(tmp_path, f'[audit]\nfile = "{directory}/audit.jsonl"\n')
    with serve(config) as running, running.client() as client:
        admin = {"X-Token": log_in(client)}
        until(lambda: status(client, admin)["audit"] == {"up": False, "lost": 0}, "the failure")
        directory.mkdir()
        until(lambda: status(client, admin)["audit"] == {"up": True, "lost": 0}, "the next attempt")


def test_pools_and_live_tokens_are_read_in_the_background(client: httpx.Client, admin: dict[str, str]) -> None:
    until(lambda: status(client, admin)["pools"][0]["leased"] is not None, "the first look")
    found = status(client, admin)
    assert found["pools"][0] == {
        **{"name": "phones", "capacity": 3, "leased": 0, "waiting": 0},
        **{"granted": 0, "denied": 0, "lapsed": 0, "forced": 0},
    }
    assert found["store"]["up"] is True
    assert found["store"]["live_tokens"] >= 0


def test_a_killed_worker_is_counted_and_replaced(server: Server, client: httpx.Client, admin: dict[str, str]) -> None:
    victim = workers_of(server)[0]
    os.kill(victim, signal.SIGKILL)
    with server.client() as other:
        until(lambda: status(other, admin)["worker_crashes"] == 1, "the crash")
        until(lambda: len(status(other, admin)["workers"]) == 2, "the next worker")
        assert victim not in {each["pid"] for each in status(other, admin)["workers"]}


def test_only_admins_see_the_status(client: httpx.Client) -> None:
    answer = client.get("/api/status", headers={"X-Token": log_in(client, "ann", "ann-secret")})
    assert (answer.status_code, answer.json()["error"]) == (403, "insufficient_scope")


def test_a_process_without_a_main_one_describes_itself(tmp_path: Path) -> None:
    with worker(write_config(tmp_path, POOLS)) as alone, alone.client() as client:
        found = status(client, {"X-Token": log_in(client)})
    assert (len(found["workers"]), found["store"]["live_tokens"], found["pools"][0]["leased"]) == (1, 1, 0)
    assert found["history"]["logins"] == [None] * 60
