"""What something costs, counted and not timed: the steps of SQLite's machine, and the calls that threads make."""

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import StaticPool

from tokenauth.stores import schema
from tokenauth.stores.batching import Verb
from tokenauth.stores.engine import SqliteTransaction

T = TypeVar("T")


class Direct:
    """A database whose reads and writes are made at once, on one connection, and never committed."""

    def __init__(self, path: str = ":memory:") -> None:
        """Make it, empty."""
        self.connection = sqlite3.connect(path, isolation_level=None)
        self._engine = create_engine("sqlite://", creator=lambda: self.connection, poolclass=StaticPool)
        with self._engine.connect() as db:
            schema.upgrade(db)
            db.commit()

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query."""
        with self._engine.connect() as db:
            return query(db)

    async def write(self, verb: Verb, wish: Any, now: float) -> Any:
        """Make a change."""
        self.connection.execute("BEGIN")
        try:
            return verb(SqliteTransaction(self.connection), [wish])[0]
        finally:
            self.connection.rollback()


async def answer(asked: Awaitable[T]) -> T:
    """Wait for an answer; `asyncio.run` takes nothing less than a coroutine."""
    return await asked


def steps(ask: Callable[[], Awaitable[T]], *connections: sqlite3.Connection) -> tuple[int, T]:
    """Count the steps that SQLite's machine takes for something; return what came of it too."""
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return 0

    for connection in connections:
        connection.set_progress_handler(step, 1)
    try:
        answered = asyncio.run(answer(ask()))
    finally:
        for connection in connections:
            connection.set_progress_handler(None, 1)
    return count, answered


Call = tuple[str, dict[str, Any]]
"""What was called, with what its caller has in its variables at that moment."""


@contextmanager
def calls_of_threads() -> Iterator[list[Call]]:
    """Write down what is called in the threads that begin meanwhile, by Python or out of Python."""
    calls: list[Call] = []

    def note(frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            calls.append((frame.f_code.co_qualname, {}))
        elif event == "c_call":
            calls.append((getattr(called, "__name__", ""), dict(frame.f_locals)))

    threading.setprofile(note)
    try:
        yield calls
    finally:
        threading.setprofile(None)


def hashes(calls: list[Call]) -> list[str]:
    """Say which hashes were computed: the scheme, and all that decides how much work it is."""
    return [_WORK[name](variables) for name, variables in calls if variables and name in _WORK]


_WORK: dict[str, Callable[[dict[str, Any]], str]] = {
    # argon2 is given the whole hash: the work is all but what salt and digest say, and their lengths
    "argon2_verify": lambda given: without_values(bytes(given["hash"]).decode()),
    "hashpw": lambda given: given["config"].decode()[:-22],
    "scrypt": lambda given: "scrypt n={n} r={r} p={p} keylen={keylen} salt=".format(**given) + str(len(given["salt"])),
    "pbkdf2_hmac": lambda given: (
        "pbkdf2 rounds={rounds} keylen={keylen} salt=".format(**given) + str(len(given["salt"]))
    ),
}


def without_values(hashed: str) -> str:
    """Write what decides how much work an argon2 hash is."""
    head, salt, digest = hashed.rsplit("$", 2)
    return f"{head} salt={len(salt)} digest={len(digest)}"
