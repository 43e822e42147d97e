"""The files that a configuration names: reading them, and whether they have changed since."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from tokenauth.errors import ConfigError

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


def read_file(key: str, path: str, max_size: int) -> bytes:
    """Return the content of the file that a setting names. Raises ConfigError, which has the absolute path."""
    name = os.path.abspath(path)
    try:
        with open_regular(path) as file:
            content = file.read(max_size + 1)
    except (OSError, ValueError) as error:
        forbidden = isinstance(error, PermissionError)
        fix = f"let the user of the service read it, or change {key}" if forbidden else f"put it there, or change {key}"
        raise ConfigError(f"{key}: {name} cannot be read: {getattr(error, 'strerror', None) or error}; {fix}") from None
    if len(content) > max_size:
        raise ConfigError(
            f"{key}: {name} has more than {max_size >> 20} MiB; put the right file there, or change {key}"
        )
    return content


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
