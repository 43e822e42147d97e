"""Promise 12: cost does not grow with the number of tokens."""

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import TypeVar

import pytest

from tests.connections import Connection
from tests.journal import fill
from tests.servers import START, HandClock, worker, write_config
from tokenauth.models import Token
from tokenauth.stores import verbs
from tokenauth.stores.transaction import PlainTransaction

T = TypeVar("T")
FEW, MANY = 200, 20_000
LATER = int(START) + 86400


def lengthen_logs(database: Path) -> None:
    """Put revocations and failed logins into a database."""
    some = [(hashlib.sha256(b"%d" % number).digest(), START) for number in range(5000)]
    with closing(sqlite3.connect(database)) as db, db:
        db.executemany("INSERT INTO revocations (digest, at) VALUES (?, ?)", some)
        db.executemany("INSERT INTO failures (key, count, last_at) VALUES (substr(?, 1, 16), 1, ?)", some)


@pytest.fixture(scope="module")
def small_and_large(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Make two databases of very different size, as a server leaves them."""
    configs = {}
    for rows in (FEW, MANY):
        directory = tmp_path_factory.mktemp("size")
        configs[rows] = write_config(directory, "[tokens]\ncache_size = 1")
        clock = HandClock(directory / "clock", create=True)
        with worker(configs[rows], clock) as server:
            server.stop()
        fill(directory / "tokenauth.db", rows, 500, START - 1, lambda _: LATER)
        lengthen_logs(directory / "tokenauth.db")
    return configs


WISHES: dict[Callable[..., object], object] = {
    verbs.add_tokens: verbs.Add(Token(b"n" * 32, "user7", "c", START, LATER), 10, START),
    verbs.remove_tokens: verbs.Remove(hashlib.sha256(b"3").digest(), START),
    verbs.remove_all_tokens: verbs.RemoveAll("user8", None, START),
    verbs.purge_tokens: verbs.Purge(START, 1000),
    verbs.purge_failures: verbs.Purge(START - 1, 1000),
    verbs.purge_revocations: verbs.Purge(START - 1, 1000),
    verbs.count_failures: verbs.Fail([b"k" * 16, b"w" * 16], START, 3600),
    verbs.clear_failures: b"k" * 16,
    verbs.claim: verbs.Claim("sweep", START, START + 30),
}


@contextmanager
def explained(database: sqlite3.Connection) -> Iterator[dict[str, list[str]]]:
    """Explain each statement that is run, with the values that it is run with."""
    plans: dict[str, list[str]] = {}
    seen: list[str] = []
    database.set_trace_callback(seen.append)
    yield plans
    database.set_trace_callback(None)
    for statement in seen:
        if statement.split(maxsplit=1)[0].upper() in {"SELECT", "INSERT", "UPDATE", "DELETE", "WITH"}:
            plans[statement] = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]


@pytest.mark.parametrize("verb", WISHES, ids=lambda verb: verb.__name__)
def test_every_change_finds_its_rows_through_an_index(
    small_and_large: dict[int, Path], verb: Callable[..., object]
) -> None:
    path = small_and_large[MANY].with_name("tokenauth.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN")
        with explained(db) as plans:
            transaction = PlainTransaction(db)
            verb(transaction, [WISHES[verb]])
            verbs.remember(transaction, START)
        db.execute("ROLLBACK")
    assert len(plans) >= 2, "the change itself, and the time of it"
    for statement, plan in plans.items():
        for step in plan:
            # the log is read in the order of its key, and under a limit
            limited = "revocations" in step and "LIMIT" in statement
            assert limited or not reads_a_whole_table(step, statement), f"{step}: {statement}"


def reads_a_whole_table(step: str, statement: str) -> bool:
    """Whether a step of a plan goes through all rows of a table or of an index; sub-queries are read as a whole."""
    verb, name = step.split()[:2]
    tables = {"tokens", "failures", "revocations", "marks"}
    return verb == "SCAN" and (name in tables or any(f"{table} AS {name}" in statement for table in tables))


def test_requests_take_no_longer_with_a_hundred_times_as_many_tokens(small_and_large: dict[int, Path]) -> None:
    """Issue, a probe that is not cached, a probe of an unknown token, a list of mine, revoke; interleaved."""
    times: dict[str, dict[int, list[float]]] = {}
    with ExitStack() as stack:
        connections = {}
        for rows, config in small_and_large.items():
            server = stack.enter_context(worker(config, HandClock(config.with_name("clock"))))
            connections[rows] = stack.enter_context(Connection(server.port))
        keepers = {rows: connection.log_in() for rows, connection in connections.items()}
        for _ in range(40):
            for rows, connection in connections.items():
                for what, taken in steps(connection, keepers[rows]):
                    times.setdefault(what, {}).setdefault(rows, []).append(taken)
    for what, each in times.items():
        few, many = median(each[FEW]), median(each[MANY])
        assert many < few * 2 + 0.0005, f"{what}: {few * 1000:.2f} ms with {FEW}, {many * 1000:.2f} ms with {MANY}"


def steps(connection: Connection, keeper: str) -> Iterator[tuple[str, float]]:
    """Do one of everything; say how long it took."""

    def measure(work: Callable[[], T]) -> tuple[T, float]:
        began = time.perf_counter()
        return work(), time.perf_counter() - began

    token, taken = measure(connection.log_in)
    yield "issue", taken
    assert connection.valid(keeper)  # takes the only place in the cache
    yield "probe", measure(lambda: connection.valid(token))[1]
    yield "unknown", measure(lambda: connection.valid(token[::-1]))[1]
    yield "list", measure(lambda: connection.ask("GET", "/api/tokens", X_Token=keeper))[1]
    yield "revoke", measure(lambda: connection.log_out(token))[1]
