"""Turns of the processes that write to one SQLite file: a file lock wakes the next writer at once.

SQLite's own lock still decides which process writes, but a process that waits for it polls, up to 100 ms at a time. A
process that takes no turns is slower, and still correct.
"""

import fcntl
import os
import threading
from contextlib import suppress

from tokenauth.logs import log
from tokenauth.stores.sqlite.files import TURNS

TURN_PATIENCE = 1.0
"""Seconds to wait for a turn; then it writes without one. A stopped process may keep its turn forever."""


class Turn:
    """One wait for a turn, in a thread. Another thread can give it up."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._decided = threading.Lock()  # acquired once: either the turn has come, or the wait was given up

    def begin(self) -> bool:
        """Wait for the turn; False if the wait was given up meanwhile."""
        with suppress(OSError):  # no file locks there: SQLite's own lock is enough
            fcntl.flock(self._file, fcntl.LOCK_EX)
        if self._decided.acquire(blocking=False):
            return True
        self.end()
        return False

    def give_up(self) -> bool:
        """Stop waiting; False if the turn has already come."""
        return self._decided.acquire(blocking=False)

    def end(self) -> None:
        """Let the next process write."""
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)


class Turns:
    """The lock file beside a database by which its writers take turns. A process that dies loses its turn."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._path = database + TURNS
        self._file: int | None = None
        self._waiting: Turn | None = None

    @property
    def blocked(self) -> bool:
        """Whether a wait that was given up still blocks its thread."""
        return self._waiting is not None

    def open(self) -> None:
        """Open or create the file, with the owner and mode of the database; if that fails, write without turns."""
        try:
            file = self._open()
        except OSError as error:
            log.warning("writer_lock_unusable", reason=error.strerror, action="several workers write more slowly")
            return
        if self._file is None:
            self._file = file
        else:
            os.dup2(file, self._file, inheritable=False)
            os.close(file)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def replaced(self) -> bool:
        """Return whether the file was deleted or replaced, so that other processes lock another one."""
        if self._file is None:
            return False
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def next(self) -> Turn | None:
        """Return the wait for the next batch; None if there are no turns, or an earlier wait is still blocked."""
        if self._file is None or self._waiting is not None:
            return None
        return Turn(self._file)

    def gave_up(self, turn: Turn) -> None:
        """Take no turns until this wait, which blocks a thread, has ended."""
        self._waiting = turn

    def ended(self, turn: Turn) -> None:
        """Report that the thread of a wait that was given up is free again."""
        if self._waiting is turn:
            self._waiting = None

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        owner = os.stat(self._database)
        try:
            file = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(self._path, flags)
        os.fchmod(file, owner.st_mode & 0o666)  # as SQLite does for -wal and -shm
        if os.geteuid() == 0:
            os.fchown(file, owner.st_uid, owner.st_gid)
        return file
