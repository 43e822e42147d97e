"""Promise 12: cost does not grow with the number of tokens. SQLite's steps are counted; nothing is timed."""

import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.journal import fill
from tests.support.servers import START
from tests.support.steps import Direct, steps
from tokenauth.models import CountUpdate, Token, Use, public_id
from tokenauth.stores.cache import TokenCache
from tokenauth.stores.changes.clock import AcquireDuty, SaveTime, write_clock
from tokenauth.stores.changes.failures import PurgeFailures, RefundFailures, UpdateFailures
from tokenauth.stores.changes.named_tokens import IssueNamed, Rotate
from tokenauth.stores.changes.tokens import Issue, NoteUses, PurgeRevocations, PurgeTokens, Revoke, RevokeAll
from tokenauth.stores.engine import Change
from tokenauth.stores.sqlite.reader import Reader
from tokenauth.stores.sqlite.transaction import SqliteTransaction
from tokenauth.stores.store import TokenStore
from tokenauth.stores.tables import metadata

FEW, MANY = 200, 20_000
EACH = 10
"""Tokens of each user."""


class Opened(NamedTuple):
    """An open database: the engine that changes it, and the reader of the event loop."""

    path: Path
    database: Direct
    reader: Reader

    @property
    def tokens(self) -> TokenStore:
        return TokenStore(self.database, TokenCache(self.database.token, self.database.feed, 0))


def digest(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def log(path: Path, numbers: range, at: float) -> None:
    """Insert revocations and failed logins."""
    some = [(digest(number), at) for number in numbers]
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany("INSERT INTO revocations (digest, at) VALUES (?, ?)", some)
        db.executemany("INSERT INTO failures (key, count, last_at) VALUES (substr(?, 1, 16), 1, ?)", some)


def build(path: Path, count: int) -> Opened:
    """Create a database with `count` tokens, revocations and failed logins. A tenth of each is old.

    One user in 20 has named tokens.
    """
    database = Direct(str(path))
    fill(
        path,
        count,
        count // EACH,
        START - 1,
        lambda number: int(START) + (-1 if number % 100 < EACH else 86400 + number),
    )
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE tokens SET name = 'job ' || (number - 1) WHERE substr(username, 5) % 20 = 15")
    for numbers, at in ((range(count // 10), START - 1000), (range(count // 10, count), START)):
        log(path, numbers, at)
    reader = Reader(str(path), lambda _: None)
    reader.open()
    return Opened(path, database, reader)


@pytest.fixture(scope="module")
def small_and_large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Opened, Opened]]:
    """Return two databases of very different size."""
    small, large = (build(tmp_path_factory.mktemp("size") / "tokens.db", count) for count in (FEW, MANY))
    yield small, large
    for opened in (small, large):
        opened.reader.close()
        opened.database.connection.close()


CHANGES: Sequence[Change[Any]] = [
    Issue(Token.new(b"n" * 32, "user17", "c", START, int(START) + 86400), EACH, now=START),
    IssueNamed(
        Token.new(b"m" * 32, "user17", "c", START, int(START) + 86400, name="nightly"), ["c"], 50, digest(17), now=START
    ),
    Rotate(
        digest(15),
        Token.new(b"r" * 32, "user15", "c", START, int(START) + 86400, name="job 15"),
        ["c"],
        int(START) + 60,
        digest(15),
        now=START,
    ),
    Revoke(digest(13), now=START),
    RevokeAll("user18", None, 100, now=START),
    RevokeAll("user18", None, 100, "login", now=START),
    RevokeAll("user15", None, 100, "named", now=START),
    NoteUses([Use(digest(number), START + 9, int(START) + 99, START, START + 9) for number in (13, 15)], now=START),
    NoteUses([Use(digest(number), START + 8, None, START, START + 9) for number in (14, 16)], now=START),
    PurgeTokens(5, now=START),
    PurgeFailures(START - 1, 5),
    PurgeRevocations(START - 1, 5),
    UpdateFailures(
        [CountUpdate(digest(3)[:16], 1, START - 3600, START, 36.0), CountUpdate(b"w" * 16, 1, at=START)], now=START
    ),
    RefundFailures(digest(3)[:16], None, [(digest(3)[:16], digest(5)[:16])], 0.0, now=START - 10**6),
    AcquireDuty("sweep", START + 30, now=START),
    SaveTime(now=START),
]
"""Every change, of rows that exist in both databases."""


def kind(change: Change[Any]) -> str:
    of = f" of kind {change.kind}" if isinstance(change, RevokeAll) else ""
    return f"{type(change).__name__}{of}"


async def on_loop(read: Callable[[], object]) -> object:
    """Read on the event loop."""
    return read()


PAGE = int(START) + 86400 + 150, digest(150)
"""Where a page of the tokens of all users begins. Each live one has its own end: those with the same are sorted."""

Read = Callable[[Opened], Awaitable[Any]]

READS: dict[str, Read] = {
    "a token": lambda opened: on_loop(lambda: opened.reader.token(digest(13))),
    "an unknown token": lambda opened: on_loop(lambda: opened.reader.token(b"?" * 32) is None),
    "the clock row": lambda opened: on_loop(lambda: opened.reader.clock_row() == 0),
    "the throttle": lambda opened: on_loop(lambda: opened.reader.failures([digest(3)[:16], b"?" * 16])),
    "new revocations": lambda opened: on_loop(opened.reader.drain),
    "a token by its id": lambda opened: opened.tokens.find(public_id(digest(13))),
    "a user's tokens": lambda opened: opened.tokens.list("user13", START, 1000),
    "a user's logins": lambda opened: opened.tokens.list("user13", START, 1000, "login"),
    "a user's named tokens": lambda opened: opened.tokens.list("user15", START, 1000, "named"),
    "a page of all users' tokens": lambda opened: opened.tokens.list_by_end(PAGE, START, 5),
    "the newest tokens of all users": lambda opened: opened.tokens.list(None, START, 5),
}
"""All reads of a running service."""


@contextmanager
def explained(database: sqlite3.Connection) -> Iterator[dict[str, list[str]]]:
    """Collect the query plan of each statement that is run, with its values."""
    plans: dict[str, list[str]] = {}
    seen: list[str] = []
    database.set_trace_callback(seen.append)
    yield plans
    database.set_trace_callback(None)
    for statement in seen:
        if statement.split(maxsplit=1)[0].upper() in {"SELECT", "INSERT", "UPDATE", "DELETE", "WITH"}:
            plans[statement] = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]


@pytest.mark.parametrize("change", CHANGES, ids=kind)
def test_every_change_finds_its_rows_through_an_index(
    small_and_large: tuple[Opened, Opened], change: Change[Any]
) -> None:
    db = small_and_large[1].database.connection
    db.execute("BEGIN")
    with explained(db) as plans:
        transaction = SqliteTransaction(db)
        type(change).make(transaction, [change])
        write_clock(transaction, START)
    db.execute("ROLLBACK")
    assert len(plans) >= 1 + (not isinstance(change, SaveTime)), "must run the change itself and write the clock row"
    for statement, plan in plans.items():
        for step in plan:
            # the log is read in the order of its key, and under a limit
            limited = "revocations" in step and "LIMIT" in statement
            assert limited or not reads_a_whole_table(step, statement), f"{step}: {statement}"


def reads_a_whole_table(step: str, statement: str) -> bool:
    """Whether a step of a plan scans all rows of a table or an index. Scans of sub-queries do not count."""
    operation, name = step.split()[:2]
    tables = set(metadata.tables)
    return operation == "SCAN" and (name in tables or any(f"{table} AS {name}" in statement for table in tables))


@pytest.mark.parametrize("change", CHANGES, ids=kind)
def test_a_change_costs_the_same_among_100_times_the_rows(
    small_and_large: tuple[Opened, Opened], change: Change[Any]
) -> None:
    few, many = (
        steps(partial(database.apply, change, with_the_clock_row), database.connection)[0]
        for _, database, _ in small_and_large
    )
    assert 0 < many <= few + 20, f"{few} steps among {FEW} tokens, {many} among {MANY}"


def with_the_clock_row(db: SqliteTransaction) -> None:
    """Write the clock row, as each commit of the service does."""
    write_clock(db, START)


@pytest.mark.parametrize("what", READS)
def test_a_read_costs_the_same_among_100_times_the_rows(small_and_large: tuple[Opened, Opened], what: str) -> None:
    counts = []
    for opened in small_and_large:
        if what == "new revocations":
            log(opened.path, range(MANY, MANY + 3), START)  # new keys
        count, found = steps(partial(READS[what], opened), opened.database.connection, opened.reader._db)
        assert found, "must find something"
        counts.append(count)
    few, many = counts
    assert 0 < many <= few + 20, f"{few} steps among {FEW} tokens, {many} among {MANY}"
