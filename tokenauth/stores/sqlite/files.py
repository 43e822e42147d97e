"""The files of a SQLite database, and which of them other users could read or change."""

import os
import stat
from collections.abc import Iterator, Sequence

LOCK = "-lock"
"""Suffix of the file that writers lock: see `write_lock`."""

_SQLITE = "sqlite+aiosqlite:///"
_SUFFIXES = ("", "-wal", "-shm", "-journal", LOCK)


def exposed(url: str) -> Sequence[str]:
    """Return a message for each database file that other users of this machine could read or change.

    Empty for a database that is not a file or does not exist yet: new files are readable by their owner only.
    """
    path = url.removeprefix(_SQLITE).partition("?")[0]
    if not url.startswith(_SQLITE) or path in {"", ":memory:"}:
        return []
    return list(_exposed(os.path.abspath(path)))


def _exposed(path: str) -> Iterator[str]:
    for name in (path + suffix for suffix in _SUFFIXES):
        mode = _mode(name)
        if mode is not None and (mode & (stat.S_IRWXO | stat.S_IWGRP)):
            yield f"{name} has mode {stat.S_IMODE(mode):04o}: other users can read or change it; run `chmod 600 {name}`"
    directory = os.path.dirname(path)
    mode = _mode(directory)
    if mode is not None and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield f"{directory} has mode {stat.S_IMODE(mode):04o}: other users can replace the database in it"


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except OSError:
        return None
