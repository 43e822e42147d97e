"""Promise 4: a database file that was deleted or replaced is 503 until a restart, also from later workers."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.promises.test_4_outage import is_outage
from tests.support.connections import Closed, Connection, NoAnswer, Refused
from tests.support.journal import serving, until
from tests.support.main_process import workers_of
from tests.support.scraping import SETTINGS, metered
from tests.support.servers import Server, write_config
from tests.system.test_cli import run

FILE = "tokenauth.db"


def move(directory: Path) -> None:
    (directory / FILE).rename(directory / "moved.db")


def delete(directory: Path) -> None:
    for file in directory.glob(f"{FILE}*"):
        file.unlink()


def replace(directory: Path) -> None:
    """Put a copy without the latest commits in the place of the file, as a wrong restore does."""
    shutil.copy(directory / FILE, directory / "copy.db")
    (directory / "copy.db").rename(directory / FILE)


def kill_workers(server: Server) -> None:
    """Kill the workers, and wait until as many serve again."""
    before = len(server.events("started"))
    pids = workers_of(server)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(server.events("started")) >= before + len(pids), "the workers were replaced")


def unavailable(server: Server, token: str) -> bool:
    """Whether a worker says that the store is down. It must never say that the token is not valid."""
    try:
        with Connection(server.port) as connection:
            answer = connection.ask("GET", f"/api/token?token={token}")
            assert answer.status == 503 or answer.json()["valid"]
            return is_outage(answer) and "restart tokenauth" in connection.ask("GET", "/readyz").json()["reason"]
    except (Refused, Closed, NoAnswer):  # of a worker that was just killed
        return False


@pytest.mark.parametrize("change", [move, delete, replace])
def test_a_replaced_worker_opens_no_other_file(tmp_path: Path, change: Callable[[Path], None]) -> None:
    with serving(write_config(tmp_path), "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        with Connection(server.port) as connection:
            token = connection.log_in()
        change(tmp_path)
        left = sorted(file.name for file in tmp_path.glob("*.db"))
        kill_workers(server)
        with Connection(server.port) as connection:
            assert is_outage(connection.ask("GET", f"/api/token?token={token}"))
            assert is_outage(connection.ask("POST", "/api/token", {"username": "admin", "password": "admin"}))
            assert is_outage(connection.ask("GET", "/auth", X_Token=token))
            assert connection.ask("DELETE", "/api/token", {"token": token}).status == 200
            assert "restart tokenauth" in connection.ask("GET", "/readyz").json()["reason"]
        assert sorted(file.name for file in tmp_path.glob("*.db")) == left
        assert len(server.events("worker_replaced")) == 2
        assert server.events("store_file_replaced")


def test_a_reload_without_the_file_is_refused(tmp_path: Path) -> None:
    with serving(write_config(tmp_path)) as server:
        with Connection(server.port) as connection:
            token = connection.log_in()
        move(tmp_path)
        server.process.send_signal(signal.SIGHUP)
        failure = server.wait("reload_refused")
        assert f"{tmp_path}/{FILE}" in failure["detail"]
        assert "restart tokenauth" in failure["detail"]
        assert not (tmp_path / FILE).exists()
        until(lambda: unavailable(server, token), "the worker has noticed it")
        assert len(server.events("started")) == 1


def test_a_restart_without_the_file_is_refused(tmp_path: Path) -> None:
    """A new database would replace the -wal file, which has the latest logins of the one that was moved."""
    config = write_config(tmp_path)
    with serving(config) as server:
        with Connection(server.port) as connection:
            token = connection.log_in()
        move(tmp_path)
        assert "put it back, then restart tokenauth" in server.wait("store_file_replaced")["action"]
        assert server.stop() == 0
    done = run(tmp_path, "serve", "--port", "0")
    assert done.returncode == 3
    assert "is missing, but its -wal file with the latest changes is there" in done.stderr
    assert not (tmp_path / FILE).exists()
    (tmp_path / "moved.db").rename(tmp_path / FILE)
    with serving(config) as server, Connection(server.port) as connection:
        assert connection.valid(token)


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_once_lost_a_database_needs_a_restart(tmp_path: Path, suffix: str) -> None:
    """Without its -wal file the database lacks the latest commits, although the file itself is the same."""
    with metered(write_config(tmp_path, SETTINGS)) as (server, scraper):
        with Connection(server.port) as connection:
            token = connection.log_in()
        (tmp_path / f"{FILE}{suffix}").unlink()
        server.wait("store_file_replaced")
        scraper.wait(0, "store_up")  # the main process knows of it
        server.process.send_signal(signal.SIGHUP)
        server.wait("reload_refused")
        kill_workers(server)
        assert unavailable(server, token)


def test_a_reload_may_name_another_database(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with serving(config) as server:
        config.write_text(config.read_text().replace(FILE, "other.db"))
        server.process.send_signal(signal.SIGHUP)
        server.wait("stopped")
        until(lambda: len(workers_of(server)) == 1, "the replaced worker has ended")
        assert (tmp_path / "other.db").exists()
        with Connection(server.port) as connection:
            token = connection.log_in()
        (tmp_path / FILE).unlink()
        kill_workers(server)
        with Connection(server.port) as connection:
            assert connection.valid(token)
