"""Promise 1, at length: kill -9 in a loop loses no answered change, and revives no token."""

import os
import signal
from pathlib import Path

from tests.support.journal import Journal, check_servers, kill_in_a_loop, run_clients, serving, until, workers
from tests.support.length import scaled
from tests.support.main_process import workers_of
from tests.support.servers import write_config

ROUNDS = scaled(500, 3)


def test_500_kills_under_load_lose_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    journals = kill_in_a_loop(config, ROUNDS, clients=8, seed=42)
    states = [state for journal in journals for state in journal.issued.values()]
    assert states.count("live") >= ROUNDS * 8
    assert states.count("ended") >= ROUNDS * 2


def test_a_killed_worker_is_replaced_and_loses_nothing(tmp_path: Path) -> None:
    """Ten times under `tokenauth serve`, while the other worker serves."""
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    journals: list[Journal] = []
    with serving(config, "--workers", "2") as server:
        for number in range(10):
            latest = [Journal() for _ in range(4)]
            clients = run_clients([server.port], latest, number)
            until(lambda: sum(len(one.issued) for one in latest) >= 40, "the clients have tokens")  # noqa: B023
            started = len(server.events("started"))
            os.kill(workers_of(server)[number % 2], signal.SIGKILL)
            until(lambda: len(server.events("started")) > started, "the worker was replaced")  # noqa: B023
            for client in clients:
                client.finish()
            journals += latest
            check_servers([server], latest)
        server.kill()
    with workers(config, None, 1) as servers:
        check_servers(servers, journals)
