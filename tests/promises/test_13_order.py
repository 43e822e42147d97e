"""Promise 13: who waits is served in order, nobody passes, and no place and no token is lost."""

from pathlib import Path

from tests.support.queueing import POOLS, run_queue, sqlite_order
from tests.support.servers import write_config


def test_those_who_wait_are_served_in_order(tmp_path: Path) -> None:
    """A short version of `make faults`: one of four workers is killed, and one is paused."""
    config = write_config(tmp_path, POOLS)
    lines = run_queue([config] * 4, sqlite_order(tmp_path / "tokenauth.db"), seed=1, clients=4, jobs=8, faults=2)
    assert lines["one"].told or lines["three"].told, "someone had to wait for long"
