"""The log: one line for each event on standard error, JSON unless a person is watching."""

import json
import logging
import re
import sys
from contextlib import suppress
from typing import Any

import msgspec
import structlog

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
"""Everything that tokenauth has to say goes through here: `log.info("token_issued", user=...)`."""


def _json(event: Any, **_: Any) -> bytes:
    try:
        return msgspec.json.encode(event)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only spell out
        return json.dumps(event, default=repr).encode()


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


def whereabouts(error: BaseException) -> str:
    """Name an exception and the lines that it passed through, without its text or any value."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_qualname}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__} at {' > '.join(frames)}"
