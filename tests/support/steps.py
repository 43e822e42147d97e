"""Costs that are counted instead of timed: the steps of SQLite's virtual machine, and the calls of threads."""

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
    """The feed of a database without revocations."""

    sees_commits = True

    def is_current(self) -> bool:
        return True

    def age(self) -> float:
        return 0.0

    def drain(self) -> Collection[bytes]:
        return ()

    def add(self, digests: Collection[bytes]) -> None:
        pass

    def invalidate(self) -> None:
        pass


class DirectEngine:
    """Base of engines for counting costs. They need no start, and have no cache above them."""

    clock = staticmethod(lambda: 0.0)
    feed = NoFeed()
    identity = "direct"

    async def start(self, on_clock_advance: OnClockAdvance) -> Instant:
        return 0.0

    async def stop(self, now: Instant) -> None:
        pass

    async def ready(self) -> str | None:
        return None

    token_now = None

    async def token(self, digest: bytes) -> Token | None:
        raise NotImplementedError  # tests count these reads with the real engines

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        raise NotImplementedError


class Direct(DirectEngine):
    """A SQLite engine that runs everything immediately, on one connection, and never commits."""

    def __init__(self, path: str = ":memory:") -> None:
        """Create an empty database."""
        self.connection = sqlite3.connect(path, isolation_level=None)
        self._engine = create_engine("sqlite://", creator=lambda: self.connection, poolclass=StaticPool)
        with self._engine.connect() as db:
            schema.upgrade(db, "steps.db")
            db.commit()

    async def read(self, query: Query, values: Values, brief: bool = False) -> Rows:
        with self._engine.connect() as db:
            return db.execute(query, values).all()

    async def apply(self, change: Change[A], and_then: Callable[[SqliteTransaction], None] = lambda _: None) -> A:
        """Apply a change, then call `and_then` in the same transaction."""
        self.connection.execute("BEGIN")
        try:
            db = SqliteTransaction(self.connection)
            answer = type(change).make(db, [change])[0]
            and_then(db)
            return answer
        finally:
            self.connection.rollback()


async def answer(asked: Awaitable[T]) -> T:
    """Turn an awaitable into a coroutine, as `asyncio.run` requires."""
    return await asked


def steps(ask: Callable[[], Awaitable[T]], *connections: sqlite3.Connection) -> tuple[int, T]:
    """Run something. Return the number of steps of SQLite's virtual machine, and the result."""
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
"""The name of a called function, and the local variables of its caller."""


@contextmanager
def calls_of_threads() -> Iterator[list[Call]]:
    """Record the calls of Python and C functions in threads that start meanwhile."""
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
    """Return the hashes that were computed: their scheme and all parameters that determine their cost."""
    return [_WORK[name](variables) for name, variables in calls if variables and name in _WORK]


_WORK: dict[str, Callable[[dict[str, Any]], str]] = {
    # argon2 gets the whole hash: replace salt and digest by their lengths
    "argon2_verify": lambda given: without_values(bytes(given["hash"]).decode()),
    "hashpw": lambda given: given["config"].decode()[:-22],
    "scrypt": lambda given: "scrypt n={n} r={r} p={p} keylen={keylen} salt=".format(**given) + str(len(given["salt"])),
    "pbkdf2_hmac": lambda given: (
        "pbkdf2 rounds={rounds} keylen={keylen} salt=".format(**given) + str(len(given["salt"]))
    ),
}


def without_values(hashed: str) -> str:
    """Return the parameters that determine the cost of an argon2 hash."""
    head, salt, digest = hashed.rsplit("$", 2)
    return f"{head} salt={len(salt)} digest={len(digest)}"
