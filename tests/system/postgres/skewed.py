"""A worker on a machine whose clock is wrong: `CONFIG SECONDS`."""

import sys
import time

from tests.support import worker

_wall, _wall_ns = time.time, time.time_ns


def main() -> None:
    """Serve until SIGTERM; whatever asks this process's clock is told a wrong time."""
    config, seconds = sys.argv[1:]
    skew = int(seconds)
    time.time = lambda: _wall() + skew
    time.time_ns = lambda: _wall_ns() + skew * 10**9
    sys.argv = ["worker", config, "-"]
    worker.main()
