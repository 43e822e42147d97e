"""Which files a configuration came from, and whether they have changed since."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

Stamp = tuple[int, ...] | None
"""What changes with a file; None if it cannot be looked at."""


def stamp(path: str) -> Stamp:
    """Look at the file that a path leads to, through all links."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    # `cp -p` sets the time of the content back, but not that of the inode
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def open_regular(path: str) -> BinaryIO:
    """Open a file to read. Raises OSError for what is no regular file: opening a pipe might never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


class FilesRead:
    """The files that were read, each as it was right before."""

    def __init__(self) -> None:
        self._read: dict[str, Stamp] = {}
        self._last: dict[str, Stamp] = {}

    def note(self, path: str | Path) -> None:
        """Remember a file that is going to be read."""
        name = os.path.abspath(path)
        self._read[name] = self._last[name] = stamp(name)

    def changed(self) -> bool:
        """Return whether one differs from what was read, and has not changed since the last call.

        So an editor or a copy that writes a file in several steps is seen once, when it is done.
        """
        now = {name: stamp(name) for name in self._read}
        settled, self._last = now == self._last, now
        return settled and now != self._read
