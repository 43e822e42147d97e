"""A text file that several programs edit. It is locked, and replaced in one step or not at all."""

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenauth.errors import ConfigError
from tokenauth.file_locks import lock
from tokenauth.settings.loader import not_utf8

_BOM = b"\xef\xbb\xbf"

_LOCK_TIMEOUT = 10.0
"""Seconds to wait for another command that edits the same file. Each holds the lock for milliseconds."""

_NOT_BY_RENAME = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV})
"""Errors of a directory in which no file can be created or replaced, although the file itself may be writable: it
belongs to another user, it is mounted read-only, or the file is a mount of its own, as in containers."""


class TextFile:
    """A file in UTF-8. Edits keep line endings, byte order mark, links, owner and mode."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> str:
        """Return the text, without a byte order mark. Raises ConfigError."""
        with self._reporting():
            return _decode(_target(self.path).read_bytes())

    def edit(self, change: Callable[[str], str]) -> None:
        """Replace the current text by what `change` returns for it. It holds a lock on the file.

        Raises ConfigError if the file cannot be written, or if a program without the lock (an editor) has changed it in
        the meantime. Then nothing is changed, and no temporary file is left.
        """
        with self._reporting(), self._locked() as (descriptor, target):
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
        """Replace the file by a new one: readers see all of the old text or all of the new."""
        was = os.fstat(descriptor)
        if was.st_nlink > 1:
            raise OSError(errno.EXDEV, "the file has a second name, which would keep the old text")
        temporary = target.with_name(f".{target.name}.new")  # one name: killed commands leave at most one file
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
        """Write into the file itself, after reserving the space. Restore the old text if that fails."""
        file = os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._compare(descriptor, target, before)
            try:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file, 0, max(1, len(after)))  # fails here if the disk is full
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
        """Raise ConfigError unless the path still leads to the file that was read, with the same content."""
        if _target(self.path) != target or not _is(descriptor, target) or _read_all(descriptor) != before:
            raise ConfigError(f"{self.path}: another program has changed the file; nothing was saved, try again")

    @contextmanager
    def _locked(self) -> Iterator[tuple[int, Path]]:
        """Lock the file that the path leads to, even if it is replaced while this waits."""
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while True:
            target = _target(self.path)
            descriptor = _open(target)
            try:
                if not lock(descriptor, deadline):
                    raise ConfigError(f"{self.path}: another program holds a lock on the file; nothing was saved")
                if _is(descriptor, target):
                    yield descriptor, target
                    return
            finally:
                os.close(descriptor)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be edited: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path}: cannot be edited: {not_utf8(error)}") from None


def _target(path: Path) -> Path:
    """Follow links to a regular file. Raises OSError for anything else: reading a pipe might never end."""
    target = Path(os.path.realpath(path, strict=True))
    if not stat.S_ISREG(target.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return target


def _open(target: Path) -> int:
    """Open a file for reading and locking, if possible also for writing: NFS needs that for a lock."""
    try:
        return os.open(target, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOT_BY_RENAME:
            raise
        return os.open(target, os.O_RDONLY | os.O_CLOEXEC)


def _decode(data: bytes) -> str:
    return data.removeprefix(_BOM).decode()


def _is(descriptor: int, target: Path) -> bool:
    """Return whether an open file is the one at `target`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), target.stat())
    return False


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
    """Copy access control lists and labels, as far as file systems and permissions allow."""
    if sys.platform == "linux":
        with suppress(OSError):
            for name in os.listxattr(source):
                with suppress(OSError):
                    os.setxattr(target, name, os.getxattr(source, name))


def _sync_directory(directory: Path) -> None:
    """Make a replacement survive power loss, where the file system can. Failing is no error: the file is replaced."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
