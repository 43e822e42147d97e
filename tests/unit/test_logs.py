"""The log of a process: JSON lines without the text of any exception, which may contain what a client sent."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.servers import ROOT

CANARY = "canary-4711"

HARNESS = """
import asyncio, gc, json, logging, os, sys
from tokenauth import logs
from tokenauth.logs import log

canary = os.environ["CANARY"]

def inner(value):
    raise ValueError(value)

def outer():
    inner(canary)

for name, script in json.load(sys.stdin).items():
    sys.stderr.write(f"--- {name}\\n")
    try:
        exec(script)
    except Exception as error:
        sys.stderr.write(f"the log raised {type(error).__name__}\\n")
    logs.flush()
"""

FORGERIES = ["two\nlines", '{"event": "forged"}', "\x1b[2J", "\x00\u2028\u202e", "a\udcffb"]
CHATTY = ["alembic", "alembic.runtime.migration", "sqlalchemy.engine", "asyncio"]

LEAKS = {
    "logger.exception": """
try:
    outer()
except ValueError:
    logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
""",
    "exc_info": """
try:
    outer()
except ValueError as error:
    logging.getLogger("anything").error("Exception", exc_info=error)
""",
    "chained": """
try:
    try:
        outer()
    except ValueError as cause:
        raise RuntimeError("other") from cause
except RuntimeError:
    logging.getLogger("anything").exception("Exception")
""",
    "a task that is never awaited": """
async def task():
    outer()

async def main():
    asyncio.create_task(task())
    await asyncio.sleep(0)
    gc.collect()
    await asyncio.sleep(0)

globals().update(task=task)
asyncio.run(main())
""",
    "a callback of the event loop": """
async def main():
    asyncio.get_running_loop().call_soon(outer)
    await asyncio.sleep(0)

asyncio.run(main())
""",
    "a callback that is given the secret": """
async def main():
    asyncio.get_running_loop().call_soon(inner, canary)
    await asyncio.sleep(0)

asyncio.run(main())
""",
    "a future that is never awaited": """
async def main():
    asyncio.get_running_loop().create_future().set_exception(ValueError(canary))
    gc.collect()
    await asyncio.sleep(0)

asyncio.run(main())
""",
}

SCRIPTS = {
    "quiet": "logs.configure(quiet=True)\nlog.info('a')\nlog.warning('b')\nlog.error('c')\nlogs.configure()",
    **{f"forgery {number}": f"log.info('seen', value={text!r})" for number, text in enumerate(FORGERIES)},
    **LEAKS,
    "plain": "log.info('token_issued', user='жанна', count=3, up=True)\nlog.error('broken')",
    "foreign": "logging.getLogger('httptools').info('started %d', 3)",
    "chatty": "".join(f"logging.getLogger({name!r}).{how}('x')\n" for name in CHATTY for how in ("info", "warning")),
    "unexpected": (
        "try:\n    outer()\nexcept ValueError as e:\n    log.error('unexpected_error', at=logs.safe_traceback(e))"
    ),
}

Logged = dict[str, list[str]]


@pytest.fixture(scope="module")
def logged() -> Logged:
    """Run all scripts in one process. Return the lines that each of them logs."""
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        cwd=ROOT,
        env={**os.environ, "CANARY": CANARY, "PYTHONIOENCODING": "utf-8"},
        input=json.dumps(SCRIPTS).encode(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == b""
    sections = (section.split("\n") for section in done.stderr.decode().split("--- ")[1:])
    return {name: lines[:-1] for name, *lines in sections}


def events(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def test_an_event_is_one_line_of_json_with_time_and_level(logged: Logged) -> None:
    issued, broken = events(logged["plain"])
    assert issued.pop("timestamp").endswith("Z")
    assert issued == {"event": "token_issued", "level": "info", "user": "жанна", "count": 3, "up": True}
    assert (broken["event"], broken["level"]) == ("broken", "error")


@pytest.mark.parametrize("number", range(len(FORGERIES)))
def test_a_value_can_neither_forge_nor_lose_a_line(logged: Logged, number: int) -> None:
    """Python represents file names and environment variables that are not UTF-8 with lone surrogates."""
    (event,) = events(logged[f"forgery {number}"])
    assert (event["event"], event["level"]) == ("seen", "info")
    assert datetime.fromisoformat(event["timestamp"]).tzinfo is UTC
    assert event["value"][0] == FORGERIES[number][0]


def test_other_libraries_log_in_the_same_form(logged: Logged) -> None:
    (event,) = events(logged["foreign"])
    assert (event["event"], event["level"]) == ("library_message", "info")
    assert (event["logger"], event["detail"]) == ("httptools", "started 3")


def test_chatty_libraries_log_only_warnings(logged: Logged) -> None:
    assert [event["level"] for event in events(logged["chatty"])] == ["warning"] * len(CHATTY)


def test_quiet_hides_informational_events(logged: Logged) -> None:
    assert [event["event"] for event in events(logged["quiet"])] == ["b", "c"]


@pytest.mark.parametrize("way", LEAKS)
def test_an_exceptions_text_is_not_logged(logged: Logged, way: str) -> None:
    (event,) = events(logged[way])
    assert event["level"] == "error"
    assert CANARY not in str(event)


@pytest.mark.parametrize("way", ["logger.exception", "exc_info", "a task that is never awaited"])
def test_an_exception_is_logged_with_its_origin(logged: Logged, way: str) -> None:
    (event,) = events(logged[way])
    assert "ValueError at " in event["at"]
    assert "outer:" in event["at"]
    assert event["at"].rpartition(" > ")[2].startswith("inner:")


def test_a_safe_traceback_has_lines_and_no_text(logged: Logged) -> None:
    (event,) = events(logged["unexpected"])
    assert event["at"].startswith("ValueError at <module>:")
    assert CANARY not in str(event)


EVERY_LETTER = """
import sys
from tokenauth import logs
logs.configure()
for plane in (range(0xD800), range(0xE000, 0x11000), range(0x1D100, 0x1D200), range(0xE0000, 0xE0200)):
    text = "".join(map(chr, plane))
    logs.log.info("seen", value=text)
    logs.logging.getLogger("other").warning("%s", text)
    logs.log.info("a\x9bb", **{"key": text[:200]})
"""


@pytest.mark.parametrize("terminal", [False, True], ids=["json", "terminal"])
def test_no_letter_of_a_value_controls_a_terminal(terminal: bool) -> None:
    """Neither at once nor later, when the file is displayed."""
    reading, writing = os.openpty() if terminal else os.pipe()
    with subprocess.Popen([sys.executable, "-c", EVERY_LETTER], stderr=writing):
        os.close(writing)
        written = b""
        with suppress(OSError):  # how a terminal reports that its other end is closed
            while part := os.read(reading, 1 << 16):
                written += part
    os.close(reading)
    text = written.decode().replace("\r\n", "\n")
    if terminal:
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # our own colors
    assert text.count("\n") == 12
    assert [letter for letter in text if not letter.isprintable() and letter != "\n"] == []


def test_a_terminal_shows_date_zone_and_all_scopes() -> None:
    script = "from tokenauth import logs; logs.configure(); logs.log.info('named_token_issued', scopes=None)"
    reading, writing = os.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stderr=writing):
        os.close(writing)
        written = b""
        with suppress(OSError):
            while part := os.read(reading, 1 << 16):
                written += part
    os.close(reading)
    text = re.sub(r"\x1b\[[0-9;]*m", "", written.decode())
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ", text)
    assert text.endswith("named_token_issued scopes=(all)\r\n")
