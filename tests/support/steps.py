"""What something costs, counted and not timed: the steps of SQLite's machine, and the calls that threads make."""

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from tokenauth.models import Failures, Instant, Token
from tokenauth.stores import schema
from tokenauth.stores.engine import Change, OnClockAdvance, Query, Rows, Values
from tokenauth.stores.sqlite.transaction import SqliteTransaction

A = TypeVar("A")
T = TypeVar("T")


class NoFeed:
    """The feed of a database that nothing is revoked in."""

    def is_current(self) -> bool:
        """Return True."""
        return True

    def drain(self) -> Collection[bytes]:
        """Return nothing."""
        return ()

    def add(self, digests: Collection[bytes]) -> None:
        """Do nothing."""

    def invalidate(self) -> None:
        """Do nothing."""


class DirectEngine:
    """What engines for counting have in common: they run forever, and have no cache above them."""

    clock = staticmethod(lambda: 0.0)
    feed = NoFeed()

    async def start(self, on_clock_advance: OnClockAdvance) -> Instant:
        """Do nothing."""
        return 0.0

    async def stop(self, now: Instant) -> None:
        """Do nothing."""

    async def ready(self) -> str | None:
        """Return None."""
        return None

    async def token(self, digest: bytes) -> Token | None:
        """Fail: the engines of the service are asked for tokens."""
        raise NotImplementedError

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Fail: the engines of the service are asked for counts."""
        raise NotImplementedError


class Direct(DirectEngine):
    """A SQLite engine that reads and writes at once, on one connection, and never commits."""

    def __init__(self, path: str = ":memory:") -> None:
        """Create an empty database."""
        self.connection = sqlite3.connect(path, isolation_level=None)
        self._engine = create_engine("sqlite://", creator=lambda: self.connection, poolclass=StaticPool)
        with self._engine.connect() as db:
            schema.upgrade(db)
            db.commit()

    async def read(self, query: Query, values: Values, brief: bool = False) -> Rows:
        """Run a query."""
        with self._engine.connect() as db:
            return db.execute(query, values).all()

    async def apply(self, change: Change[A], and_then: Callable[[SqliteTransaction], None] = lambda _: None) -> A:
        """Make a change, and something more in the same transaction."""
        self.connection.execute("BEGIN")
        try:
            db = SqliteTransaction(self.connection)
            answer = type(change).make(db, [change])[0]
            and_then(db)
            return answer
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
    """Record what is called in threads that start meanwhile, in Python and in C."""
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
