"""Promise 3, at length: every worker refuses a revoked token on its next request, even after it was suspended."""

import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.journal import background, until, workers
from tests.support.servers import HandClock, worker, write_config

TIMES = 2_000


def test_2000_revocations_reach_four_workers_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random worker revokes, and the three others refuse on their next request. Two of them are kept busy."""
    chance = random.Random(3)
    waits = []
    with workers(write_config(tmp_path, "[tokens]\nper_user = 0"), None, 4) as servers, ExitStack() as stack:
        here = [stack.enter_context(Connection(server.port)) for server in servers]
        busy = [stack.enter_context(Connection(server.port)) for server in servers[:2]]
        bystander = busy[0].log_in("ann", "ann-secret")
        with background(lambda: [connection.valid(bystander) for connection in busy]):
            for number in range(TIMES):
                chance.shuffle(here)
                token = here[0].log_in()
                assert all(connection.valid(token) for connection in here), f"round {number}"
                here[0].log_out(token)
                began = time.perf_counter()
                for connection in here[1:]:
                    assert not connection.valid(token), f"accepted in round {number} after it was revoked"
                    waits.append(time.perf_counter() - began)
                    began = time.perf_counter()
    with capsys.disabled():
        print(f"\n{TIMES} revocations, each refused on the first request; times of the requests (milliseconds):")
        print(histogram(waits))


def histogram(seconds: list[float]) -> str:
    """Count in buckets of 0.25 ms, 0.5 ms, 1 ms and so on."""
    counts: dict[float, int] = {}
    for taken in seconds:
        bound = 0.25
        while taken * 1000 > bound:
            bound *= 2
        counts[bound] = counts.get(bound, 0) + 1
    return "\n".join(f"  <= {bound:8.2f}  {count:6d}" for bound, count in sorted(counts.items()))


def test_a_resumed_worker_refuses_what_was_revoked(tmp_path: Path) -> None:
    """A hundred times: SIGSTOP, revocations by the other worker, SIGCONT. The revoked tokens were in its cache."""
    chance = random.Random(4)
    with workers(write_config(tmp_path, "[tokens]\nper_user = 0"), None, 2) as servers, ExitStack() as stack:
        here, sleeper = (stack.enter_context(Connection(server.port)) for server in servers)
        for _ in range(100):
            tokens = [here.log_in() for _ in range(10)]
            assert all(map(sleeper.valid, tokens))
            os.kill(servers[1].process.pid, signal.SIGSTOP)
            ended = chance.sample(tokens, 5)
            for token in ended:
                here.log_out(token)
            os.kill(servers[1].process.pid, signal.SIGCONT)
            assert [sleeper.valid(token) for token in tokens] == [token not in ended for token in tokens]


def test_a_worker_resumed_after_a_log_purge_is_correct(tmp_path: Path) -> None:
    """Revocations are removed from the log after an hour, so the worker must read the tokens from the store again."""
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    clock = HandClock(tmp_path / "clock", create=True)
    with workers(config, clock, 2) as servers, ExitStack() as stack:
        here, sleeper = (stack.enter_context(Connection(server.port)) for server in servers)
        tokens = [here.log_in() for _ in range(20)]
        assert all(map(sleeper.valid, tokens))
        os.kill(servers[1].process.pid, signal.SIGSTOP)
        for token in tokens[:10]:
            here.log_out(token)
        clock.advance(2 * 3600)
        with worker(config, clock) as third:  # sweeps when it starts
            until(lambda: bool(third.events("swept")), "the log is swept")
        os.kill(servers[1].process.pid, signal.SIGCONT)
        assert [sleeper.valid(token) for token in tokens] == [False] * 10 + [True] * 10
