"""The Unix socket on which the service can listen instead of a port."""

import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tokenauth.errors import ConfigError, StartError
from tokenauth.file_locks import lock

_BACKLOG = 2048

_LOCK_TIMEOUT = 2.0
"""Seconds to wait for another server that starts in the same directory. Each holds the lock for milliseconds."""

_PATIENCE = 0.0 if sys.platform == "linux" else 1.0
"""Seconds to look for a server where connections are refused: macOS also refuses them while its queue is full."""


class UnixListener(socket.socket):
    """A listening Unix socket, which can remove its own file."""

    def __init__(self, path: str, mode: int) -> None:
        """Listen, and replace a file that an earlier server has left behind. Raises StartError.

        No other program can connect before the file has its mode: until `listen`, all are refused.
        """
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = os.path.abspath(path)
        try:
            with _locked(os.path.dirname(self._path)):
                _make_way(path)
                before = os.umask(0o777 & ~mode)
                try:
                    self.bind(path)
                finally:
                    os.umask(before)
                os.chmod(path, mode)  # the directory may have a default access control list
                self._file = os.stat(path)
                self.listen(_BACKLOG)
        except OSError as error:
            self.close()
            _check(path)
            reason = os.strerror(error.errno or 0)
            raise StartError(f"server.socket: cannot listen on {path}: {reason}; use another path") from None
        except BaseException:
            self.close()
            raise

    def remove_file(self) -> None:
        """Remove the file, unless another program has replaced it. From then on nobody can connect."""
        with suppress(OSError), _locked(os.path.dirname(self._path)):
            if os.path.samestat(os.lstat(self._path), self._file):
                os.unlink(self._path)


def _make_way(path: str) -> None:
    """Remove the file of a server that has ended. Raises StartError."""
    if is_served(path):
        raise StartError(f"Socket {path} is in use: stop the other server or change server.socket.")
    with suppress(FileNotFoundError):
        os.unlink(path)


def check(path: str) -> None:
    """Raise ConfigError if no server of this user can listen there. Whether another one does is not asked."""
    try:
        _check(path)
    except StartError as error:
        raise ConfigError(str(error)) from None


def _check(path: str) -> None:
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        raise StartError(
            f"server.socket: there is no directory {directory}, or this user cannot look into it; create it, or change"
            " the path"
        )
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise StartError(f"server.socket: {path} exists and is not a socket; move it away, or change the path")
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise StartError(
            f"server.socket: the directory {directory} is not writable for this user; give it to the user of the"
            " service, or change the path"
        )


def is_served(path: str, patience: float = _PATIENCE) -> bool:
    """Return whether a server listens on a socket; look for `patience` seconds, as one may be busy.

    Raises StartError if the file is something else.
    """
    deadline = time.monotonic() + patience
    while not (served := _accepts(path)) and os.path.lexists(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    return served


def _accepts(path: str) -> bool:
    if not os.path.lexists(path):
        return False
    _check(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its queue is full
            return True
        except OSError as error:
            raise StartError(f"server.socket: {path} cannot be used: {error.strerror}; use another path") from None
    return True


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Lock a directory, so that of two servers only one replaces a file, and none removes that of the other.

    Go on without the lock if another program keeps it, or if there are no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            lock(descriptor, time.monotonic() + _LOCK_TIMEOUT)
        yield
    finally:
        os.close(descriptor)
