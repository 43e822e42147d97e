"""The load generator: wrk, pinned to a core of its own."""

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
"""Number of connections that keep the server busy."""

_MARGIN = 30
"""Seconds that wrk may take longer than its duration. It waits up to 10 s for the last responses."""

_MORE_THAN_CACHED = 110_000

_RESULT = re.compile(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)")


class Result(NamedTuple):
    """The result of one run of wrk."""

    requests: int
    seconds: float
    p99_ms: float
    overloaded: int
    """Number of 503 responses, where they are expected."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def run(port: int, kind: str, seconds: int, connections: int = CONNECTIONS, offset: int = 0) -> Result:
    """Send one kind of request of load.lua for some seconds. Raises RuntimeError for any unexpected response."""
    running = _start(port, kind, seconds, connections, offset)
    try:
        return _finish(kind, running, seconds)
    finally:
        running.kill()
        running.wait()


@contextmanager
def in_background(port: int, kind: str, seconds: int, connections: int) -> Iterator[list[Result]]:
    """Send one kind of request in the background. The list contains the result at the end."""
    results: list[Result] = []
    running = _start(port, kind, seconds, connections)
    try:
        yield results
        results.append(_finish(kind, running, seconds))
    finally:
        running.kill()
        running.wait()


def fill_cache(port: int, seconds: int) -> int:
    """Validate more tokens than a cache holds by default; return how many."""
    probed = 0
    while probed < _MORE_THAN_CACHED:
        probed += run(port, "sweep", seconds, offset=probed).requests
    return probed


def _start(port: int, kind: str, seconds: int, connections: int, offset: int = 0) -> "subprocess.Popen[str]":
    pinned = ["taskset", "-c", str(LOAD_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout=10s"]
    environment = {**os.environ, "KIND": kind, "OFFSET": str(offset)}
    command = [*pinned, "-s", str(SCRIPT), f"http://127.0.0.1:{port}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(kind: str, running: "subprocess.Popen[str]", seconds: int) -> Result:
    output, _ = running.communicate(timeout=seconds + _MARGIN)
    match = _RESULT.search(output)
    if match is None:
        raise RuntimeError(f"{kind}: wrk printed: {output.strip()}")
    requests, microseconds, p99, errors, overloaded = map(int, match.groups())
    if not requests:
        raise RuntimeError(f"{kind}: no request was answered")
    if errors:
        raise RuntimeError(f"{kind}: {errors} of {requests} requests failed or got an unexpected response")
    return Result(requests, microseconds / 1e6, p99 / 1000, overloaded)
