"""A file lock for the processes that write to one SQLite file: when one is done, it wakes the next at once.

SQLite's own lock still decides which process writes, but a process that waits for it polls, up to 100 ms at a time. A
process that does not use this lock is slower, and still correct.
"""

import fcntl
import os
import threading
from contextlib import suppress

from tokenauth.logs import log
from tokenauth.stores.sqlite.files import LOCK

LOCK_TIMEOUT = 1.0
"""Seconds to wait for the lock; then a batch is written without it. A suspended process may keep it forever."""


class LockWait:
    """One wait for the lock, in a thread. Another thread can give it up."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._decided = threading.Lock()  # acquired once: either the file lock was, or the wait was given up

    def acquire(self) -> bool:
        """Wait for the lock; False if the wait was given up meanwhile."""
        with suppress(OSError):  # no file locks there: SQLite's own lock is enough
            fcntl.flock(self._file, fcntl.LOCK_EX)
        if self._decided.acquire(blocking=False):
            return True
        self.release()
        return False

    def give_up(self) -> bool:
        """Stop waiting; False if the lock is already acquired."""
        return self._decided.acquire(blocking=False)

    def release(self) -> None:
        """Let the next process write."""
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)


class WriteLock:
    """The lock file of a database. A process that dies releases the lock."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._path = database + LOCK
        self._file: int | None = None
        self._blocked: LockWait | None = None

    @property
    def blocked(self) -> bool:
        """Whether a wait that was given up still blocks its thread."""
        return self._blocked is not None

    def open(self) -> None:
        """Open or create the file, with the owner and mode of the database; if that fails, write without the lock."""
        try:
            file = self._open()
        except OSError as error:
            log.warning("write_lock_unusable", reason=error.strerror, action="several workers write more slowly")
            return
        if self._file is None:
            self._file = file
        else:
            os.dup2(file, self._file, inheritable=False)
            os.close(file)

    def close(self) -> None:
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

    def new_wait(self) -> LockWait | None:
        """Return a wait for the lock; None if there is no lock file, or an earlier wait still blocks its thread."""
        if self._file is None or self._blocked is not None:
            return None
        return LockWait(self._file)

    def gave_up(self, wait: LockWait) -> None:
        """Write without the lock until the thread of this wait is free again."""
        self._blocked = wait

    def ended(self, wait: LockWait) -> None:
        """Report that the thread of a wait that was given up is free again."""
        if self._blocked is wait:
            self._blocked = None

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
