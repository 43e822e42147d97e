"""The frame of the benchmark: rounds, deadline, failures and verdicts. What it measures is not tested here."""

import math
import select
import socket
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from bench import traffic, world
from bench.figures import Figure, Row, Sample, Sampler, measure
from bench.growth import Live, SqliteDatabases
from bench.report import document, table
from bench.traffic import Make
from tokenauth.stores.tables import tokens

FACTS: dict[str, str | int] = {
    "cpu": "x", "cores": 2, "python": "3", "uvicorn": "1", "sqlite": "3", "filesystem": "ext4"
}  # fmt: skip


def figure(values: list[float], bound: float | None = 0.5, at_most: bool = False) -> Figure:
    """Return a figure that measures these values in turn, and then fails."""

    @contextmanager
    def prepare() -> Iterator[Sampler]:
        left = iter(values)

        def sample() -> Sample:
            try:
                return Sample(next(left))
            except StopIteration:
                raise RuntimeError("wrk printed nothing") from None

        yield sample

    return Figure("hot", "hot tokens", bound, "", prepare, at_most)


@pytest.mark.parametrize(
    ("values", "bound", "at_most", "verdict"),
    [
        ([0.1, 0.5, 0.9], 0.5, False, "ok"),
        ([0.1, 0.4, 0.9], 0.5, False, "missed"),
        ([0.1, 0.5, 0.9], 0.5, True, "ok"),
        ([0.1, 0.6, 0.9], 0.5, True, "missed"),
        ([0.1, 0.6, 0.9], None, False, ""),
    ],
)
def test_the_verdict_is_about_the_median(
    values: list[float], bound: float | None, at_most: bool, verdict: str, tmp_path: Path
) -> None:
    row = measure(figure(values, bound, at_most), 3, math.inf, tmp_path)
    assert (row.verdict, row.problem) == (verdict, "")
    assert row.measured == values[1]


def test_a_failed_round_ends_its_row_only(tmp_path: Path) -> None:
    failed, fine = (measure(figure(values), 3, math.inf, tmp_path) for values in ([0.7], [0.6] * 3))
    assert (failed.measured, fine.measured) == (0.7, 0.6)
    text = table(FACTS, [1000.0], [failed, fine])
    assert "hot: 1 of 3 rounds: RuntimeError: wrk printed nothing" in text
    assert document(FACTS, [], [failed])["rows"][0]["problem"] == failed.problem


def test_no_round_starts_after_the_deadline(tmp_path: Path) -> None:
    row = measure(figure([0.7] * 3), 3, 0.0, tmp_path)
    assert row.problem.startswith("0 of 3 rounds: the time was up")
    assert (row.verdict, row.measured) == ("not measured", None)
    assert "not measured" in table(FACTS, [], [row])


def test_a_missed_figure_is_printed_as_missed() -> None:
    row = Row(figure([]), [Sample(0.4, rate=20_000, p99_ms=3.5)])
    assert ">= 0.50" in table(FACTS, [], [row])
    assert "missed" in table(FACTS, [], [row])


def test_a_stall_delays_what_was_planned_meanwhile() -> None:
    """One request is held for 0.2 s. The others are sent afterwards, and measured from when they were due.

    The load generator itself is on time in at least one of ten attempts: a busy machine can delay it.
    """
    late = []
    for _ in range(10):
        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
            thread.submit(_answer_slowly, listener)
            makers: dict[str, Make] = {"probe": lambda: (b"GET / HTTP/1.1\r\n\r\n", _require_ok)}
            found = traffic.run(listener.getsockname()[1], makers, [(0.0, "probe"), (0.0, "probe"), (0.1, "probe")], 1)
        first, second, third = found.milliseconds["probe"]
        assert 200 <= first <= second
        assert third >= 100
        late.append(found.late_p99_ms)
        if late[-1] < 100:
            break
    assert min(late) < 100, "this is the stall of the server, not of the load generator"


def _answer_slowly(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        select.select([], [], [], 0.2)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        while connection.recv(65536):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


def _require_ok(status: int, body: bytes) -> None:
    assert (status, body) == (200, b"ok")


def test_each_live_token_is_revoked_once_and_the_first_never() -> None:
    live = Live(10)
    live.issued += ["a", "b"]
    assert sorted(live.pop() for _ in range(11)) == [*map(world.value, range(1, 10)), "a", "b"]


@pytest.mark.extended
def test_databases_to_grow_have_live_tokens_and_the_schema(tmp_path: Path) -> None:
    databases = SqliteDatabases(tmp_path)
    config = databases.create(1000)
    assert world.counts(config) == (1000, 0)
    assert world.count_leased(config, "large") == 1000
    with closing(sqlite3.connect(world.database(config))) as db:
        (indexes,) = db.execute("SELECT count(*) FROM sqlite_master WHERE name LIKE 'tokens\\_by\\_%' ESCAPE '\\'")
        assert indexes == (len(tokens.indexes),)
        query = "SELECT digest, username, credential, address, user_agent FROM tokens ORDER BY number"
        made = db.execute(query).fetchall()
    assert made == [(*row[:3], *row[5:]) for row in world.token_rows(config, 1000, since=0)]
    assert databases.count_expired(config) == 0
    databases.expire(config, 10)
    assert databases.count_expired(config) == 10
