"""The unit that `tokenauth systemd-unit` prints, and what the service tells systemd: sd_notify(3)."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.journal import until
from tests.support.servers import Server, serve, write_config
from tests.support.skipping import skip_without
from tests.system.test_cli import output, script
from tokenauth.server.service_manager import ServiceManager

WATCHDOG = {"WATCHDOG_USEC": "30000000"}


def unit(directory: Path) -> str:
    return output(script(directory, "systemd-unit"))


def test_the_unit_runs_this_installation(tmp_path: Path) -> None:
    lines = unit(tmp_path).splitlines()
    assert f"ExecStart={sys.prefix}/bin/tokenauth serve" in lines
    assert "/opt/" not in "".join(lines).replace(sys.prefix, "")


def test_the_unit_keeps_secrets_off_the_disk(tmp_path: Path) -> None:
    wanted = {"LimitCORE=0", "UMask=0077", "StateDirectoryMode=0700", "NoNewPrivileges=yes", "Type=notify"}
    assert wanted <= set(unit(tmp_path).splitlines())


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        skip_without("systemd-analyze", "apt-get install systemd")
    path = tmp_path / "tokenauth.service"
    path.write_text(re.sub(r"^(User|Group)=.*$", r"\1=root", unit(tmp_path), flags=re.MULTILINE))  # they must exist
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "tokenauth" in line] == []
    assert done.returncode == 0


class Manager:
    """Receives what a service tells systemd."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0"))
        self.socket.setblocking(False)
        self.heard: list[str] = []

    def listen(self) -> Sequence[str]:
        """Return all messages until now, without those that only say that it is alive."""
        try:
            while True:
                self.heard.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return [message.partition("\n")[0] for message in self.heard if message != "WATCHDOG=1"]

    def expect(self, *messages: str) -> None:
        until(lambda: len(self.listen()) >= len(messages), f"it says {messages}")
        assert self.listen() == [*messages]


@contextmanager
def managed(directory: Path, address: str, config: Path | None = None) -> Iterator[tuple[Server, Manager]]:
    manager = Manager(address)
    with closing(manager.socket):
        environment = {"NOTIFY_SOCKET": address, **WATCHDOG}
        with serve(config or write_config(directory), "--workers", "2", env=environment) as server:
            yield server, manager


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_the_manager_hears_of_every_state(tmp_path: Path, abstract: bool) -> None:
    address = f"@{tmp_path}/notify" if abstract else f"{tmp_path}/notify"
    config = write_config(tmp_path)
    with managed(tmp_path, address, config) as (server, manager):
        manager.expect("READY=1")
        until(lambda: manager.listen() is not None and "WATCHDOG=1" in manager.heard, "it says that it is alive")
        server.process.send_signal(signal.SIGHUP)
        server.wait("reloaded")
        manager.expect("READY=1", "RELOADING=1", "READY=1")
        reloading = next(message for message in manager.heard if message.startswith("RELOADING"))
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
        config.write_text("broken")
        server.process.send_signal(signal.SIGHUP)
        server.wait("reload_refused")
        manager.expect("READY=1", *["RELOADING=1", "READY=1"] * 2)
        assert server.stop() == 0
        assert manager.listen()[-1] == "STOPPING=1"


def test_a_manager_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    with managed(tmp_path, f"{tmp_path}/notify") as (server, manager):
        manager.socket.close()
        (tmp_path / "notify").unlink()
        server.process.send_signal(signal.SIGHUP)
        server.wait("reloaded")
        assert server.errors() == []


def test_child_processes_do_not_know_the_manager() -> None:
    environment = {"NOTIFY_SOCKET": "/run/systemd/notify", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "1", "HOME": "/"}
    ServiceManager(environment)
    assert environment == {"HOME": "/"}


def test_the_watchdog_of_another_process_is_not_fed(tmp_path: Path) -> None:
    manager = Manager(f"{tmp_path}/notify")
    with closing(manager.socket):
        service = ServiceManager({"NOTIFY_SOCKET": f"{tmp_path}/notify", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "1"})
        service.alive()
        service.ready()
        assert manager.listen() == ["READY=1"]
        assert manager.heard == ["READY=1"]
