"""The sweeper under load: it removes 200,000 expired rows without slowing down validation."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.journal import background, fill
from tests.support.servers import START, HandClock, worker, write_config

EXPIRED = 200_000


def test_sweeping_200_000_tokens_slows_no_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    database = tmp_path / "tokenauth.db"
    clock = HandClock(tmp_path / "clock", create=True)
    with worker(config, clock) as server, Connection(server.port) as connection:
        live = [connection.log_in() for _ in range(50)]
        idle = probes(connection, live, 1.0)
        server.stop()
    fill(database, EXPIRED, 1000, START - 90_000, lambda number: int(START) - number)
    clock.advance(60)
    largest = 0
    with worker(config, clock) as server, Connection(server.port) as connection, Connection(server.port) as other:
        swept: list[float] = []
        with background(lambda: live.append(other.log_in())):
            deadline = time.monotonic() + 240
            while not server.events("swept") and time.monotonic() < deadline:
                swept += probes(connection, live[:50], 1.0)
                largest = max(largest, (tmp_path / "tokenauth.db-wal").stat().st_size)
        assert server.events("swept")[0]["rows"] >= EXPIRED
        assert all(map(connection.valid, live))
    with capsys.disabled():
        print(
            f"\np99 of validation: idle {p99(idle):.2f} ms, while sweeping and logging in {p99(swept):.2f} ms", end=" "
        )
        print(f"(longest {max(swept) * 1000:.1f} ms); the write-ahead log grew to {largest >> 20} MiB")
    assert p99(swept) < max(10 * p99(idle), 25)
    assert largest < 64 << 20
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT count(*) FROM tokens").fetchone() == (len(live),)


def probes(connection: Connection, tokens: list[str], seconds: float) -> list[float]:
    """Probe for some time, and return the duration of each probe."""
    taken = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for token in tokens:
            began = time.perf_counter()
            assert connection.valid(token)
            taken.append(time.perf_counter() - began)
    return taken


def p99(seconds: list[float]) -> float:
    """Return the 99th percentile, in milliseconds."""
    return sorted(seconds)[len(seconds) * 99 // 100] * 1000
