"""The load: wrk, pinned to a core of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).with_name("load.lua")


class Result(NamedTuple):
    """What one run of wrk saw."""

    requests: int
    seconds: float
    p99_ms: float
    errors: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def require() -> None:
    """Exit, naming the packages, when what the benchmark needs is not installed."""
    missing = [package for program, package in (("wrk", "wrk"), ("taskset", "util-linux")) if not shutil.which(program)]
    if missing:
        sys.exit(f"make bench needs {' and '.join(missing)}: apt-get install {' '.join(missing)}")


def start(
    port: int, kind: str, seconds: float, connections: int, core: str, offset: int = 0
) -> "subprocess.Popen[str]":
    """Start wrk with one kind of request of load.lua."""
    command = ["taskset", "-c", core, "wrk", "-t1", f"-c{connections}", f"-d{round(seconds)}s", "-s", str(SCRIPT)]
    environment = {**os.environ, "KIND": kind, "OFFSET": str(offset)}
    return subprocess.Popen([*command, f"http://127.0.0.1:{port}"], env=environment, stdout=subprocess.PIPE, text=True)


def finish(running: "subprocess.Popen[str]") -> Result:
    """Wait for wrk and read what it saw."""
    output, _ = running.communicate()
    match = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+)", output)
    if match is None:
        raise RuntimeError(f"wrk said:\n{output}")
    requests, microseconds, p99, errors = map(int, match.groups())
    return Result(requests, microseconds / 1e6, p99 / 1000, errors)


def run(port: int, kind: str, seconds: float, connections: int = 64, core: str = "1", offset: int = 0) -> Result:
    """Run wrk to its end. Raises RuntimeError if anything but 2xx was answered."""
    result = finish(start(port, kind, seconds, connections, core, offset))
    if result.errors:
        raise RuntimeError(f"{kind}: {result.errors} of {result.requests} requests failed")
    return result
