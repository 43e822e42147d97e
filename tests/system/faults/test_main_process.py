"""The main process, in long runs: workers that cannot start, steps that fail, and ends of all kinds."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.promises.test_10_main_process import fails_at_first, survives_breakage
from tests.promises.test_10_shutdown import half_a_login
from tests.support.connections import Connection
from tests.support.journal import serving, until
from tests.support.main_process import BREAKAGES, breakable, kill_a_worker, session_of, traceback_lines, workers_of
from tests.support.servers import write_config


@pytest.mark.parametrize("kind", BREAKAGES)
def test_workers_are_replaced_when_they_can_be_again(tmp_path: Path, kind: str) -> None:
    survives_breakage(tmp_path, kind)


@pytest.mark.parametrize("kind", BREAKAGES)
def test_a_failed_first_start_ends_with_its_reason(tmp_path: Path, kind: str) -> None:
    fails_at_first(tmp_path, kind)


STEPS = ["wait", "handle_signals", "receive", "heartbeat", "reap", "start_workers", "note_alone"]
STEPS += ["finish_reload", "kill_overdue"]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_ends_nothing(tmp_path: Path, step: str) -> None:
    """The step fails three times after the first start, after a reload and after a signal to stop."""
    patch = (
        "import pathlib, tokenauth.server.supervisor as s; "
        f"step = s.Supervisor._{step}; left = dict.fromkeys('123', 3); "
        "fail = lambda self: [left.update({n: left[n] - 1}) or 1 / 0 for n in '123'"
        " if pathlib.Path(n).exists() and left[n] > 0] or step(self); "
        f"fail.__name__ = '_{step}'; s.Supervisor._{step} = fail"
    )
    with breakable(write_config(tmp_path), "--workers", "2", patch=patch) as broken:
        server = broken.server
        broken.ready(2)
        (broken.here / "1").touch()
        kill_a_worker(server)
        until(lambda: len(server.events("started")) == 3, "the worker was replaced")
        (broken.here / "2").touch()
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(server.events("reloaded")) == 1, "it is reloaded")
        (broken.here / "3").touch()
        assert server.stop() == 0
        failed = {event["step"] for event in server.events("main_process_failed")}
        also = {"handle_signals"} if step == "finish_reload" else set[str]()  # a signal to stop finishes a reload
        assert failed - also == {step}
        assert traceback_lines(server) == []


def test_a_directory_that_is_removed_ends_nothing(tmp_path: Path) -> None:
    with breakable(write_config(tmp_path), "--workers", "2") as broken:
        broken.ready(2)
        broken.here.rmdir()
        kill_a_worker(broken.server)
        until(lambda: len(broken.server.events("started")) == 3, "the worker was replaced")
        broken.server.process.send_signal(signal.SIGHUP)
        until(lambda: len(broken.server.events("reloaded")) == 1, "it is reloaded")
        assert broken.server.stop() == 0


def test_no_worker_outlives_the_main_process(tmp_path: Path) -> None:
    chance = random.Random(11)
    for number in range(20):
        directory = tmp_path / str(number)
        directory.mkdir()
        with breakable(write_config(directory), "--workers", "2") as broken:
            leader = broken.server.process.pid
            until(lambda: len(session_of(leader)) > 1, "a worker starts")  # noqa: B023
            time.sleep(chance.random() * 1.5)
            os.kill(leader, signal.SIGKILL)
            # One that starts notices it when it has started, which takes 10 seconds on a very busy machine.
            until(lambda: session_of(leader) == [], "the workers end", 30)  # noqa: B023


def test_sigterm_during_a_reload_ends_it_within_the_grace(tmp_path: Path) -> None:
    """Each of four workers has slow requests while one is killed."""
    with serving(write_config(tmp_path), "--workers", "4") as server:
        until(lambda: len(server.events("started")) == 4, "all serve")
        slow = [half_a_login(server) for _ in range(24)]
        for each in slow:
            each.__enter__()
        server.process.send_signal(signal.SIGHUP)
        kill_a_worker(server)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert server.process.wait(45) == 0
        assert time.monotonic() - began < 35


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    with serving(write_config(tmp_path)) as server:
        os.kill(workers_of(server)[0], signal.SIGSTOP)
        until(lambda: len(server.events("started")) == 2, "it was replaced", 240)
        assert "sent no report" in server.events("worker_replaced")[0]["reason"]
        with Connection(server.port) as connection:
            assert connection.ask("GET", "/healthz").status == 200
