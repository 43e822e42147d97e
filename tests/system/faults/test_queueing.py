"""Promise 13, at length: workers on SQLite, and two nodes on PostgreSQL, are killed and paused while clients wait."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import fetch
from tests.support.postgres import Cluster
from tests.support.queueing import ORDER, POOLS, run_queue, sqlite_order
from tests.support.servers import write_config
from tests.system.postgres.nodes import write_config_for

RUNS = {"clients": 8, "jobs": 40, "faults": 8}


@pytest.mark.parametrize("seed", [1, 2])
def test_four_workers_serve_in_order_through_faults(tmp_path: Path, seed: int) -> None:
    config = write_config(tmp_path, POOLS)
    run_queue([config] * 4, sqlite_order(tmp_path / "tokenauth.db"), seed, **RUNS)


@pytest.mark.parametrize("seed", [1, 2])
def test_two_nodes_serve_in_order_through_faults(postgres: Cluster, tmp_path: Path, seed: int) -> None:
    """Each node has two workers."""
    url = postgres.create(f"queueing_{seed}")
    configs = []
    for node in ("one", "other"):
        directory = tmp_path / node
        directory.mkdir()
        configs += [write_config_for(url, directory, POOLS)] * 2

    def order(pool: str) -> Sequence[Any]:
        return [tuple(row) for row in fetch(url, ORDER.format(pool))]

    lines = run_queue(configs, order, seed, **RUNS)
    assert lines["one"].told
