"""The sweeper deletes expired pool tokens in batches. Leased and unexpired ones stay."""

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog

import tokenauth.sweeper
from tests.support.servers import HandClock, write_config
from tests.support.services import running
from tokenauth.models import LATE_USE, Identity, LeaseTerms
from tokenauth.pools import Waits
from tokenauth.service import Service, create_service
from tokenauth.settings import loader
from tokenauth.sweeper import BATCH, INTERVAL, Sweeper
from tokenauth.waiting_line import KEPT

TOKEN_TTL = 300
POOLS = f"""
[pools.waiting]
token_ttl = {TOKEN_TTL}
[pools.bounded]
capacity = 5
token_ttl = {TOKEN_TTL}
lease_ttl = 1000
[pools.unlimited]
[pools.permits]
capacity = 3
prefill = true
"""


@pytest.fixture
async def service(tmp_path: Path, hand_clock: HandClock) -> AsyncIterator[Service]:
    async with running(tmp_path, POOLS, hand_clock) as service:
        yield service


@pytest.fixture
def sweeper(service: Service) -> Sweeper:
    """Return a sweeper that is run by the test."""
    return Sweeper(service.store, service.pools, service.clock, forget=3600)


def rows(directory: Path) -> dict[str, int]:
    """Return the number of rows of each pool in the database."""
    with closing(sqlite3.connect(directory / "tokenauth.db")) as db:
        return dict(db.execute("SELECT pool, count(*) FROM pool_tokens GROUP BY pool"))


async def test_expired_tokens_of_every_pool_are_deleted_in_steps(
    service: Service, sweeper: Sweeper, hand_clock: HandClock, tmp_path: Path
) -> None:
    pools = service.pools
    for count in (BATCH, BATCH, 7):
        await pools.generate(pools.find("waiting"), count)
    await pools.generate(pools.find("bounded"), 2)
    await pools.generate(pools.find("unlimited"), 4)
    hand_clock.advance(TOKEN_TTL - 1)
    (late,) = await pools.generate(pools.find("waiting"), 1)
    assert await sweeper.sweep() == 0
    hand_clock.advance(INTERVAL)
    assert await sweeper.sweep() == 2 * BATCH + 7 + 2
    assert rows(tmp_path) == {"waiting": 1, "unlimited": 4, "permits": 3}
    assert (await pools.get(pools.find("waiting"), late)).value == late


async def test_a_round_that_runs_out_of_time_goes_on_at_once(
    service: Service, hand_clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock takes 6 s, so that a round deletes two tokens at most."""
    monkeypatch.setattr(tokenauth.sweeper, "BATCH", 1)
    looks = itertools.count()
    sweeper = Sweeper(service.store, service.pools, lambda: hand_clock() + 6 * next(looks), forget=3600)
    await service.pools.generate(service.pools.find("waiting"), 4)
    hand_clock.advance(TOKEN_TTL + INTERVAL)
    sweeping = asyncio.create_task(sweeper.run())
    async with asyncio.timeout(20):  # a third of INTERVAL
        while "waiting" in rows(tmp_path):  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)
    sweeping.cancel()


async def test_a_leased_token_is_deleted_after_its_token_ttl(
    service: Service, sweeper: Sweeper, hand_clock: HandClock, tmp_path: Path
) -> None:
    pools = service.pools
    bounded = pools.find("bounded")
    await pools.generate(bounded, 2)
    leased = await pools.assign(bounded, "ci")
    hand_clock.advance(1000)
    assert await sweeper.sweep() == 1, "must delete only the token that was not leased"
    assert await pools.count(bounded) == (1, 0)
    hand_clock.advance(TOKEN_TTL - 1)
    assert await sweeper.sweep() == 0
    hand_clock.advance(INTERVAL)
    assert await sweeper.sweep() == 1
    assert "bounded" not in rows(tmp_path)
    assert await pools.count(bounded) == (0, 0)
    assert leased.fence == 1


async def test_of_a_prefilled_pool_only_the_surplus_is_deleted(
    service: Service, sweeper: Sweeper, hand_clock: HandClock, tmp_path: Path
) -> None:
    pools = service.pools
    for _ in range(3):
        await pools.assign(pools.find("permits"), "ci")
    fewer = loader.load(write_config(tmp_path, POOLS.replace("capacity = 3", "capacity = 1")))
    shrunk = create_service(fewer, hand_clock, monotonic=lambda: 0.0)
    async with shrunk.running():
        await shrunk.pools.prefill()
        hand_clock.advance(59)
        assert await sweeper.sweep() == 0
        hand_clock.advance(INTERVAL)
        assert await sweeper.sweep() == 2
        assert rows(tmp_path) == {"permits": 1}
        assert await shrunk.pools.count(shrunk.pools.find("permits")) == (1, 0)


async def test_an_unexpected_error_does_not_end_the_sweeping(
    service: Service, sweeper: Sweeper, hand_clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenauth.sweeper, "INTERVAL", 0.01)
    await service.pools.generate(service.pools.find("waiting"), 1)
    hand_clock.advance(TOKEN_TTL)
    with closing(sqlite3.connect(tmp_path / "tokenauth.db", isolation_level=None)) as db:
        db.execute("CREATE TRIGGER fault BEFORE DELETE ON pool_tokens BEGIN SELECT RAISE(ABORT, 'no'); END")
        with structlog.testing.capture_logs() as logs:
            sweeping = asyncio.create_task(sweeper.run())
            async with asyncio.timeout(20):
                while not any(line["event"] == "unexpected_error" for line in logs):  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(0.01)
        db.execute("DROP TRIGGER fault")
    async with asyncio.timeout(20):
        while "waiting" in rows(tmp_path):
            hand_clock.advance(1)
            await asyncio.sleep(0.01)
    sweeping.cancel()


@pytest.mark.faults  # takes as long as a writer waits for the lock
async def test_a_pool_not_filled_at_the_start_is_filled_later(tmp_path: Path, hand_clock: HandClock) -> None:
    """Another process holds the lock for longer than a start waits."""
    fuller = POOLS.replace("capacity = 3", "capacity = 5")
    service = create_service(loader.load(write_config(tmp_path, fuller)), hand_clock, monotonic=lambda: 0.0)
    await service.store.start()
    with closing(sqlite3.connect(tmp_path / "tokenauth.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        await service.pools.prefill()
        db.execute("ROLLBACK")
    assert rows(tmp_path) == {}
    async with asyncio.timeout(20):
        while await service.store.ready() is not None:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.05)
    await Sweeper(service.store, service.pools, service.clock, forget=3600).sweep()
    assert rows(tmp_path) == {"permits": 5}
    await service.store.stop(hand_clock())


async def test_tokens_are_deleted_when_no_late_use_can_extend_them(
    service: Service, sweeper: Sweeper, hand_clock: HandClock
) -> None:
    issued = await service.tokens.issue("ann", "ann-secret", "", "")
    hand_clock.set(issued.token.expires_at + LATE_USE - 0.1)
    await sweeper.sweep()
    assert await service.store.tokens.find(issued.token.id) == issued.token
    hand_clock.advance(INTERVAL)
    await sweeper.sweep()
    assert await service.store.tokens.find(issued.token.id) is None


async def test_what_lapsed_is_logged_once(service: Service, sweeper: Sweeper, hand_clock: HandClock) -> None:
    pools = service.pools
    pool = pools.find("permits")
    leases = [await pools.assign(pool, f"job {number}", "ann") for number in range(3)]
    waits = await pools.lease(pool, Identity("bob"), LeaseTerms("patient", "mine", wait=0))
    assert isinstance(waits, Waits)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            hand_clock.advance(INTERVAL)
            await sweeper.sweep()
    lapses = [event for event in logs if event["event"] == "lease_lapsed"]
    assert sorted(event["holder"] for event in lapses) == ["job 0", "job 1", "job 2"]
    assert {event["held"] for event in lapses} == {leases[0].free_at - (leases[0].leased_at or 0)}
    [left] = [event for event in logs if event["event"] == "request_left"]
    assert (left["user"], left["holder"], left["waited"]) == ("bob", "patient", KEPT)
    assert pools.counters["permits"].lapsed == 3
    assert (await pools.assign(pool, "next")).fence == 2
    assert pools.counters["permits"].lapsed == 3
