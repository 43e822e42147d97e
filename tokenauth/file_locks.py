"""Locks on files and directories (flock), which other processes respect that lock them, too."""

import fcntl
import time

_RETRY = 0.005
"""Seconds between two attempts."""


def lock(fd: int, deadline: float, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file or directory until it is closed. Return False if others keep it until `deadline`.

    deadline: a time of `time.monotonic`. Raises OSError where no files can be locked.
    """
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_RETRY)
        else:
            return True
