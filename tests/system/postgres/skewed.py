"""A worker on a machine with a wrong clock. Arguments: CONFIG SECONDS."""

import sys
import time

from tests.support import worker

_wall, _wall_ns = time.time, time.time_ns


def main() -> None:
    """Serve until SIGTERM, with `time.time` shifted."""
    config, seconds = sys.argv[1:]
    skew = int(seconds)
    time.time = lambda: _wall() + skew
    time.time_ns = lambda: _wall_ns() + skew * 10**9
    sys.argv = ["worker", config, "-"]
    worker.main()
