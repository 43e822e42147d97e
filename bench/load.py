"""The load: wrk, pinned to a core of its own."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.machine import LOAD_CORE

SCRIPT = Path(__file__).with_name("load.lua")

CONNECTIONS = 64
"""Connections of a load that takes all that the server can give."""

_RESULT = re.compile(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)")


class Result(NamedTuple):
    """What one run of wrk saw."""

    requests: int
    seconds: float
    p99_ms: float
    overloaded: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def run(port: int, kind: str, seconds: int, connections: int = CONNECTIONS, offset: int = 0) -> Result:
    """Send one kind of request of load.lua for so long. Raises RuntimeError if it was not answered as it should be."""
    return _finish(kind, _start(port, kind, seconds, connections, offset))


@contextmanager
def beside(port: int, kind: str, seconds: int, connections: int) -> Iterator[list[Result]]:
    """Send one kind of request while something else goes on; the list has the result at the end."""
    results: list[Result] = []
    running = _start(port, kind, seconds, connections)
    try:
        yield results
        results.append(_finish(kind, running))
    finally:
        running.kill()
        running.wait()


def _start(port: int, kind: str, seconds: int, connections: int, offset: int = 0) -> "subprocess.Popen[str]":
    pinned = ["taskset", "-c", str(LOAD_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout=10s"]
    environment = {**os.environ, "KIND": kind, "OFFSET": str(offset)}
    command = [*pinned, "-s", str(SCRIPT), f"http://127.0.0.1:{port}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(kind: str, running: "subprocess.Popen[str]") -> Result:
    output, _ = running.communicate()
    match = _RESULT.search(output)
    if match is None:
        raise RuntimeError(f"{kind}: wrk said: {output.strip()}")
    requests, microseconds, p99, errors, overloaded = map(int, match.groups())
    if errors or not requests:
        raise RuntimeError(f"{kind}: of {requests} requests {errors} failed or were answered as none should be")
    return Result(requests, microseconds / 1e6, p99 / 1000, overloaded)
