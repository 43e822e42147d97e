"""The log: one line for each event on standard error, JSON unless a person is watching."""

import atexit
import json
import logging
import os
import pwd
import re
import select
import sys
import syslog
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any

import msgspec
import structlog

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
"""Everything that tokenauth has to say goes through here: `log.info("token_issued", user=...)`."""


def printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: what is not printable is written as an escape.

    That is every control, format (such as those that turn the direction of writing) and unassigned character.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _json(event: Any, **_: Any) -> bytes:
    try:
        line = msgspec.json.encode(event)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only spell out
        return json.dumps(event, default=repr).encode()
    if (line.isascii() and b"\x7f" not in line) or line.decode().isprintable():
        return line
    return json_text(json.loads(line)).encode()


def json_text(document: object, indent: int | None = None) -> str:
    """Return JSON in printable ASCII: somebody may look at it in a terminal."""
    return json.dumps(document, indent=indent).replace("\x7f", "\\u007f")


def _printable(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: printable(value) if isinstance(value, str) else value for key, value in event.items()}


def record(event: str, **facts: object) -> None:
    """Log what an operator has done with a command, and who did it: to the system's log, where there is one.

    It goes to standard error, too, unless a person reads that, who is told in words.
    """
    by = os.environ.get("SUDO_USER") or _name_of(os.getuid())
    timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    line = _json({"event": event, **facts, "by": by, "level": "info", "timestamp": timestamp})
    syslog.openlog("tokenauth", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
    syslog.syslog(syslog.LOG_INFO, line.decode())
    if not sys.stderr.isatty():
        _Sink().write(line)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class _Sink:
    """Standard error, as a command writes to it: at once."""

    def write(self, line: bytes | str) -> None:
        """Write a line, or do without: a log that cannot be written stops nothing else."""
        with suppress(OSError, ValueError):
            sys.stderr.buffer.write(_encode(line) + b"\n")
            sys.stderr.buffer.flush()

    msg = debug = info = warning = error = critical = write


CAPACITY = 4 << 20
"""Bytes of lines that wait to be written; while there are more, lines are dropped and counted."""

FLUSH_PATIENCE = 1.0
"""Seconds that a process which ends waits for its last lines to be written."""

_GATHER = 0.005
"""Seconds in which lines come together, to be written by one system call."""


class Writer:
    """Standard error, as a server writes to it: from a thread, so that a log that nobody reads stops nothing.

    A full pipe, a stopped terminal or a slow disk blocks that thread only. Lines keep their order. Those that there is
    no room for are dropped, and a line says how many when there is room again.
    """

    def __init__(self, descriptor: int, capacity: int = CAPACITY) -> None:
        """Write to a descriptor. It stays in blocking mode, which it has in common with other processes."""
        self._descriptor = descriptor
        self._capacity = capacity
        self.say_dropped: Callable[[int], bytes | str] = "{} lines dropped".format
        self.reset()

    def reset(self) -> None:
        """Begin from the beginning, as in a process that was just forked and has no thread yet."""
        self._lock = threading.RLock()  # a destructor may log in the middle of another line
        self._idle = threading.Condition(self._lock)
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._hurry = threading.Event()
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._lost = 0
        self._writing = False
        self._started = False

    def write(self, line: bytes | str) -> None:
        """Have a line written soon. Never blocks."""
        data = _encode(line) + b"\n"
        with self._lock:
            if self._size + len(data) > self._capacity:
                self._dropped += 1
                return
            self._lines.append(data)
            self._size += len(data)
            if len(self._lines) == 1:
                self._wakeups.put(None)
        if not self._started:
            self._start()

    msg = debug = info = warning = error = critical = write

    def flush(self, patience: float = FLUSH_PATIENCE) -> None:
        """Wait until everything is written, but no longer than that."""
        if not self._started:
            self._write_waiting(patience)
            return
        self._hurry.set()
        with self._idle:
            self._idle.wait_for(lambda: not self._lines and not self._writing, patience)
        self._hurry.clear()

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            try:
                threading.Thread(target=self._run, name="log", daemon=True).start()
                self._started = True
            except (RuntimeError, MemoryError):  # it is tried again at the next line
                self._write_waiting(0)

    def _run(self) -> None:
        while True:
            self._wakeups.get()
            self._hurry.wait(_GATHER)
            with suppress(Exception):
                self._write_waiting(None)

    def _write_waiting(self, patience: float | None) -> None:
        """Write what waits; with a `patience`, only what can be written without blocking for longer."""
        with self._lock:
            lines, self._lines, self._size = self._lines, [], 0
            lost, dropped, self._lost, self._dropped = self._lost, self._dropped, 0, 0
            self._writing = True
        try:
            if lost and self._write_chunk(self._dropped_line(lost), patience):
                lost = 0
            lost += sum(count for chunk, count in _chunks(lines) if not self._write_chunk(chunk, patience))
            if dropped and not self._write_chunk(self._dropped_line(dropped), patience):
                lost += dropped
        finally:
            with self._idle:
                self._writing = False
                self._idle.notify_all()
        self._lost = lost

    def _dropped_line(self, count: int) -> bytes:
        return _encode(self.say_dropped(count)) + b"\n"

    def _write_chunk(self, chunk: bytes, patience: float | None) -> bool:
        left = memoryview(chunk)
        while left:
            try:
                if patience is not None and not self._writable(patience):
                    return False
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process has made it so
                self._writable(1.0)
            except OSError:
                return False
        return True

    def _writable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))


def _encode(line: bytes | str) -> bytes:
    return line.encode(errors="backslashreplace") if isinstance(line, str) else line


def _chunks(lines: list[bytes]) -> Iterator[tuple[bytes, int]]:
    """Join lines into what a pipe takes in one piece, so that those of several processes do not mix; count them."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        if chunk and size + len(line) > select.PIPE_BUF:
            yield b"".join(chunk), len(chunk)
            chunk, size = [], 0
        chunk.append(line)
        size += len(line)
    if chunk:
        yield b"".join(chunk), len(chunk)


_writer = Writer(2)
os.register_at_fork(after_in_child=_writer.reset)
atexit.register(_writer.flush)


def flush() -> None:
    """Write the last lines of this process, if that takes no more than a second. It happens at a normal end anyway."""
    _writer.flush()


class _Handler(logging.Handler):
    """Brings the lines of other libraries into the log."""

    def __init__(self, sink: _Sink | Writer) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        with suppress(Exception):  # as with logging.raiseExceptions = False
            self._sink.write(self.format(record))


def configure(quiet: bool = False, at_once: bool = False) -> None:
    """Send this process's events, and those of uvicorn and the other libraries, to standard error.

    `quiet`, for commands, leaves out what is only information. Commands write `at_once`, and wait for whoever reads;
    servers must not.
    """
    sink = _Sink() if quiet or at_once else _writer
    level = logging.WARNING if quiet else logging.INFO
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    person = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if person else structlog.processors.JSONRenderer(serializer=_json)
    )
    if person:
        shared.append(_printable)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=not quiet,
    )
    _writer.say_dropped = partial(_say_dropped, [*shared, renderer])
    handler = _Handler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                _without_exception_text,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _text(renderer),
            ],
        )
    )
    logging.raiseExceptions = False
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for chatty in ("alembic", "aiosqlite", "sqlalchemy", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # it names workers, which take no signals, as servers
    if not quiet:
        _log_what_python_prints()


def _log_what_python_prints() -> None:
    """Have what Python prints by itself (uncaught exceptions, also in threads, and warnings) come as lines, too."""
    logging.captureWarnings(True)
    sys.excepthook = lambda _, error, __: log.critical("unexpected", at=safe_traceback(error))
    sys.unraisablehook = lambda found: log.error("unexpected", at=found.exc_value and safe_traceback(found.exc_value))
    threading.excepthook = lambda found: log.error(
        "unexpected", thread=found.thread and found.thread.name, at=found.exc_value and safe_traceback(found.exc_value)
    )


def _say_dropped(processors: list[structlog.typing.Processor], count: int) -> bytes | str:
    event: Any = {"event": "log_lines_dropped", "count": count}
    for process in processors:
        event = process(None, "warning", event)
    line: bytes | str = event
    return line


def _text(renderer: structlog.typing.Processor) -> structlog.typing.Processor:
    """Make a renderer of bytes fit the standard library's formatter."""

    def render(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
        line = renderer(logger, name, event)
        return line.decode() if isinstance(line, bytes) else str(line)

    return render


def _without_exception_text(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep where an exception came from and drop what it says: that may hold what a client sent."""
    if event["_record"].name == "asyncio":  # quotes tasks, futures and what they hold
        event["event"] = re.split(r"[(<\n]", str(event["event"]))[0].strip()
    trouble = event.pop("exc_info", None)
    if trouble and trouble[1] is not None:
        event["at"] = safe_traceback(trouble[1])
    return event


def describe(error: BaseException) -> str:
    """Say in one line what went wrong in this process itself, where no client's words can be in what it says.

    Of what nobody has thought of, all that can be said is where it was.
    """
    return str(error).replace("\n", " ") if isinstance(error, OSError | ImportError) else safe_traceback(error)


def safe_traceback(error: BaseException) -> str:
    """Name an exception and the lines that it passed through, without its text or any value."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_qualname}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__} at {' > '.join(frames)}"
