"""`tokenauth serve` with closed standard streams, and signals while it is still importing."""

import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.connections import takes_connections
from tests.support.journal import until
from tests.support.ports import free_port
from tests.support.servers import spawn, write_config

TOKENAUTH = Path(sysconfig.get_path("scripts")) / "tokenauth"


@pytest.mark.extended
@pytest.mark.parametrize(
    "closed", ["<&- >&- 2>&-", *(pytest.param(one, marks=pytest.mark.faults) for one in (">&-", "2>&-"))]
)
def test_a_closed_stream_is_like_dev_null(tmp_path: Path, closed: str) -> None:
    port = free_port()
    command = f"exec {TOKENAUTH} serve --config {write_config(tmp_path)} --port {port} {closed}"
    with spawn(["sh", "-c", command], tmp_path) as server:
        until(lambda: takes_connections(port), "the server accepts connections")
        if "2>" not in closed:
            server.wait("started")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        if "2>" not in closed:
            assert [event["event"] for event in server.events()][-2:] == ["stopping", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_it_silently(tmp_path: Path, number: signal.Signals) -> None:
    """The signal arrives while `tokenauth.cli.main` is imported."""
    here, there = socket.socketpair()
    program = (
        f"import sys; sys.argv = ['tokenauth', 'serve']; import tokenauth.cli, os; os.write({there.fileno()}, b'x');"
        " import tokenauth.cli.main; import time; time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, pass_fds=[there.fileno()], stderr=subprocess.PIPE, text=True
    )
    with here, there, process:
        assert here.recv(1) == b"x"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
