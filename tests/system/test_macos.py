"""tokenauth serves, edits its configuration and stops without the features that only Linux has.

These tests simulate macOS on Linux: `sys.platform` is "darwin", and what Python lacks on macOS is removed.
"""

import os
import resource
import subprocess
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate
from tests.support.connections import Connection
from tests.support.servers import ROOT, TOKENAUTH, log_in, probe, spawn, write_config
from tests.wire.test_tls import ask, connect, trusting
from tokenauth.settings import loader

pytestmark = pytest.mark.extended

SECRET = "dora-and-emil"
HARD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

LIKE_MACOS = '''
import asyncio, os, resource, select, selectors, signal, socket, subprocess, sys, sysconfig, time, uvloop

MISSING = {
    os: "sched_getaffinity sched_setaffinity posix_fallocate posix_fadvise listxattr getxattr setxattr removexattr"
        " pipe2 eventfd memfd_create pidfd_open getrandom copy_file_range splice getresuid setresuid",
    select: "epoll",
    selectors: "EpollSelector",
    signal: "SIGPOLL SIGPWR SIGSTKFLT SIGRTMIN SIGRTMAX sigwaitinfo sigtimedwait",
    socket: "TCP_USER_TIMEOUT TCP_QUICKACK SO_BINDTODEVICE SO_PEERCRED AF_NETLINK AF_PACKET",
    time: "CLOCK_BOOTTIME",
}
for module, names in MISSING.items():
    for name in names.split():
        if hasattr(module, name):  # some are newer than Python 3.11
            delattr(module, name)
selectors.DefaultSelector = selectors.PollSelector
sysconfig.get_config_vars()  # reads a file that is named after the platform
sys.platform = "darwin"

def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])
sys.addaudithook(refuse)

setrlimit = resource.setrlimit
def limited(kind, limits):
    """Refuse more descriptors than the kernel allows, whatever the hard limit is, as macOS does."""
    if kind == resource.RLIMIT_NOFILE and limits[0] > 10_240:
        raise ValueError("current limit exceeds maximum limit")
    setrlimit(kind, limits)
resource.setrlimit = limited
limited(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))  # the soft limit there
'''


@pytest.fixture
def macos(tmp_path: Path) -> dict[str, str]:
    """Return the environment of processes that simulate macOS."""
    (tmp_path / "sitecustomize.py").write_text(LIKE_MACOS)
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_a_server_runs_without_linux_features(tmp_path: Path, macos: dict[str, str]) -> None:
    command = [TOKENAUTH, "serve", "--config", str(write_config(tmp_path)), "--port", "0"]
    with spawn(command, tmp_path, macos) as server:
        server.wait("started")
        server.port = server.wait("listening")["port"]
        with server.client() as client:
            assert probe(client, log_in(client))
            assert client.get("/readyz").status_code == 200
        (worker,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        tasks = Path(f"/proc/{worker}/task").iterdir()
        priorities = {int((task / "stat").read_text().rpartition(")")[2].split()[16]) for task in tasks}
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert priorities == {own}, "must not change a priority: on macOS a thread's id could be that of a process"
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[0] == min(10_240, HARD_LIMIT)
        assert server.stop() == 0


def test_https_and_a_unix_socket_need_no_linux_features(tmp_path: Path, macos: dict[str, str]) -> None:
    made, path = make_certificate(tmp_path), tmp_path / "t.sock"
    command = [TOKENAUTH, "serve", "--config", str(tmp_path / "config.toml")]
    write_config(tmp_path, f"[server]\nport = 0\n{made.settings()}")
    with spawn(command, tmp_path, macos) as server:
        server.wait("started")
        server.port = server.wait("listening")["port"]
        with connect(server, trusting(made.certificate)) as connection:
            assert ask(connection) == 200
    write_config(tmp_path, f'[server]\nsocket = "{path}"\naccept_risks = ["weak_hash"]')
    with spawn(command, tmp_path, macos) as server:
        server.wait("started")
        with Connection(path) as local:
            assert local.valid(local.log_in())
        assert server.events("control_unavailable") == []
        assert server.stop() == 0
    assert not path.exists()


def test_a_user_is_added_without_linux_features(tmp_path: Path, macos: dict[str, str]) -> None:
    """Once by replacing the file, and once by writing into it, since it has a second hard link."""
    config = write_config(tmp_path)
    for name in ("dora", "emil"):
        command = [TOKENAUTH, "user", "add", name, "--password-stdin", "--config", str(config)]
        environment = {**os.environ, **macos}
        ran = subprocess.run(
            command, env=environment, input=f"{SECRET}\n{SECRET}\n", capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        if name == "dora":
            (tmp_path / "second-name").hardlink_to(config)
    assert {"dora", "emil"} <= {user.username for user in loader.load(config).users}
