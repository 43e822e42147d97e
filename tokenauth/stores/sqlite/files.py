"""The files of a SQLite database, and which of them other users could read or change."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tokenauth.models import PUT_DATABASE_BACK

LOCK = "-lock"
"""Suffix of the file that writers lock: see `write_lock`."""

_SUFFIXES = ("", "-wal", "-shm", "-journal", LOCK)

_REMEDY = "run this as the user that owns the database, or change the owner with `chown`"

_MAGIC = b"SQLite format 3\0"

_ELSEWHERE = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP}


def find_problem(path: str) -> str | None:
    """Return why this user cannot open or create a database at an absolute path, or None."""
    path = os.path.realpath(path)
    try:
        return _find_problem(path)
    except OSError as error:  # a disk that fails, or a file that was just moved
        return f"{path} cannot be looked at: {error.strerror}"


def _find_problem(path: str) -> str | None:
    directory = os.path.dirname(path)
    problem = _directory_problem(directory)
    if problem is not None:
        return problem
    if os.path.isdir(path):
        return f"{path} is a directory; add a file name to database.url"
    names = [path + suffix for suffix in _SUFFIXES]
    for name in names:
        problem = _file_problem(name)
        if problem is not None:
            return problem
    unusable = [name for name in names if not _is_usable(name)]
    if unusable:
        return _not_usable(unusable)
    return None if os.path.exists(path + "-wal") and os.path.exists(path + "-shm") else _forbidden(directory, path)


def _directory_problem(directory: str) -> str | None:
    try:
        mode = os.stat(directory).st_mode
    except PermissionError as error:
        return f"the directory {directory} cannot be looked at: {error.strerror}; {_REMEDY}"
    except OSError:
        return f"the directory {directory} does not exist; create it, or change database.url"
    return None if stat.S_ISDIR(mode) else f"{directory} is not a directory; change database.url"


def _file_problem(name: str) -> str | None:
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{name} cannot be opened: {error.strerror}; change database.url"
    return None if stat.S_ISREG(mode) else f"{name} is not a regular file; move it away, or change database.url"


def _is_usable(name: str) -> bool:
    """Return whether a file does not keep the database from being used: it may not exist, or be on a read-only disk."""
    return not os.path.exists(name) or _allowed(name, os.R_OK | os.W_OK) or bool(os.statvfs(name).f_flag & os.ST_RDONLY)


def _not_usable(names: Sequence[str]) -> str:
    """Say that this user may not read and write files. SQLite gives the others the mode of the database file."""
    owned = all(os.stat(name).st_uid == os.geteuid() for name in names)
    remedy = f"run `chmod u+rw {' '.join(names)}`" if owned else _REMEDY
    verb = "is" if len(names) == 1 else "are"
    return f"{' and '.join(names)} {verb} not readable and writable for this user; {remedy}"


def _forbidden(directory: str, path: str) -> str | None:
    """Return what this user may not do with a database.

    Not asked while a server has it open: even where the disk has become read-only, users can then be reloaded.
    """
    if not _allowed(directory, os.W_OK | os.X_OK):
        return f"the directory {directory} is not writable for this user; {_REMEDY}"
    if os.path.exists(path) and not _allowed(path, os.R_OK | os.W_OK):
        return _not_usable([path])
    return None


def _allowed(path: str, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def is_database(path: str) -> bool:
    """Return whether a file is empty or begins as each SQLite database does.

    Not for a process that has it open: closing any file of it would drop the SQLite locks of the process.
    """
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) in {b"", _MAGIC}


def find_exposed(path: str) -> Iterator[str]:
    """Yield a message for each file of the database at an absolute path that other users could read or change.

    None if it does not exist yet: new files are readable by their owner only.
    """
    for name in (path + suffix for suffix in _SUFFIXES):
        mode = _mode(name)
        if mode is not None and (mode & (stat.S_IRWXO | stat.S_IWGRP)):
            yield f"{name} has mode {stat.S_IMODE(mode):04o}: other users can read or change it; run `chmod 600 {name}`"
    directory = os.path.dirname(path)
    mode = _mode(directory)
    if mode is not None and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield f"{directory} has mode {stat.S_IMODE(mode):04o}: other users can replace the database in it"


def explain_loss(path: str) -> tuple[str, str]:
    """Return what has happened to the files of a server, at least one of which was moved or replaced; and what to do.

    An empty file counts as none: a start fills either.
    """
    with suppress(OSError):
        if file_size(path) == 0:
            return "the database file is missing", PUT_DATABASE_BACK
    return (
        "the database file, its -wal or its -shm was moved, deleted or replaced",
        "put back the files that tokenauth has used, then restart tokenauth: a restart uses those that are there now",
    )


def abandoned_wal(path: str) -> str | None:
    """Return why no new database may be created at a path where there is none, or None.

    SQLite would delete the -wal file, and with it the latest commits of a database that was only moved.
    """
    if file_size(path) > 0 or file_size(f"{path}-wal") == 0:
        return None
    return (
        f"the database file {path} is missing, but its -wal file with the latest changes is there; put the database"
        f" file back, or move {path}-wal away to begin with an empty database"
    )


def file_size(path: str) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def leads_elsewhere(error: OSError) -> bool:
    """Return whether an error says that a path leads to no file of this process any more.

    Others, such as EIO of a failing disk, say nothing about that.
    """
    return error.errno in _ELSEWHERE


def identity(path: str) -> str | None:
    """Return the device and the inode of a file, or None if the path leads to none. Raises OSError if it is unknown."""
    try:
        status = os.stat(path)
    except OSError as error:
        if leads_elsewhere(error):
            return None
        raise
    return f"{status.st_dev}:{status.st_ino}"


def existing(path: str) -> str:
    """Return the URI with which SQLite opens a file at an absolute path, but never creates it."""
    return f"{Path(path).as_uri()}?mode=rw"


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except OSError:
        return None
