"""The files of a SQLite database, and which of them other users could read or change."""

import os
import stat
from collections.abc import Iterator, Sequence

from tokenauth.errors import ConfigError

LOCK = "-lock"
"""Suffix of the file that writers lock: see `write_lock`."""

_SQLITE = "sqlite+aiosqlite:///"
_SUFFIXES = ("", "-wal", "-shm", "-journal", LOCK)


def check_database(url: str) -> None:
    """Raise ConfigError if its files show that this user cannot open or create the database at a URL.

    Not for a process that has it open: closing any file of it would drop the SQLite locks of the process.
    """
    path = _path(url)
    if path is None:
        return
    problem = find_problem(path)
    if problem is None and os.path.exists(path) and not _is_sqlite(path):
        problem = f"{path} is not an SQLite database; move it away, or change database.url"
    if problem is not None:
        raise ConfigError(f"database.url: {problem}")


def find_problem(path: str) -> str | None:
    """Return why this user cannot open or create a database at an absolute path, or None."""
    directory = os.path.dirname(path)
    if not os.path.exists(directory):
        return f"the directory {directory} does not exist; create it, or change database.url"
    if not os.path.isdir(directory):
        return f"{directory} is not a directory; change database.url"
    if os.path.isdir(path):
        return f"{path} is a directory; add a file name to database.url"
    return None if os.path.exists(path + "-wal") and os.path.exists(path + "-shm") else _forbidden(directory, path)


def _forbidden(directory: str, path: str) -> str | None:
    """Return what this user may not do with a database.

    Not asked while a server has it open: even where the disk has become read-only, users can then be reloaded.
    """
    if not _allowed(directory, os.W_OK | os.X_OK):
        return f"the directory {directory} is not writable for this user; {_OWNER}"
    if os.path.exists(path) and not _allowed(path, os.R_OK | os.W_OK):
        return f"{path} is not readable and writable for this user; {_OWNER}"
    return None


_OWNER = "run this as the user that owns the database, or change the owner with `chown`"


def _allowed(path: str, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _is_sqlite(path: str) -> bool:
    """Return whether a file is empty or begins as each SQLite database does."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) in {b"", _MAGIC}


_MAGIC = b"SQLite format 3\0"


def _path(url: str) -> str | None:
    """Return the absolute path of the file, or None if the database is not a file."""
    path = url.removeprefix(_SQLITE).partition("?")[0]
    return None if not url.startswith(_SQLITE) or path in {"", ":memory:"} else os.path.abspath(path)


def exposed(url: str) -> Sequence[str]:
    """Return a message for each database file that other users of this machine could read or change.

    Empty for a database that is not a file or does not exist yet: new files are readable by their owner only.
    """
    path = _path(url)
    return [] if path is None else list(_exposed(path))


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
