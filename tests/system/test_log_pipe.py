"""A server whose log goes to a full pipe."""

import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.connections import LOGIN, Connection
from tests.support.ports import free_port
from tests.support.servers import TOKENAUTH, write_config

pytestmark = pytest.mark.extended


def test_a_server_with_a_full_log_pipe_keeps_serving(tmp_path: Path) -> None:
    """Main process and worker. Before the fix 400 logins filled the pipe, and the server stopped answering."""
    port = free_port()
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    command = [TOKENAUTH, "serve", "--config", str(config), "--port", str(port)]
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen(command, stderr=writing) as server, os.fdopen(reading) as log:
        os.close(writing)
        try:
            while json.loads(log.readline())["event"] != "started":
                pass
            with Connection(port) as connection:
                tokens = [connection.ask("POST", "/api/token", LOGIN).json()["token"] for _ in range(100)]
                assert connection.ask("GET", "/healthz").status == 200
                assert connection.valid(tokens[-1])
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        finally:
            server.kill()
