"""The log: one line for each event on standard error, JSON unless a person is watching."""

import json
import logging
import os
import pwd
import re
import sys
import syslog
import threading
from contextlib import suppress
from datetime import UTC, datetime
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
    """Standard error; a log that cannot be written must not keep anybody from being answered."""

    def write(self, line: bytes | str) -> None:
        """Write a line, or do without."""
        data = line.encode(errors="backslashreplace") if isinstance(line, str) else line
        with suppress(OSError, ValueError):
            sys.stderr.buffer.write(data + b"\n")
            sys.stderr.buffer.flush()

    msg = debug = info = warning = error = critical = write


def configure(quiet: bool = False) -> None:
    """Send this process's events, and those of uvicorn and the other libraries, to standard error.

    `quiet` leaves out what is only information.
    """
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
        logger_factory=_Sink,
        cache_logger_on_first_use=not quiet,
    )
    handler = logging.StreamHandler(sys.stderr)
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
    if not quiet:
        _log_what_python_prints()


def _log_what_python_prints() -> None:
    """Have what Python prints by itself (uncaught exceptions, also in threads, and warnings) come as lines, too."""
    logging.captureWarnings(True)
    sys.excepthook = lambda _, error, __: log.critical("unexpected", at=whereabouts(error))
    sys.unraisablehook = lambda found: log.error("unexpected", at=found.exc_value and whereabouts(found.exc_value))
    threading.excepthook = lambda found: log.error(
        "unexpected", thread=found.thread and found.thread.name, at=found.exc_value and whereabouts(found.exc_value)
    )


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
        event["at"] = whereabouts(trouble[1])
    return event


def describe(error: BaseException) -> str:
    """Say in one line what went wrong in this process itself, where no client's words can be in what it says."""
    at = whereabouts(error)
    return f"{error}; {at}".replace("\n", " ") if isinstance(error, OSError | ImportError) else at


def whereabouts(error: BaseException) -> str:
    """Name an exception and the lines that it passed through, without its text or any value."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_qualname}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__} at {' > '.join(frames)}"
