"""Promise 7, measured: a wrong name takes as long as a wrong password."""

import time
from pathlib import Path
from statistics import median

from tests.promises.test_7_alike import attempt, shipped, with_default_cost
from tests.support.connections import Connection
from tests.support.servers import worker

ATTEMPTS = 24  # in ROUNDS, fewer than a name may fail anywhere
ROUNDS = 4


def test_wrong_name_and_wrong_password_answer_in_equal_time(tmp_path: Path) -> None:
    """Interleaved, at the default cost. If the medians differ only by noise, more attempts bring them closer."""
    times: dict[str, list[float]] = {shipped()[0]: [], "unknown": []}
    with worker(with_default_cost(tmp_path)) as server, Connection(server.port) as connection:
        for number in range(ROUNDS):
            for network in range(ATTEMPTS):
                for name, taken in times.items():
                    began = time.perf_counter()
                    assert attempt(connection, name, number * ATTEMPTS + network).status == 401
                    taken.append(time.perf_counter() - began)
            known, unknown = (median(taken) for taken in times.values())
            if 0.7 < known / unknown < 1.4:
                return
    raise AssertionError(f"a wrong password takes {known * 1000:.1f} ms, a wrong name {unknown * 1000:.1f} ms")
