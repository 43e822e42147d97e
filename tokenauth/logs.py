"""Logging to standard error: one line per event, as JSON lines or, on a terminal, as colored text."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any

import msgspec

from tokenauth.request_context import current_request

if _unwanted := {"rich", "greenlet"} - sys.modules.keys():
    # structlog would load rich to format tracebacks, which are never logged, and greenlet, which it does not need here.
    # That is a fifth of the time of a start, and 1.3 MB of each worker.
    sys.modules.update(dict.fromkeys(_unwanted))  # type: ignore[arg-type]  # an import of them fails
import structlog

for _name in _unwanted:
    del sys.modules[_name]

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
"""The logger of all modules: `log.info("token_issued", user=...)`."""


def printable(text: str) -> str:
    """Escape all characters that are not printable, so that text cannot control a terminal.

    These are control characters, format characters (such as those that change the direction of text) and unassigned
    ones.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def json_line(event: object) -> bytes:
    """Encode an event as one line of JSON that is safe to show on a terminal."""
    try:
        line = msgspec.json.encode(event)
    except UnicodeEncodeError:  # a lone surrogate: only an escape can represent it
        return json.dumps(msgspec.to_builtins(event)).encode()
    if (line.isascii() and 0x7F not in line) or line.decode().isprintable():
        return line
    return json_text(json.loads(line)).encode()


def json_text(document: object, indent: int | None = None) -> str:
    """Return JSON in printable ASCII, safe to show on a terminal."""
    return json.dumps(document, indent=indent).replace("\x7f", "\\u007f")


def _printable(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: printable(value) if isinstance(value, str) else value for key, value in event.items()}


Observer = Callable[[Mapping[str, object]], None]

_observers: list[Observer] = []
os.register_at_fork(after_in_child=_observers.clear)  # their threads and locks are the parent's


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Also pass each event that this process logs to a function, which must not raise."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _complete(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Pass an event to the observers, and add the trace of the request that it is about."""
    for observe in _observers:
        observe(event)
    request = current_request.get()
    if request is not None:
        event.update(request.trace())
    return event


def _render_json(_: Any, level: str, event: structlog.typing.EventDict) -> bytes:
    """Add the level and the time, and encode the event. structlog's processors for that take 2.5 times as long."""
    event["level"], event["timestamp"] = level, datetime.now(UTC)
    return json_line(event)


def log_command(event: str, **fields: object) -> Mapping[str, object]:
    """Log a change that an operator made with a command, and who made it, to syslog (facility authpriv).

    It also goes to standard error, unless that is a terminal: there the command prints a sentence. Return all fields.
    """
    logged = {"event": event, **fields, "by": operator(), "level": "info", "timestamp": datetime.now(UTC)}
    line = json_line(logged)
    syslog.openlog("tokenauth", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
    syslog.syslog(syslog.LOG_INFO, line.decode())
    if not sys.stderr.isatty():
        _DirectWriter().write(line)
    return logged


def operator() -> str:
    """Return the login name of the person who runs this command."""
    return os.environ.get("SUDO_USER") or name_of(os.getuid())


def name_of(uid: int) -> str:
    """Return the login name of a user of this machine, or the number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def on_terminal() -> bool:
    """Return whether people read the log on a terminal, and not a program."""
    return sys.stderr.isatty()


def show(text: str) -> None:
    """Write a text for people among the lines of a server's log. Never blocks."""
    _writer.write(text.removesuffix("\n"))


_LEFT_OUT = frozenset({"listening", "metrics_listening", "started", "stopped", "pool_filled"})
"""Events that are not logged on a terminal: people there see the greeting of `serve`, and stop it themselves."""

_MISTAKES = frozenset({"configuration_refused", "start_failed"})
"""Events whose `detail` is an error message."""


def _leave_out(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if event["event"] in _LEFT_OUT or event.get("signal") == "SIGINT":
        raise structlog.DropEvent
    return event


class _TerminalRenderer(structlog.dev.ConsoleRenderer):
    """Colored text. Errors that end the start are shown as those of commands are."""

    def __call__(self, logger: Any, name: str, event: structlog.typing.EventDict) -> str:
        if event["event"] in _MISTAKES:
            return f"Error: {event['detail']}"
        if event.get("scopes", ()) is None:  # of a named token: "None" reads like none
            event["scopes"] = "(all)"
        return super().__call__(logger, name, event)


class _DirectWriter:
    """Writes to standard error at once, for commands."""

    def write(self, line: bytes | str) -> None:
        with suppress(OSError, ValueError):  # a log that cannot be written must not stop anything else
            sys.stderr.buffer.write(_encode(line) + b"\n")
            sys.stderr.buffer.flush()

    msg = debug = info = warning = error = critical = write


CAPACITY = 4 << 20
"""Maximum size of the lines that wait to be written, in bytes. Lines beyond that are dropped and counted."""

FLUSH_TIMEOUT = 1.0
"""Seconds that a process waits at its end for the last lines to be written."""

_BATCH_DELAY = 0.005
"""Seconds for which lines are collected, to be written by one system call."""


class BackgroundWriter:
    """Writes lines from a thread, for servers: a full pipe, a stopped terminal or a slow disk blocks only that thread.

    Lines keep their order. When more than `capacity` bytes wait, lines are dropped. Later a line reports how many.
    """

    def __init__(self, descriptor: int, capacity: int = CAPACITY) -> None:
        # The descriptor stays in blocking mode: other processes share that setting.
        self._descriptor = descriptor
        self._capacity = capacity
        self.format_dropped: Callable[[int], bytes | str] = "{} lines dropped".format
        self.reset()

    def reset(self) -> None:
        """Start over in a forked process: the thread exists only in its parent."""
        self._lock = threading.RLock()  # a destructor may log in the middle of another line
        self._idle = threading.Condition(self._lock)
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._flushing = threading.Event()
        self._lines: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self._lost = 0
        self._writing = False
        self._started = False

    def write(self, line: bytes | str) -> None:
        """Add a line to be written soon. Never blocks."""
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

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Wait until everything is written, at most `timeout` seconds."""
        if not self._started:
            self._write_lines(timeout)
            return
        self._flushing.set()
        with self._idle:
            self._idle.wait_for(lambda: not self._lines and not self._writing, timeout)
        self._flushing.clear()

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            try:
                threading.Thread(target=self._run, name="log", daemon=True).start()
                self._started = True
            except (RuntimeError, MemoryError):  # the next line tries again
                self._write_lines(0)

    def _run(self) -> None:
        while True:
            self._wakeups.get()
            self._flushing.wait(_BATCH_DELAY)
            with suppress(Exception):
                self._write_lines(None)

    def _write_lines(self, timeout: float | None) -> None:
        """Write the waiting lines. With a `timeout`, drop those that cannot be written within it."""
        with self._lock:
            lines, self._lines, self._size = self._lines, [], 0
            lost, dropped, self._lost, self._dropped = self._lost, self._dropped, 0, 0
            self._writing = True
        try:
            if lost and self._write_chunk(self._dropped_line(lost), timeout):
                lost = 0
            lost += sum(count for chunk, count in _chunks(lines) if not self._write_chunk(chunk, timeout))
            if dropped and not self._write_chunk(self._dropped_line(dropped), timeout):
                lost += dropped
        finally:
            with self._idle:
                self._writing = False
                self._idle.notify_all()
        self._lost = lost

    def _dropped_line(self, count: int) -> bytes:
        return _encode(self.format_dropped(count)) + b"\n"

    def _write_chunk(self, chunk: bytes, timeout: float | None) -> bool:
        left = memoryview(chunk)
        while left:
            try:
                if timeout is not None and not self._writable(timeout):
                    return False
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process set it to non-blocking mode
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
    """Join lines into chunks that a pipe takes atomically, so that lines of several processes do not mix.

    Yield each chunk with its number of lines.
    """
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


_writer = BackgroundWriter(2)
os.register_at_fork(after_in_child=_writer.reset)
atexit.register(_writer.flush)


def flush() -> None:
    """Write the waiting lines of this process, within FLUSH_TIMEOUT. Every exit but `os._exit` does this."""
    _writer.flush()


class _Handler(logging.Handler):
    """Passes log records of other libraries on."""

    def __init__(self, sink: _DirectWriter | BackgroundWriter) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # as with logging.raiseExceptions = False
            self._sink.write(self.format(record))


def configure(quiet: bool = False, direct: bool = False) -> None:
    """Send the log of this process, of uvicorn and of other libraries to standard error.

    quiet: log warnings and errors only, for commands. This implies `direct`.
    direct: write each line at once and wait for the reader. A server must not wait.
    """
    sink = _DirectWriter() if quiet or direct else _writer
    level = logging.WARNING if quiet else logging.INFO
    terminal = on_terminal()
    shared: list[structlog.typing.Processor] = []
    renderer: structlog.typing.Processor = _render_json
    if terminal:
        time = structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S%z", utc=False)
        shared = [structlog.processors.add_log_level, time, _printable]
        renderer = _TerminalRenderer(pad_event_to=0, pad_level=False)
    structlog.configure(
        processors=[_complete, *([_leave_out] if terminal and sink is _writer else []), *shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: sink,
    )
    configured = log.bind()
    for method in ("debug", "info", "warning", "error", "critical"):
        # Without this, `log` would look for its method each time, which takes as long as half of a line.
        setattr(log, method, getattr(configured, method))
    _writer.format_dropped = partial(_format_dropped, [*shared, renderer])
    handler = _Handler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                _as_library_message,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _text(renderer),
            ],
        )
    )
    logging.raiseExceptions = False
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for noisy in ("alembic", "sqlalchemy", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its messages call each worker a server
    if not quiet:
        _log_python_messages()


def _log_python_messages() -> None:
    """Log warnings and uncaught exceptions, which Python would print."""
    logging.captureWarnings(True)
    sys.excepthook = lambda _, error, __: log.critical("unexpected_error", at=safe_traceback(error))
    sys.unraisablehook = lambda found: log.error(
        "unexpected_error", at=found.exc_value and safe_traceback(found.exc_value)
    )
    threading.excepthook = lambda found: log.error(
        "unexpected_error",
        thread=found.thread and found.thread.name,
        at=found.exc_value and safe_traceback(found.exc_value),
    )


def _format_dropped(processors: list[structlog.typing.Processor], count: int) -> bytes | str:
    event: Any = {"event": "log_lines_dropped", "count": count}
    for process in processors:
        event = process(None, "warning", event)
    line: bytes | str = event
    return line


def _text(renderer: structlog.typing.Processor) -> structlog.typing.Processor:
    """Adapt a renderer that returns bytes to the formatter of the standard library."""

    def render(logger: Any, name: str, event: structlog.typing.EventDict) -> str:
        line = renderer(logger, name, event)
        return line.decode() if isinstance(line, bytes) else str(line)

    return render


def _as_library_message(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Log the message of a library as `detail`: it is text for people, and not the name of an event.

    An exception is logged as where it was raised, without its text: that may contain what a client sent.
    """
    event["logger"], event["detail"] = event["_record"].name, str(event["event"])
    event["event"] = "library_message"
    if event["logger"] == "asyncio":  # its messages quote tasks, futures and their values
        event["detail"] = re.split(r"[(<\n]", event["detail"])[0].strip()
    exc_info = event.pop("exc_info", None)
    if exc_info and exc_info[1] is not None:
        event["at"] = safe_traceback(exc_info[1])
    return event


def describe(error: BaseException) -> str:
    """Describe an error of this process in one line, for errors whose text cannot contain what a client sent.

    The text of other exceptions is left out.
    """
    return str(error).replace("\n", " ") if isinstance(error, OSError | ImportError) else safe_traceback(error)


def safe_traceback(error: BaseException) -> str:
    """Return the type of an exception and the lines it passed through, without its text or any value."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_qualname}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__} at {' > '.join(frames)}"
