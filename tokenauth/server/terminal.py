"""The controlling terminal. When it is closed, the system sends SIGHUP, which otherwise asks for a reload."""

import errno
import math
import os
import time
from collections.abc import Callable

_NEAR = 2.0
"""Seconds within which SIGHUP and the end of the terminal belong together. Either can come first."""


def terminal_exists() -> bool:
    """Return whether this process has a controlling terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in {errno.ENXIO, errno.EIO, errno.ENOENT}  # others, such as EMFILE, do not tell
    return True


class Terminal:
    """Tells the SIGHUP of a closed terminal from one that asks for a reload."""

    def __init__(
        self, watch: bool, exists: Callable[[], bool] = terminal_exists, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Unless `watch`, as under nohup, every SIGHUP asks for a reload. The same without a terminal."""
        self._exists = exists
        self._clock = clock
        self._open = watch and exists()
        self._closed_at = -math.inf
        self._hung_up_at = -math.inf

    def hung_up(self) -> bool:
        """Take a SIGHUP; return whether it came from the closed terminal."""
        self._hung_up_at = self._clock()
        return self._look()

    def check(self) -> bool:
        """Call it once a second; return whether the terminal was closed, and SIGHUP came shortly before."""
        return self._open and self._look()

    def _look(self) -> bool:
        if self._open and not self._exists():
            self._open = False
            self._closed_at = self._clock()
        return abs(self._hung_up_at - self._closed_at) < _NEAR
