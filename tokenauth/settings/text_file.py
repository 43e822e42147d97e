"""A text file that several programs edit: locked, read again, compared, and replaced in one step or not at all."""

import errno
import fcntl
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenauth.errors import ConfigError

_BOM = b"\xef\xbb\xbf"

_PATIENCE = 10.0
"""Seconds to wait for another command that is editing the same file; each holds the lock for milliseconds."""

_NOT_BY_RENAME = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV})
"""What a directory says in which no file can be made or replaced, though the file itself may be writable: it belongs to
somebody else, it is mounted read-only, or the file is a mount of its own, as containers have it."""


class TextFile:
    """One file in UTF-8. Line endings, a byte order mark, links, the owner and the mode stay as they are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> str:
        """Return the text, with the line endings that it has and without a byte order mark. Raises ConfigError."""
        with self._said():
            return _decode(_target(self.path).read_bytes())

    def edit(self, change: Callable[[str], str]) -> None:
        """Replace the text by what `change` makes of the text that is there now, while no other command edits it.

        Raises ConfigError, and then nothing has changed and nothing is left beside the file: when it cannot be
        written, or when a program that takes no lock (an editor) has changed it in the meantime.
        """
        with self._said(), self._locked() as (descriptor, target):
            before = _read_all(descriptor)
            text = change(_decode(before))
            after = (_BOM if before.startswith(_BOM) else b"") + text.encode()
            try:
                self._replace(descriptor, target, before, after)
            except OSError as error:
                if error.errno not in _NOT_BY_RENAME:
                    raise
                self._overwrite(descriptor, target, before, after)

    def _replace(self, descriptor: int, target: Path, before: bytes, after: bytes) -> None:
        """Put a new file in the place of the old one: whoever reads sees all of the old text or all of the new."""
        was = os.fstat(descriptor)
        if was.st_nlink > 1:
            raise OSError(errno.EXDEV, "the file has a second name, which would keep the old text")
        temporary = target.with_name(f".{target.name}.new")  # always the same: a killed command leaves no more than one
        temporary.unlink(missing_ok=True)
        new = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                _write_all(new, after)
                if (was.st_uid, was.st_gid) != (os.geteuid(), os.fstat(new).st_gid):
                    os.fchown(new, was.st_uid, was.st_gid)  # EPERM: then the file is written in place
                _copy_attributes(descriptor, new)
                os.fchmod(new, stat.S_IMODE(was.st_mode))
                os.fsync(new)
            finally:
                os.close(new)
            self._compare(descriptor, target, before)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(target.parent)

    def _overwrite(self, descriptor: int, target: Path, before: bytes, after: bytes) -> None:
        """Write into the file itself, with the room for it made sure of first; put the old text back if that fails."""
        file = os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._compare(descriptor, target, before)
            try:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file, 0, max(1, len(after)))  # a full disk says so here
                _write_all(file, after)
                os.ftruncate(file, len(after))
                os.fsync(file)
            except BaseException:
                os.lseek(file, 0, os.SEEK_SET)
                _write_all(file, before)
                os.ftruncate(file, len(before))
                raise
        finally:
            os.close(file)

    def _compare(self, descriptor: int, target: Path, before: bytes) -> None:
        """Raise ConfigError unless the path still leads to the file that was read, and that has the same bytes."""
        if _target(self.path) != target or not _is(descriptor, target) or _read_all(descriptor) != before:
            raise ConfigError(f"{self.path}: another program has just changed the file; nothing was saved: try again")

    @contextmanager
    def _locked(self) -> Iterator[tuple[int, Path]]:
        """Lock the file that the path leads to, also when it is replaced while this waits."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            target = _target(self.path)
            descriptor = _open(target)
            try:
                while not _lock(descriptor):
                    if time.monotonic() > deadline:
                        raise ConfigError(f"{self.path}: another program holds a lock on the file; nothing was saved")
                    time.sleep(0.01)
                if _is(descriptor, target):
                    yield descriptor, target
                    return
            finally:
                os.close(descriptor)

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be edited: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path}: cannot be edited: {error}") from None


def _target(path: Path) -> Path:
    """Follow links to a regular file. Raises OSError when there is none: a pipe would be read for ever."""
    target = Path(os.path.realpath(path, strict=True))
    if not stat.S_ISREG(target.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return target


def _open(target: Path) -> int:
    """Open a file for reading and locking; NFS locks only what is open for writing, too."""
    try:
        return os.open(target, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOT_BY_RENAME:
            raise
        return os.open(target, os.O_RDONLY | os.O_CLOEXEC)


def _decode(data: bytes) -> str:
    return data.removeprefix(_BOM).decode()


def _is(descriptor: int, target: Path) -> bool:
    """Whether an open file is the one that a path names."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), target.stat())
    return False


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_all(descriptor: int) -> bytes:
    data, size = b"", 1
    while size:
        part = os.pread(descriptor, 1 << 20, len(data))
        data, size = data + part, len(part)
    return data


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy_attributes(source: int, target: int) -> None:
    """Copy access control lists and labels, as far as the file systems and the rights allow."""
    if sys.platform == "linux":
        with suppress(OSError):
            for name in os.listxattr(source):
                with suppress(OSError):
                    os.setxattr(target, name, os.getxattr(source, name))


def _sync_directory(directory: Path) -> None:
    """Make a replacement survive a loss of power; one that cannot be made to has happened all the same."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
