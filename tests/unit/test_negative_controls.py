"""The check of histories works on recorded ones: it reports pools with faults, and not the same pool without."""

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from random import Random
from threading import Event as Signal
from typing import Any, NamedTuple

import pytest

from tests.support.history import Grant, HandTime, History
from tests.support.races import Holder, release_late

TTL, CAPACITY = 10.0, 2


class Faults(NamedTuple):
    """Faults that a pool can have."""

    no_lock: bool = False
    """It selects, and then updates without a lock in between."""
    no_owner_check: bool = False
    """Any client can release any token."""
    no_new_fence: bool = False
    """A lease has the fence of the one before."""
    half_the_time: bool = False
    """A lease ends too early."""


class TinyPool:
    """A pool in a few SQL statements, with its own connection, and optional faults."""

    def __init__(
        self, directory: Path, time: HandTime, faults: Faults, pause: Callable[[], object] = lambda: None
    ) -> None:
        """Run `pause` after reading and before writing."""
        self._db = sqlite3.connect(directory / "pool.db", isolation_level=None, check_same_thread=False)
        self._run("PRAGMA synchronous = OFF")
        self._run("CREATE TABLE IF NOT EXISTS tokens (value PRIMARY KEY, free_at, holder, fence)")
        self._time = time
        self._faults = faults
        self._pause = pause

    def assign(self, holder: str) -> Grant | None:
        now = self._time()
        with self._transaction():
            found = self._run("SELECT value FROM tokens WHERE free_at <= :now ORDER BY free_at LIMIT 1", now=now)
            self._pause()
            if not found:
                return None
            [(value, fence)] = self._run(
                "UPDATE tokens SET free_at = :until, holder = :holder, fence = fence + :step WHERE value = :value"
                " RETURNING value, fence",
                until=now + (TTL / 2 if self._faults.half_the_time else TTL),
                holder=holder,
                step=0 if self._faults.no_new_fence else 1,
                value=found[0][0],
            )
            return Grant(value, fence)

    def keep_alive(self, holder: str, grant: Grant) -> Grant | None:
        now = self._time()
        done = self._run(
            "UPDATE tokens SET free_at = :until"
            " WHERE value = :token AND free_at > :now AND holder = :holder AND fence = :fence RETURNING 1",
            **{**grant._asdict(), "holder": holder, "now": now, "until": now + TTL},
        )
        return grant if done else None

    def release(self, holder: str, grant: Grant) -> Grant | None:
        now = self._time()
        done = self._run(
            "UPDATE tokens SET free_at = :now WHERE value = :token AND free_at > :now"
            " AND (:anyone OR (holder = :holder AND fence = :fence)) RETURNING 1",
            **{**grant._asdict(), "holder": holder, "now": now, "anyone": self._faults.no_owner_check},
        )
        return grant if done else None

    def generate(self) -> Grant | None:
        with self._transaction():
            [(count,)] = self._run("SELECT count(*) FROM tokens")
            self._pause()
            if count >= CAPACITY:
                return None
            insert = "INSERT INTO tokens VALUES (hex(randomblob(16)), :now, NULL, 0) RETURNING value"
            [(value,)] = self._run(insert, now=self._time())
            return Grant(value)

    def delete(self, token: str) -> Grant | None:
        return Grant(token) if self._run("DELETE FROM tokens WHERE value = :token RETURNING 1", token=token) else None

    def close(self) -> None:
        self._db.close()

    def _run(self, statement: str, **values: Any) -> list[Any]:
        return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if not self._faults.no_lock:
            self._run("BEGIN IMMEDIATE")
        yield
        if not self._faults.no_lock:
            self._run("COMMIT")


SOUND = Faults()


Opener = Callable[..., TinyPool]


@pytest.fixture
def tiny_pool(tmp_path: Path, time: HandTime) -> Iterator[Opener]:
    """Return a function that opens the pool on another connection."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(closing(TinyPool(tmp_path, time, *options)))


def interleave(slow: Callable[[Callable[[], object]], object], quick: Callable[[], object], *, locked: bool) -> None:
    """Run `slow`, and `quick` once `slow` has read. `slow` continues when `quick` is done.

    `locked`: then `quick` waits for the lock of `slow`, which soon continues.
    """
    has_read, done = Signal(), Signal()

    def pause() -> None:
        has_read.set()
        done.wait(0.3 if locked else 60)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(slow, pause)
        assert has_read.wait(60)
        second = threads.submit(quick)
        second.add_done_callback(lambda _: done.set())
        first.result()
        second.result()


@pytest.mark.parametrize(
    ("faults", "sentences"), [(Faults(no_lock=True), ["certainly held it until", "2 leases were"]), (SOUND, [])]
)
def test_the_check_detects_a_racy_assign(
    history: History, tiny_pool: Opener, faults: Faults, sentences: list[str]
) -> None:
    quick = tiny_pool(faults)
    history.record("generate", quick.generate)
    interleave(
        lambda pause: Holder("slow", tiny_pool(faults, pause), history, Random(1)).assign(),
        Holder("quick", quick, history, Random(2)).assign,
        locked=faults is SOUND,
    )
    assert_like(history.violations(TTL, 1), sentences)


@pytest.mark.parametrize(("faults", "sentences"), [(Faults(no_lock=True), ["3 tokens certainly existed"]), (SOUND, [])])
def test_the_check_detects_a_racy_generate(
    history: History, tiny_pool: Opener, faults: Faults, sentences: list[str]
) -> None:
    quick = tiny_pool(faults)
    history.record("generate", quick.generate)
    interleave(
        lambda pause: history.record("generate", tiny_pool(faults, pause).generate),
        lambda: history.record("generate", quick.generate),
        locked=faults is SOUND,
    )
    assert_like(history.violations(TTL, CAPACITY), sentences)


@pytest.mark.parametrize(
    ("faults", "sentences"),
    [
        (
            Faults(no_owner_check=True),
            ["and b/1 (fence 2) certainly held it", "for a/1 (fence 1) after b/1 (fence 2) had the token", "2 leases"],
        ),
        (SOUND, []),
    ],
)
def test_the_check_detects_a_release_by_a_stale_holder(
    history: History, time: HandTime, tiny_pool: Opener, faults: Faults, sentences: list[str]
) -> None:
    pool = tiny_pool(faults)
    release_late(history, time, TTL, pool, pool)
    assert_like(history.violations(TTL, 1), sentences)


@pytest.mark.parametrize(
    ("faults", "part"),
    [
        (Faults(no_owner_check=True), "certainly held it until"),
        (Faults(no_owner_check=True), "release was done for"),
        (Faults(no_new_fence=True), "with the same fence"),
        (Faults(half_the_time=True), "certainly held it until"),
        (SOUND, None),
    ],
)
def test_racing_holders_detect_a_faulty_pool(
    history: History, time: HandTime, tiny_pool: Opener, faults: Faults, part: str | None
) -> None:
    """Six holders take turns, so each run is the same."""
    pool, chance = tiny_pool(faults), Random(0)
    made: list[str] = []
    holders = [Holder(f"client {number}", pool, history, Random(number), made) for number in range(6)]
    for _ in range(100):
        for holder in holders:
            holder.step()
            if chance.random() < 0.1:
                time.advance(chance.choice([1, TTL / 2, TTL]))
    found = history.violations(TTL, CAPACITY)
    assert any(part in sentence for sentence in found) if part else not found


def assert_like(found: list[str], expected: list[str]) -> None:
    """Assert that there is one sentence for each part, and no other."""
    assert len(found) == len(expected), found
    assert all(part in sentence for part, sentence in zip(expected, found, strict=True)), found
