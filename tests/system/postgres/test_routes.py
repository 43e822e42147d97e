"""Routes of the console that follow what other nodes do, on two nodes with one PostgreSQL database."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.servers import Server, log_in, worker
from tests.support.streaming import EventStream
from tests.system.postgres.nodes import write_config_for

SETTINGS = """
[server]
trusted_proxies = ["127.0.0.1"]
[pools.permit]
capacity = 1
prefill = true
"""
HOME = "203.0.113.7"


@pytest.fixture
def two(url: str, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """Run a worker of each of two nodes."""
    configs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        configs.append(write_config_for(url, tmp_path / name, SETTINGS))
    with worker(configs[0]) as one, worker(configs[1]) as two:
        yield one, two


def test_events_tell_what_another_node_did(two: tuple[Server, Server]) -> None:
    with two[0].client() as here, two[1].client() as there:
        ann = log_in(here, "ann", "ann-secret")
        with EventStream(two[0].port, ann) as stream:
            assert stream.next().name == "hello"
            assert there.post("/api/pools/permit/leases", headers={"X-Token": ann}).status_code == 201
            assert stream.wait("pool").data == {"name": "permit"}
            log_in(there, "ann", "ann-secret")
            assert stream.wait("tokens").data == {}
            assert there.delete("/api/token", headers={"X-Token": ann}).status_code == 200
            assert stream.wait("bye").data == {"reason": "logged_out"}


def test_who_waits_after_failed_logins_is_let_go_on_all_nodes(two: tuple[Server, Server]) -> None:
    def attempt(client: httpx.Client, password: str) -> int:
        body = {"username": "ann", "password": password}
        return client.post("/api/token", json=body, headers={"X-Forwarded-For": HOME}).status_code

    with two[0].client() as here, two[1].client() as there:
        admin = {"X-Token": log_in(here)}
        while attempt(here, "wrong") != 429:
            pass
        [waits] = here.get("/api/throttle", headers=admin).json()["throttled"]
        assert (waits["kind"], waits["user"], waits["address"]) == ("user", "ann", HOME)
        address = {"user": "ann", "address": HOME}
        assert there.delete("/api/throttle", headers=admin, params=address).status_code == 204
        assert here.get("/api/throttle", headers=admin).json() == {"throttled": []}
        assert [attempt(client, "ann-secret") for client in (here, there)] == [200, 200]
