"""Promise 10, for the main process: only a signal ends it, and it always handles signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.promises.test_10_shutdown import half_a_login, refuses
from tests.support.connections import Connection
from tests.support.journal import serving, until
from tests.support.main_process import BREAKAGES, breakable, kill_a_worker, session_of, traceback_lines
from tests.support.servers import TOKENAUTH, USERS, Server, spawn, write_config
from tokenauth.risks import SHIPPED_HASH


@pytest.mark.extended
def test_workers_are_replaced_when_they_can_be_again(tmp_path: Path) -> None:
    survives_breakage(tmp_path, "no descriptors")


def survives_breakage(directory: Path, kind: str) -> None:
    """Keep workers from starting for a while. The others serve, signals work, and the main process recovers."""
    breakage = BREAKAGES[kind]
    with breakable(write_config(directory), "--workers", "2") as broken:
        server = broken.server
        broken.ready(2)
        breakage.begin(broken)
        kill_a_worker(server)
        until(lambda: len(failures(server)) >= 3, "the start was retried")
        _, *failed = failures(server)
        assert all(breakage.message in event["reason"] for event in failed), failed
        assert [event["retry_in"] for event in failed[:2]] == [1.0, 1.5]
        with Connection(server.port) as connection:
            assert connection.ask("GET", "/healthz").status == 200
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(failures(server)) >= 4, "SIGHUP is handled")
        breakage.end(broken)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(server.events("reloaded")) == 1, "the workers were replaced")
        assert server.stop() == 0
        assert traceback_lines(server) == []


def failures(server: Server) -> list[dict[str, Any]]:
    """Return the log events of workers that ended or could not start, in order."""
    names = {"worker_replaced", "worker_not_started", "reload_refused"}
    return [event for event in server.events() if event["event"] in names]


def test_a_failed_first_start_ends_with_its_reason(tmp_path: Path) -> None:
    fails_at_first(tmp_path, "no worker")


def fails_at_first(directory: Path, kind: str) -> None:
    """Make the first start fail: one line gives the reason, no port stays open, and the exit code is 3."""
    breakage = BREAKAGES[kind]
    with breakable(write_config(directory), "--workers", "2", patch=WAITS) as broken:
        until((broken.here / "waits").exists, "the main process listens")
        breakage.begin(broken)
        (broken.here / "go").touch()
        assert broken.server.process.wait(30) == 3
        (failure,) = broken.server.events("start_failed")
        assert breakage.message in failure["detail"]
        assert traceback_lines(broken.server) == []
        assert session_of(broken.server.process.pid) == []


WAITS = (
    "import time, pathlib, tokenauth.server.serve as server; listen = server.listen; "
    "go = lambda: pathlib.Path('waits').touch() or pathlib.Path('go').exists(); "
    "server.listen = lambda s: (listen(s), [time.sleep(0.01) for _ in iter(go, True)])[0]"
)
"""Makes the main process wait after it has begun to listen, until the test has broken something."""


def test_a_terminal_s_signals_reach_the_main_process_only(tmp_path: Path) -> None:
    """The first Ctrl-C waits for the old worker's request, also after a reload. One more a second later does not."""
    with serving(write_config(tmp_path)) as server, half_a_login(server):
        os.killpg(server.process.pid, signal.SIGHUP)
        until(lambda: len(server.events("reloaded")) == 1, "the new worker serves")
        for _ in range(2):
            os.killpg(server.process.pid, signal.SIGINT)  # two signals within one second count as one
        until(lambda: refuses(server), "the port is closed")
        first = time.monotonic()
        assert server.process.poll() is None, "must wait for the old worker's request"
        until(lambda: time.monotonic() > first + 1, "the next signal counts as a second one")
        assert server.process.poll() is None, "must still wait"
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(20) == 1
        assert session_of(server.process.pid) == []
        assert server.events("worker_replaced") == []
        assert len(server.events("started")) == 2


def test_the_only_pid_in_the_log_is_the_one_to_signal(tmp_path: Path) -> None:
    """`kill -HUP` with the PID of a worker would do nothing."""
    with serving(write_config(tmp_path)) as server:
        os.kill(server.wait("listening")["pid"], signal.SIGHUP)
        until(lambda: len(server.events("reloaded")) == 1, "the server reloads")
        server.stop()
        named = [event["event"] for event in server.events() if "pid" in event or "process [" in event["event"]]
        assert named == ["listening"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it_at_once(tmp_path: Path, number: int) -> None:
    with breakable(write_config(tmp_path), "--workers", "2") as broken:
        broken.server.wait("listening")
        os.killpg(broken.server.process.pid, number)  # as a terminal does
        assert broken.server.process.wait(60) == 0
        assert broken.server.events("worker_replaced") == []
        assert traceback_lines(broken.server) == []
        assert session_of(broken.server.process.pid) == []


def test_a_reload_that_cannot_end_hinders_no_stop(tmp_path: Path) -> None:
    patch = (
        "import tokenauth.server.supervisor as s; step = s.Supervisor._finish_reload; "
        "s.Supervisor._finish_reload = lambda self: 1 / 0 if self._stopping else step(self)"
    )
    with breakable(write_config(tmp_path), patch=patch) as broken:
        broken.ready(1)
        assert broken.server.stop() == 0
        assert broken.server.events("main_process_failed")
        assert broken.server.events("stopped")


def test_a_reload_at_the_very_start_is_ignored() -> None:
    """SIGHUP is ignored before the slow imports begin."""
    script = (
        "import signal, sys\n"
        "sys.argv = ['tokenauth', 'serve']\n"
        "import tokenauth.cli\n"
        "assert not {'click', 'structlog', 'asyncio'} & sys.modules.keys()\n"
        "signal.raise_signal(signal.SIGHUP)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.extended
def test_no_worker_outlives_the_main_process(tmp_path: Path) -> None:
    with breakable(write_config(tmp_path), "--workers", "2") as broken:
        leader = broken.server.process.pid
        until(lambda: len(session_of(leader)) > 1, "a worker starts")
        os.kill(leader, signal.SIGKILL)
        until(lambda: session_of(leader) == [], "the workers end")


def test_a_configuration_from_a_pipe_is_read_once(tmp_path: Path) -> None:
    text = write_config(tmp_path).read_text()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=[text], daemon=True)
    writer.start()
    with serving(pipe) as server:
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.events("reload_refused") != [], "the failed reload is logged")
        assert "cannot be reloaded" in server.events("reload_refused")[0]["detail"]
        with Connection(server.port) as connection:
            assert connection.valid(connection.log_in("bob", "bob-secret"))


def test_all_risks_are_named_before_anything_listens(tmp_path: Path) -> None:
    users = f'{USERS}\n[[users]]\nusername = "shipped"\npassword = "{SHIPPED_HASH}"'
    tables = '[server]\nhost = "0.0.0.0"\ntrusted_proxies = ["0.0.0.0/0"]\n[pools.p]\n[dialects.token-pool]\npool = "p"'
    config = write_config(tmp_path, tables, users=users)
    command = [TOKENAUTH, "serve", "--config", str(config), "--port", "0"]
    with spawn(command, tmp_path) as server:
        assert server.process.wait(30) == 3
        (refusal,) = server.events("configuration_refused")
        assert server.events("listening") == []
    for risk in ("shipped_password", "broad_trusted_proxies", "open_dialect"):
        assert repr(risk) in refusal["detail"]
