"""Tamper-evident log: a hash chain of JSON lines.

A line is a record with three fields more: `n`, the number of the line; `previous`, the hash of the line before it; and
at its end `hash`, the SHA-256 of the line up to there, or with a key its HMAC (RFC 2104). Numbers and hashes go on in
the next file when the file is rotated.

Any number of processes append to it. Beside it is the *head* file, which each of them locks: it has the number and the
hash of the last line, and where that ends. So the chain goes on when the file was renamed, and lines that are cut off
at the end show as well, as long as the head is left alone.
"""

import errno
import fcntl
import glob
import gzip
import hmac
import os
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from io import BufferedReader, FileIO
from itertools import islice
from math import inf
from pathlib import Path
from typing import NamedTuple

import msgspec

from tokenauth.file_locks import lock

CUT = "line_cut"
"""The action of a record that follows a line without an end, which a crash has left."""

MODE = 0o640
"""Of new files: other accounts do not read them."""

FIRST = "0" * 64
"""What the first line of all has as the hash of the line before it."""

LOCK_TIMEOUT = 3.0
"""Seconds to wait for another process to unlock the head. It needs some milliseconds, unless it is stopped."""

LONGEST = 1 << 20
"""Bytes of a line that are kept in memory. A record has at most 16 KiB, so a longer line is none."""

_SEARCHED, _SEARCHED_LINES = 8 << 20, 10_000
"""Bytes and lines at the start of a file that are searched for a number. A crash leaves fewer before the first one."""

_HEAD_SIZE = 160
"""Bytes of the head file. It never grows, so it can be written when the disk is full."""

_SHOWN = 20
"""Breaks of which a check says where they are. With the wrong key, each line is one."""

CHANGED = "this line was changed or cut, or tokenauth did not write it"
"""The problem of a line whose own hash is wrong. With another key, each line is one."""

_END_REMOVED = "the line break at the end of this line was removed"

_END_MISSING = "this line has no line break at its end: a crash has lost it, or someone has removed it"

EMPTY = "this file is empty: if it had lines, they were removed"
"""The problem of a file without lines."""

_NO_FILE = "it is no file; remove it, or give it a name that does not begin with that of the log"

_NO_LOG = (
    "no line of an audit log is at its start, so it was not checked: if this is another file, give it a name that does"
    " not begin with that of the log"
)

_APPEND = os.O_RDWR | os.O_APPEND

_HASH_FIELD, _HASH_END = b',"hash":"', b'"}'
_HASHED = -len(_HASH_FIELD) - len(FIRST) - len(_HASH_END)
"""Where the part of a line ends that its hash is of."""


class _Links(msgspec.Struct):
    """What binds a line to the others."""

    n: int
    previous: str
    hash: str


class _CutDetails(msgspec.Struct):
    bytes: int
    sha256: str


class _CutRecord(msgspec.Struct):
    """The record that marks the line before it as cut."""

    time: str
    details: _CutDetails
    action: str = CUT


class Head(msgspec.Struct, frozen=True):
    """The end of the chain: the last line, and where it ends."""

    n: int = 0
    hash: str = FIRST
    inode: int = 0
    size: int = 0


class Position(NamedTuple):
    """A line of a file, counted from 1; 0 is the file as a whole."""

    file: Path
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else str(self.file)


class Break(NamedTuple):
    """A place where the chain does not go on; without a position, its end."""

    problem: str
    position: Position | None = None


class Verdict(NamedTuple):
    """What a check has found: how many lines are right, and where the chain breaks."""

    lines: int = 0
    first: int = 0
    """The number of the first line."""
    last: int = 0
    hash: str = FIRST
    """Of the last line."""
    cut: int = 0
    """How many lines a crash has cut. They are marked, so they are no problem."""
    breaks: int = 0
    """How often the chain breaks. The check goes on from each."""
    problems: tuple[Break, ...] = ()
    """The first of these."""
    headless: bool = False
    """Whether there is no head, so that lines missing at the end would not show."""
    beyond: int = 0
    """How many lines follow the one that the head knows. A crash leaves such lines, until the next one is written."""
    keyed: bool = False
    """Whether the hashes need a key. Otherwise anyone can have written the lines before a break."""

    @property
    def problem(self) -> str | None:
        """What is wrong at the first break, if there is one."""
        return self.problems[0].problem if self.problems else None

    def broken(self, problem: str, position: Position | None = None) -> "Verdict":
        """Return the verdict with one break more."""
        shown = [Break(problem, position)] if self.breaks < _SHOWN else []
        return self._replace(breaks=self.breaks + 1, problems=(*self.problems, *shown))


class _Opened(NamedTuple):
    path: Path
    file: BufferedReader | gzip.GzipFile
    size: float


class _Line(NamedTuple):
    """A line of a file."""

    position: Position
    content: bytes
    """Without the line break. Empty if there are more than LONGEST bytes."""
    ended: bool
    """Whether it has a line break."""
    long_hash: str = ""
    """The SHA-256 of a line that is longer than LONGEST."""

    def is_cut(self, mark: "_Line") -> bool:
        """Return whether another line is the record that marks this one as cut."""
        if CUT.encode() not in mark.content:
            return False
        try:
            record = msgspec.json.decode(mark.content, type=_CutRecord)
        except (msgspec.DecodeError, RecursionError):
            return False
        return record.action == CUT and record.details.sha256 == (self.long_hash or sha256(self.content).hexdigest())


def _ignore(_: Break) -> None:
    pass


class Chain:
    """The file that the configuration names, and the files that it was renamed to."""

    def __init__(self, path: Path, max_size: int = 0, keep: int = 1, key: str = "") -> None:
        """Open nothing yet.

        max_size: bytes after which the file is renamed and a new one begins; 0 is never. keep: how many of those stay.
        """
        self.path = path
        self._max_size = max_size
        self._keep = keep
        self._key = key.encode()

    @property
    def head_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.head")

    def append(self, records: Sequence[bytes]) -> None:
        """Append records, each a JSON object with at least one field, and write them to the disk: all of them or none.

        Raises OSError.
        """
        with _opened(self.head_path, os.O_RDWR) as head_fd:
            _lock(head_fd, fcntl.LOCK_EX)
            with _opened(self.path, _APPEND) as fd:
                end = self._append(fd, _read_head(head_fd), records)
            os.pwrite(head_fd, msgspec.json.encode(end).ljust(_HEAD_SIZE - 1) + b"\n", 0)

    def _append(self, fd: int, head: Head | None, records: Sequence[bytes]) -> Head:
        """Append to an open file, and return the new head."""
        found = os.fstat(fd)
        size, end = found.st_size, b""
        if head is None or (head.inode, head.size) != (found.st_ino, size):
            head, end, mark = self._recover(fd, size, head)
            records = [*mark, *records]
        n, previous, parts = head.n, head.hash, [end]
        for record in records:
            n += 1
            line = b'{"n":%d,%b,"previous":"%b"' % (n, record[1:-1], previous.encode())
            previous = self._hash(line)
            parts += line, _HASH_FIELD, previous.encode(), _HASH_END, b"\n"
        data = b"".join(parts)
        if self._max_size and size and not end and size + len(data) > self._max_size:
            with suppress(OSError):  # then the file goes on
                self._rotate(fd)
                size = 0
        try:
            _write_all(fd, data)
            _sync(fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, size)
            raise
        return Head(n, previous, os.fstat(fd).st_ino, size + len(data))

    def _recover(self, fd: int, size: int, head: Head | None) -> tuple[Head, bytes, Sequence[bytes]]:
        """Find where the chain ends, if the head does not say it: after a crash or a rotation, or without a head.

        Return also what to write before the next line: the end of a line that has none, and the record that marks it.
        """
        rest_at = _line_start(fd, size)
        last_at = _line_start(fd, rest_at - 1)
        end = head or Head()
        last = self._read(_content(fd, last_at, rest_at - 1))
        if last is not None and last.n > end.n and (head is None or self._goes_on(fd, head)):
            end = Head(last.n, last.hash)  # a process was killed before it wrote the head
        if rest_at == size:
            return end, b"", ()
        last = self._read(_content(fd, rest_at, size))
        if last is not None and last.previous == end.hash:  # only the line break is missing
            return Head(last.n, last.hash), b"\n", ()
        details = _CutDetails(size - rest_at, _hash_of(fd, rest_at, size))
        return end, b"\n", [msgspec.json.encode(_CutRecord(timestamp(), details))]

    def _goes_on(self, fd: int, head: Head) -> bool:
        """Return whether the line that follows the head's is in the file, or in one before it.

        Otherwise the lines beyond the head are forged. The next line then follows the head's, so the chain breaks.
        """
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            opened = _Opened(self.path, file, inf)
            if (_first_number(opened) or 0) > head.n + 1:  # power was lost before an older head was written to the disk
                return True
            lines = (line.content for line in _lines([opened]) if head.hash.encode() in line.content)
            return any(found is not None and _follows(head, found) for found in map(self._read, lines))

    def _rotate(self, fd: int) -> None:
        """Rename the file, and make its descriptor that of a new one. Raises OSError."""
        for number in range(self._keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(self._rotated(number), self._rotated(number + 1))
        os.replace(self.path, self._rotated(1))
        with _opened(self.path, _APPEND) as new_fd:
            os.dup2(new_fd, fd, inheritable=False)

    def _rotated(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def files(self, report: Callable[[Break], None] = _ignore) -> Sequence[Path]:
        """Return the file and those that it was renamed to, also by other programs, in the order of their lines.

        Report those that cannot be read, or have no line. The file itself is left out while it has no line yet.
        """
        with ExitStack() as stack:
            return [one.path for one in self._in_order(_open_all(stack, self._names(), report), report)]

    def _names(self) -> Sequence[Path]:
        """Return what may be files of the chain, in no order."""
        found = self.path.parent.glob(f"{glob.escape(self.path.name)}[.-]*")
        begun = self.path.exists() and not (self.path.is_file() and self.path.stat().st_size == 0)
        return [path for path in found if path != self.head_path] + ([self.path] if begun else [])

    def _in_order(self, opened: Sequence[_Opened], report: Callable[[Break], None]) -> Sequence[_Opened]:
        """Return files in the order of their lines, without those that have none, which are reported."""
        others = [one for one in opened if one.path != self.path]
        found = [(number, one) for one in others if (number := _first_number(one, report)) is not None]
        ordered = sorted(found, key=lambda each: (each[0], each[1].path))
        return [one for _, one in ordered] + [one for one in opened if one.path == self.path]

    def verify(self, files: Sequence[Path] = ()) -> Verdict:
        """Check files, in this order; without `files` all, and that the line is there that the head knows.

        Raises OSError if one of `files` cannot be opened. Of all files, each that cannot be read is a break.
        """
        with ExitStack() as stack:
            head: Head | None = None
            opened: Sequence[_Opened]
            unread: list[Break] = []
            if files:
                opened = [_to_read(stack, path, path.open("rb")) for path in files]
            else:
                head, opened = self._snapshot(stack, unread.append)
                opened = self._in_order(opened, unread.append)
            verdict, changed, known = self._verify(_lines(opened, unread.append), head)
        if verdict.first == 1:  # no line is missing before the first one, so a file without lines lacks none
            unread = [one for one in unread if one.problem != EMPTY]
        verdict = verdict._replace(breaks=verdict.breaks + len(unread), problems=(*unread, *verdict.problems)[:_SHOWN])
        if head is None:
            return verdict._replace(headless=not files)
        verdict = verdict._replace(beyond=max(0, verdict.last - head.n))
        missing = head.n - verdict.last - changed
        if missing > 0 and changed and not verdict.lines:  # none of them has a number
            return verdict.broken(f"line {head.n} is missing, or changed: {self.head_path.name} knows it")
        if missing > 0:
            lines = "the last line is" if missing == 1 else f"the last {missing} lines are"
            return verdict.broken(f"{lines} missing: {self.head_path.name} knows line {head.n}")
        if head.n <= verdict.last and not known:
            return verdict.broken(f"line {head.n} is not the one that {self.head_path.name} knows")
        return verdict

    def _snapshot(self, stack: ExitStack, report: Callable[[Break], None]) -> tuple[Head | None, Sequence[_Opened]]:
        """Open all files as they are between two writes, and report those that cannot be opened.

        Read none of them: as long as the head is locked, nothing is written.
        """
        with ExitStack() as locked:
            head = None
            if self.head_path.exists():
                for _, file, _ in _open_all(locked, [self.head_path], report):
                    _lock(file.fileno(), fcntl.LOCK_SH)
                    head = _read_head(file.fileno())
            return head, _open_all(stack, self._names(), report)

    def _verify(self, lines: Iterable[_Line], head: Head | None) -> tuple[Verdict, int, bool]:
        """Check lines, and go on after each break.

        Return also how many lines at the end are changed ones, and whether the line of the head is there, or the next.
        """
        verdict, broken, right, changed, known = Verdict(keyed=bool(self._key)), None, None, 0, False
        for line in lines:
            found = self._read(line.content)
            if broken is not None:
                if found is not None and broken.is_cut(line):
                    verdict = verdict._replace(cut=verdict.cut + 1)
                else:
                    verdict, changed = verdict.broken(CHANGED, broken.position), changed + 1
                broken = None
            if found is None:
                broken, right = line, None  # the next line may say that it was cut
                continue
            if right is not None and right.is_cut(line):  # a crash leaves no line that is marked, and right
                verdict = verdict.broken(_END_REMOVED, right.position)
            right = line
            if not changed or found.n != verdict.last + changed + 1:  # else the changed lines are those in between
                problem = _problem(verdict, found)
                if problem is not None:
                    verdict = verdict.broken(problem, line.position)
            changed = 0
            if not line.ended and (head is None or found.n <= head.n):  # a crash may leave such a line beyond the head
                verdict = verdict.broken(_END_MISSING if head is None else _END_REMOVED, line.position)
            known = known or (head is not None and (_is_last(head, found) or _follows(head, found)))
            if found.n > verdict.last:
                verdict = verdict._replace(
                    lines=verdict.lines + 1, first=verdict.first or found.n, last=found.n, hash=found.hash
                )
        if broken is not None:
            verdict, changed = verdict.broken(CHANGED, broken.position), changed + 1
        return verdict, changed, known

    def _read(self, line: bytes) -> _Links | None:
        """Return what binds a line to the others; None unless its own hash is right."""
        expected = _HASH_FIELD + self._hash(line[:_HASHED]).encode() + _HASH_END
        if not hmac.compare_digest(line[_HASHED:], expected):
            return None
        return _links(line)

    def _hash(self, line: bytes) -> str:
        return hmac.digest(self._key, line, "sha256").hex() if self._key else sha256(line).hexdigest()


def read(path: Path, report: Callable[[Break], None]) -> Iterator[bytes]:
    """Yield the lines of a file, which may be compressed by gzip; report why it cannot be read, or not to its end."""
    with ExitStack() as stack:
        for line in _lines(_open_all(stack, [path], report), report):
            yield line.content


def timestamp() -> str:
    """Return the time, in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file. Create it if it is missing, for the owner of the directory if root does that. Raises OSError.

    No link is followed: root would write into a file that the owner of the directory has chosen.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        fd = _create(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # writing to a pipe could wait forever
            raise OSError(errno.EINVAL, _NO_FILE, str(path))
        yield fd
    finally:
        os.close(fd)


def _sync(fd: int) -> None:
    """Make what was written durable."""
    if sys.platform == "linux":
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def _create(path: Path, flags: int) -> int:
    """Create a file, or open the one that another process has just created. Raises OSError."""
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, MODE)
    except FileExistsError:
        return os.open(path, flags)
    if os.geteuid() == 0:
        owner = path.parent.stat()
        with suppress(OSError):
            os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd


def _read_head(fd: int) -> Head | None:
    """Return the head; None if there is none, or no valid one."""
    with suppress(msgspec.DecodeError, ValueError):
        return msgspec.json.decode(os.pread(fd, _HEAD_SIZE, 0), type=Head)
    return None


def _line_start(fd: int, end: int) -> int:
    """Return where the line begins that ends at this place of a file."""
    while end > 0:
        start = max(0, end - LONGEST)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _content(fd: int, start: int, end: int) -> bytes:
    """Return a line, from and to these places of a file; nothing of one that is too long."""
    return os.pread(fd, end - start, start) if 0 < end - start <= LONGEST else b""


def _hash_of(fd: int, start: int, end: int) -> str:
    digest = sha256()
    for at in range(start, end, LONGEST):
        digest.update(os.pread(fd, min(LONGEST, end - at), at))
    return digest.hexdigest()


def _lock(fd: int, kind: int) -> None:
    """Lock the head. Raises OSError if another process does not unlock it in time."""
    if not lock(fd, time.monotonic() + LOCK_TIMEOUT, kind):
        raise BlockingIOError(errno.EWOULDBLOCK, "another process does not unlock it")


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _links(line: bytes) -> _Links | None:
    """Return what a line says that binds it to the others, if it does."""
    with suppress(msgspec.DecodeError, ValueError, RecursionError):
        return msgspec.json.decode(line, type=_Links)
    return None


def _is_last(head: Head, line: _Links) -> bool:
    return (line.n, line.hash) == (head.n, head.hash)


def _follows(head: Head, line: _Links) -> bool:
    return (line.n, line.previous) == (head.n + 1, head.hash)


def _problem(verdict: Verdict, found: _Links) -> str | None:
    """Return what is wrong between the last line and this one."""
    if verdict.lines == 0:  # earlier files may have been deleted
        return "this line is numbered 1, and follows others" if found.n == 1 and found.previous != FIRST else None
    if found.n == verdict.last + 1:
        return None if found.previous == verdict.hash else "this line does not follow from the one before it"
    if found.n <= verdict.last:
        return f"line {found.n} is repeated, inserted or moved: line {verdict.last + 1} should be here"
    lines = f"line {verdict.last + 1} is" if found.n == verdict.last + 2 else f"lines from {verdict.last + 1} on are"
    return f"{lines} missing here, or moved: this is line {found.n}"


def open_file(path: Path) -> BufferedReader:
    """Open a file to read it. Raises OSError, also if it is something else: opening a pipe could wait forever."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, _NO_FILE, str(path))
    return BufferedReader(FileIO(fd), 1 << 16)  # a long line is read four times as fast as with 8 KiB


def _open_all(stack: ExitStack, paths: Iterable[Path], report: Callable[[Break], None]) -> Sequence[_Opened]:
    """Open files that were found by their names, and report those for which that is not possible."""
    opened = []
    for path in paths:
        try:
            opened.append(_to_read(stack, path, open_file(path)))
        except OSError as error:
            report(Break(f"this cannot be read: {error.strerror}", Position(path)))
    return opened


def _to_read(stack: ExitStack, path: Path, file: BufferedReader) -> _Opened:
    """Return a file, which may be compressed by gzip. Of one that grows, only what it has now is read."""
    found = os.fstat(stack.enter_context(file).fileno())
    if path.suffix == ".gz":
        return _Opened(path, stack.enter_context(gzip.open(file)), inf)
    return _Opened(path, file, found.st_size if stat.S_ISREG(found.st_mode) else inf)


def _lines(opened: Iterable[_Opened], report: Callable[[Break], None] = _ignore) -> Iterator[_Line]:
    """Yield the lines of files; report a file that is damaged or empty."""
    for path, file, size in opened:
        number, left = 0, size
        try:
            while piece := file.readline(int(min(LONGEST, left))):
                left -= len(piece)
                content, long_hash = piece.removesuffix(b"\n"), ""
                if len(content) == LONGEST:
                    digest = sha256(piece)
                    while not piece.endswith(b"\n") and (piece := file.readline(int(min(LONGEST, left)))):
                        left -= len(piece)
                        digest.update(piece.removesuffix(b"\n"))
                    content, long_hash = b"", digest.hexdigest()
                number += 1
                yield _Line(Position(path, number), content, piece.endswith(b"\n"), long_hash)
            if not number:
                report(Break(EMPTY, Position(path)))
        except (OSError, EOFError, zlib.error) as error:  # OSError is also a checksum of gzip that is wrong
            report(Break(f"this file is damaged, and cannot be read beyond its line {number}: {error}", Position(path)))


def _first_number(opened: _Opened, report: Callable[[Break], None] = _ignore) -> int | None:
    """Return the number of the first line that has one: a crash may have cut those before it, or someone changed them.

    Report why there is none. Not the whole file is searched for it: it may be a large one that is no log.
    """
    problems: list[Break] = []
    start = opened._replace(size=min(opened.size, _SEARCHED))
    try:
        for line in islice(_lines([start], problems.append), _SEARCHED_LINES):
            if b'"n"' in line.content and (found := _links(line.content)) is not None:
                return found.n
    finally:
        opened.file.seek(0)
    report(problems[0] if problems else Break(_NO_LOG, Position(opened.path)))
    return None
