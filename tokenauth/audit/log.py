"""The audit log of a process: records wait in memory until a thread has written them. No caller waits for a disk."""

import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from time import monotonic

from tokenauth.audit.chain import LOCK_TIMEOUT, Chain, timestamp
from tokenauth.audit.records import ACTS, DROPPED, encode, make_record
from tokenauth.audit.repeats import REPEATED, Repeats
from tokenauth.logs import json_line, log, observed
from tokenauth.request_context import current_request
from tokenauth.settings.model import AuditSettings

CAPACITY = 4 << 20
"""Maximum size of the records that wait while the file cannot be written, in bytes: about 10,000."""

FLUSH_TIMEOUT = LOCK_TIMEOUT + 1.0
"""Seconds that a process waits at its end for the last records to be written, also if another one holds the lock."""

_DELAY = 0.1
"""Seconds for which records are collected, to be written at once."""

_RETRY = 1.0
"""Seconds between two attempts to write."""


class _Dropped:
    """Counts records that did not fit into memory. It is in the queue in their place."""

    def __init__(self) -> None:
        self.count = 0
        self._since = self._until = timestamp()

    def add(self) -> None:
        self.count += 1
        self._until = timestamp()

    def merge(self, later: "_Dropped") -> None:
        self.count += later.count
        self._until = later._until

    def encode(self) -> bytes:
        details = {"count": self.count, "since": self._since, "until": self._until}
        return json_line({"time": timestamp(), "action": DROPPED, "details": details, "pid": os.getpid()})


_REMEDY = "run this as the user of the service, or chown it"


def find_problem(settings: AuditSettings) -> str | None:
    """Return why this user cannot write the audit log; None if that is possible, or there is none."""
    if not settings.file:
        return None
    path = Path(settings.file)
    try:
        if not stat.S_ISDIR(path.parent.stat().st_mode):
            return f"{path.parent} is not a directory; change audit.file"
        problem = _file_problem(path) or _file_problem(open_chain(settings).head_path)
    except (FileNotFoundError, NotADirectoryError):
        return f"the directory {path.parent} does not exist; create it for the user of the service"
    except OSError as error:
        return f"this user cannot look into {path.parent}: {error.strerror}; {_REMEDY}"
    if problem is None and not os.access(path.parent, os.W_OK | os.X_OK):
        return f"this user cannot create files in {path.parent}; {_REMEDY}"
    return problem


def _file_problem(file: Path) -> str | None:
    """Return why a file cannot be written; None if it can, or is missing. Raises OSError."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return f"{file} is a link, and none is followed; put the file itself there, or change audit.file"
    if not stat.S_ISREG(mode):
        return f"{file} is not a regular file; move it away, or change audit.file"
    if not os.access(file, os.R_OK | os.W_OK):
        return f"{file} cannot be read and written by this user; {_REMEDY}"
    return None


def open_chain(settings: AuditSettings) -> Chain:
    """Return the file of the audit log, which need not exist."""
    return Chain(Path(settings.file), settings.max_mib << 20, settings.keep, settings.key)


class AuditLog:
    """Writes the acts among the events of a process. Nothing here raises or blocks, except `close` for a short time."""

    def __init__(self, settings: AuditSettings) -> None:
        self.problem: str | None = None
        """Why the file cannot be written now."""
        self.lost = 0
        """Records that did not fit in, or could not be written before the end."""
        self.hand_over: Callable[[Sequence[bytes]], None] | None = None
        """Takes the records that could not be written before the end, instead of losing them."""
        self._chain = open_chain(settings)
        self._changed = threading.Condition(threading.RLock())  # a destructor may log in the middle of another line
        self._waiting: list[bytes | _Dropped] = []
        self._taken: Sequence[bytes | _Dropped] = ()  # being written
        self._size = 0
        self._repeats = Repeats()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def observe(self, event: Mapping[str, object]) -> None:
        """Add the record of an event, if it is an act."""
        name = event["event"]
        if name in ACTS:
            try:
                request = current_request.get()
                if name in REPEATED:
                    with self._changed:
                        record = self._repeats.add(event, request, monotonic())
                else:
                    record = make_record(event, request)
                if record is not None:
                    self._add(encode(record))
            except Exception:
                self.lost += 1

    def take(self, records: Sequence[bytes]) -> None:
        """Add the records that another process could not write before its end."""
        for record in records:
            self._add(record)

    def close(self) -> None:
        """Write what waits, within FLUSH_TIMEOUT.

        What cannot be written is handed over, or else it is lost, and logged as a number.
        """
        with self._changed:
            self._add_counted(inf)
            self._closing.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(FLUSH_TIMEOUT)
        with self._changed:
            unwritten = [*self._taken, *self._waiting]
            self._taken, self._waiting, self._size = (), [], 0
        if unwritten and self.hand_over is not None:
            self.hand_over([one if isinstance(one, bytes) else one.encode() for one in unwritten])
        elif unwritten:
            lost = sum(one.count if isinstance(one, _Dropped) else 1 for one in unwritten)
            self.lost += sum(not isinstance(one, _Dropped) for one in unwritten)
            log.error("audit_lines_lost", count=lost, reason=self.problem)

    def _add(self, record: bytes) -> None:
        with self._changed:
            if self._size + len(record) <= CAPACITY:
                self._waiting.append(record)
                self._size += len(record)
            else:
                if not self._waiting or not isinstance(self._waiting[-1], _Dropped):
                    self._waiting.append(_Dropped())
                self._waiting[-1].add()  # type: ignore[union-attr]
                self.lost += 1
            if len(self._waiting) == 1:
                self._changed.notify_all()
            if self._thread is None:
                self._start()

    def _add_counted(self, now: float) -> None:
        for record in self._repeats.due(now):
            try:
                self._add(encode(record))
            except Exception:  # the thread must go on
                self.lost += 1

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="audit", daemon=True)
        with suppress(RuntimeError, MemoryError):  # the next record tries again
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._changed:
                due_at = self._repeats.next_due()
                timeout = None if due_at is None else due_at - monotonic()
                self._changed.wait_for(lambda: self._waiting or self._closing.is_set(), timeout)
                self._add_counted(monotonic())
                if not self._waiting:
                    if self._closing.is_set():
                        return
                    continue
            self._closing.wait(_DELAY if self.problem is None else _RETRY)
            if not self._write() and self._closing.is_set():
                return

    def _write(self) -> bool:
        """Write what waits. Return whether that worked; otherwise it waits on."""
        with self._changed:
            taken = self._taken = self._waiting
            self._waiting = []
        try:
            self._chain.append([one if isinstance(one, bytes) else one.encode() for one in taken])
        except Exception as error:
            with self._changed:
                if self._taken:  # `close` has not counted them as lost
                    self._taken, self._waiting = (), _join(taken, self._waiting)
            self._note(getattr(error, "strerror", None) or type(error).__name__)
            return False
        with self._changed:
            self._taken = ()
            self._size -= sum(len(one) for one in taken if isinstance(one, bytes))
        self._note(None, len(taken))
        return True

    def _note(self, problem: str | None, written: int = 0) -> None:
        """Log that the file cannot be written, or that it can again: each once."""
        before, self.problem = self.problem, problem
        if problem is not None and before is None:
            action = "acts wait in memory; `tokenauth doctor` looks at the file"
            log.error("audit_not_writable", reason=problem, action=action)
        elif problem is None and before is not None:
            log.info("audit_writable_again", written=written, lost=self.lost)


def _join(first: list[bytes | _Dropped], second: list[bytes | _Dropped]) -> list[bytes | _Dropped]:
    """Join what waited before an attempt and since then. What did not fit in before and after is one line."""
    if first and second:
        before, after = first[-1], second[0]
        if isinstance(before, _Dropped) and isinstance(after, _Dropped):
            before.merge(after)
            second = second[1:]
    return [*first, *second]


@contextmanager
def auditing(audit: AuditLog | None) -> Iterator[None]:
    """Write the acts of this process to an audit log, if there is one, and close it at the end."""
    if audit is None:
        yield
        return
    try:
        with observed(audit.observe):
            yield
    finally:
        audit.close()


def append_now(settings: AuditSettings, event: Mapping[str, object]) -> None:
    """Write what an operator did with a command, if there is an audit log. Raises OSError."""
    if settings.file:
        open_chain(settings).append([encode(make_record(event, None, command=True))])
