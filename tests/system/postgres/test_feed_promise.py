"""Every node refuses a revoked token within the bound, and never accepts a token again that it has refused."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.conftest import token
from tests.support.connections import Connection
from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.support.tcp_proxy import Only, Proxy, every, listener
from tests.system.postgres.feeds import HOUR, database_of, opened
from tests.system.postgres.nodes import connected
from tests.system.postgres.watched import Pair, Watch, check_promise, pair, sleep_through
from tokenauth.clock import MonotonicClock
from tokenauth.stores.postgres import listener as feed
from tokenauth.stores.postgres.listener import BOUND, DatabaseClock


@pytest.fixture(scope="module")
def two(postgres: Cluster, directory: Path) -> Iterator[Pair]:
    """Run two workers. The second connects to the database through a proxy."""
    with pair(postgres, database_of(postgres).rpartition("/")[2], directory) as running:
        yield running


Break = Callable[[Proxy, Only], None]


@pytest.mark.parametrize(
    ("what", "only"),
    [(Proxy.freeze, listener), (Proxy.cut, listener), (Proxy.cut, every)],
    ids=["half-open", "cut", "all-cut"],
)
def test_the_other_node_refuses_within_the_bound(two: Pair, what: Break, only: Only) -> None:
    with Connection(two.here.port) as here, Connection(two.there.port) as there:
        ended, good = here.log_in(), here.log_in()
        assert there.valid(ended)
        assert there.valid(good)
        what(two.network, only)
        with Watch(two.there, [ended, good], 1) as watch:
            here.log_out(ended)
            ended_at = time.monotonic()
            watch.until_asked_after(ended_at + BOUND)
            two.network.heal()
        check_promise(two, watch, {ended: ended_at}, [good])
        assert (True in watch.seen[good].valid) or only is every
        watch.until_valid(good)


def test_a_resumed_node_does_not_trust_its_old_cache(two: Pair) -> None:
    """Requests that arrived meanwhile wait in its sockets, and are answered in the first loop iterations."""
    with Connection(two.here.port) as here:
        ended, good = here.log_in(), here.log_in()
        assert sleep_through(two, [(ended, lambda: here.log_out(ended)), (good, lambda: None)], 20) == [False, True]


# A refused token stays refused.

_SLOW = """
    CREATE SCHEMA slow;
    CREATE FUNCTION slow.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (SELECT FROM pg_listening_channels()) THEN
            PERFORM pg_advisory_lock_shared(7);
            PERFORM pg_advisory_unlock_shared(7);
        END IF;
        RETURN pg_catalog.clock_timestamp();
    END $$;
"""
"""Delays readers of the log, after they have started, while lock 7 is taken."""


async def test_a_recovered_feed_revives_no_refused_token(monkeypatch: pytest.MonkeyPatch, postgres: Cluster) -> None:
    """A node reads the log. Before the answer arrives a token is revoked elsewhere, and refused here."""
    url = database_of(postgres)
    name = url.rpartition("/")[2]
    monkeypatch.setattr(feed, "HEARTBEAT", HOUR)
    monkeypatch.setattr(feed, "BOUND", HOUR)
    async with connected(url) as db, connected(url) as next_db:
        await db.execute(_SLOW)
        await db.execute(f"ALTER DATABASE {name} SET search_path = slow, pg_catalog, public")

        async def waiting() -> int:
            locks = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND objid = 7"
            return int(await db.fetchval(locks))

        async with opened(url) as here, opened(url) as there:
            await here.tokens.issue(token(), 0, START)
            await there.reread()
            assert await there.valid([token()]) == [True]
            await db.execute("SELECT pg_advisory_lock(7)")
            there.listener.invalidate()
            while await waiting() < 1:
                pass
            later = asyncio.create_task(next_db.execute("SELECT pg_advisory_lock(7)"))
            while await waiting() < 2:
                pass
            await here.remove(token())
            refused = await there.valid([token()])
            await db.execute("SELECT pg_advisory_unlock(7)")
            await there.until_current()
            assert (refused, await there.valid([token()])) == ([False], [False])
            await later
            await next_db.execute("SELECT pg_advisory_unlock(7)")
    postgres.drop(name)


# The time.


@given(
    start=st.floats(0, 1e6),
    offset=st.floats(1e9, 2e9),
    answers=st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=1),
)
def test_a_process_lags_the_database_clock_by_one_answer(
    start: float, offset: float, answers: list[tuple[float, float, float]]
) -> None:
    """Each answer: the time until it was asked for, until the database read its clock, and until it arrived."""
    with pytest.MonkeyPatch.context() as patch:
        now = start
        patch.setattr(feed, "boottime", lambda: now)
        clock = DatabaseClock()
        least = float("inf")
        for pause, there, back in answers:
            asked_at = now + pause
            time_there = asked_at + there + offset
            now = asked_at + there + back
            clock.update(time_there, asked_at)
            least = min(least, back)
            behind = now + offset - clock()
            assert -1e-5 <= behind <= least + 1e-5  # rounding errors of large floats


def test_a_database_clock_set_back_moves_no_time_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(feed, "boottime", lambda: now)
    database_clock = DatabaseClock()
    clock = MonotonicClock(database_clock, lambda: now)
    database_clock.update(START, now)
    assert (database_clock(), clock()) == (START, START)
    now += 10
    database_clock.update(START - HOUR, now - 1)
    assert START - HOUR <= database_clock() <= START - HOUR + 1
    assert clock() == START + 10
    now += HOUR
    database_clock.update(START, now - 1)
    assert clock() == START + 10 + HOUR
    database_clock.update(START + 2 * HOUR, now)
    assert clock() == START + 2 * HOUR
