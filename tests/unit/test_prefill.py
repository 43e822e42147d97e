"""A pool with `prefill` always has as many tokens as its capacity, also after a change of the capacity."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import structlog

from tests.support.servers import HandClock, write_config
from tokenauth.errors import LeaseLost, NoFreeToken, PoolFull, UnknownToken
from tokenauth.models import Pool
from tokenauth.pools import Pools
from tokenauth.service import create_service
from tokenauth.settings import loader

LEASE_TTL = 60


def permits(capacity: int, name: str = "permits", prefill: bool = True) -> str:
    """Return the table of a pool."""
    return f"[pools.{name}]\ncapacity = {capacity}\nlease_ttl = {LEASE_TTL}\nprefill = {str(prefill).lower()}\n"


class Home:
    """A database on which services with different settings are started."""

    def __init__(self, directory: Path) -> None:
        self.clock = HandClock(directory / "clock", create=True)
        self._directory = directory

    @asynccontextmanager
    async def open(self, pools: str) -> AsyncIterator[Pools]:
        """Start a service, without HTTP and sweeper."""
        settings = loader.load(write_config(self._directory, pools))
        service = create_service(settings, self.clock, monotonic=lambda: 0.0)
        async with service.running():
            await service.pools.prefill()
            yield service.pools


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


async def values(pools: Pools, name: str = "permits") -> set[str]:
    """Return the tokens of a pool."""
    return {token.value for token in await pools.list_tokens(pools.find(name))}


async def lease(pools: Pools, pool: Pool, count: int) -> list[str]:
    """Lease `count` tokens."""
    return [(await pools.assign(pool, "ci")).value for _ in range(count)]


async def check(pools: Pools, pool: Pool, leased: int) -> None:
    """Assert that capacity minus leased tokens are free; none if more are leased than the capacity."""
    available = max(0, (pool.capacity or 0) - leased)
    assert await pools.count(pool) == (available, leased)
    for token in await lease(pools, pool, available):
        await pools.release(pool, token)
    taken = await lease(pools, pool, available)
    with pytest.raises(NoFreeToken):
        await pools.assign(pool, "one too many")
    with pytest.raises(PoolFull):
        await pools.generate(pool, 1)
    for token in taken:
        await pools.release(pool, token)


async def test_a_lapse_is_logged_before_its_token_is_deleted(home: Home) -> None:
    async with home.open(permits(2)) as pools:
        await lease(pools, pools.find("permits"), 2)
    home.clock.advance(LEASE_TTL)
    with structlog.testing.capture_logs() as logs:
        async with home.open(permits(0)) as pools:
            assert await values(pools) == set()
            assert pools.counters["permits"].lapsed == 2
    assert [event["held"] for event in logs if event["event"] == "lease_lapsed"] == [LEASE_TTL] * 2


@pytest.mark.parametrize("capacity", [0, 1, 7])
async def test_a_start_fills_a_pool_and_a_restart_keeps_it(home: Home, capacity: int) -> None:
    async with home.open(permits(capacity)) as pools:
        before = await values(pools)
        assert len(before) == capacity
        await check(pools, pools.find("permits"), 0)
    home.clock.advance(10 * 365 * 86400)
    async with home.open(permits(capacity)) as pools:
        assert await values(pools) == before, "must never expire"


async def test_a_pool_larger_than_one_batch_is_filled_too(home: Home) -> None:
    async with home.open(permits(20_001)) as pools:
        assert await pools.count(pools.find("permits")) == (20_001, 0)


async def test_processes_that_start_at_once_fill_a_pool_once(home: Home) -> None:
    async with AsyncExitStack() as stack:
        starts = (stack.enter_async_context(home.open(permits(100))) for _ in range(4))
        started = await asyncio.gather(*starts)
        assert {await pools.count(pools.find("permits")) for pools in started} == {(100, 0)}


async def test_a_prefilled_pool_refuses_to_generate(home: Home) -> None:
    async with home.open(permits(2)) as pools:
        pool = pools.find("permits")
        await lease(pools, pool, 1)
        await check(pools, pool, 1)
        home.clock.advance(LEASE_TTL)
        await check(pools, pool, 0)


@pytest.mark.parametrize("leased", [False, True])
async def test_a_deleted_token_is_replaced_by_a_free_one(home: Home, leased: bool) -> None:
    async with home.open(permits(3)) as pools:
        pool = pools.find("permits")
        before = await values(pools)
        deleted = (await pools.assign(pool, "ci")).value if leased else min(before)
        await pools.delete(pool, deleted)
        (new,) = await values(pools) - before
        assert await values(pools) == before - {deleted} | {new}
        for touch in (pools.keep_alive, pools.release, pools.delete, pools.get):
            with pytest.raises(UnknownToken):
                await touch(pool, deleted)
        assert (await pools.get(pool, new)).fence == 0
        await check(pools, pool, 0)


async def test_a_grown_pool_leases_more_and_keeps_its_leases(home: Home) -> None:
    async with home.open(permits(2)) as pools:
        before = await values(pools)
        (leased,) = await lease(pools, pools.find("permits"), 1)
    async with home.open(permits(5)) as pools:
        pool = pools.find("permits")
        assert await values(pools) > before
        await check(pools, pool, 1)
        assert (await pools.keep_alive(pool, leased)).fence == 1


CAPACITY = 4
CASES = [(leased, shrunk) for leased in range(CAPACITY + 1) for shrunk in range(CAPACITY)]


@pytest.mark.parametrize("end", ["released", "lapsed"])
async def test_a_shrunken_pool_waits_for_its_leases_to_end(home: Home, end: str) -> None:
    """From any number of leases to any capacity, in any order of the ends."""
    chance = Random(1)
    out: dict[str, list[str]] = {}
    async with home.open("".join(permits(CAPACITY, f"p{leased}-{shrunk}") for leased, shrunk in CASES)) as pools:
        for leased, shrunk in CASES:
            out[f"p{leased}-{shrunk}"] = await lease(pools, pools.find(f"p{leased}-{shrunk}"), leased)
    for _ in range(2):  # a restart with the same settings changes nothing
        async with home.open("".join(permits(shrunk, f"p{leased}-{shrunk}") for leased, shrunk in CASES)) as pools:
            for name, leases in out.items():
                pool = pools.find(name)
                await check(pools, pool, len(leases))
                assert [(await pools.keep_alive(pool, value)).fence for value in leases] == [1] * len(leases)
    async with home.open("".join(permits(shrunk, f"p{leased}-{shrunk}") for leased, shrunk in CASES)) as pools:
        for _ in range(CAPACITY):
            home.clock.advance(LEASE_TTL / 2)
            for name, leases in out.items():
                pool = pools.find(name)
                chance.shuffle(leases)
                if leases and end == "released":
                    await pools.release(pool, leases.pop())
                for value in leases:
                    await pools.keep_alive(pool, value)
                await check(pools, pool, len(leases))
        home.clock.advance(LEASE_TTL)
        for name in out:
            assert len(await values(pools, name)) == pools.find(name).capacity
            await check(pools, pools.find(name), 0)


async def test_a_surplus_token_is_gone_when_its_lease_ends(home: Home) -> None:
    async with home.open(permits(2)) as pools:
        leases = await lease(pools, pools.find("permits"), 2)
    async with home.open(permits(0)) as pools:
        pool = pools.find("permits")
        assert await values(pools) == set(leases)
        await pools.release(pool, leases[0])
        home.clock.advance(LEASE_TTL)
        for value in leases:
            with pytest.raises(UnknownToken):
                await pools.keep_alive(pool, value)
        assert await values(pools) == set()
    async with home.open(permits(2)) as pools:
        assert await values(pools) & set(leases) == set()


@pytest.mark.parametrize("capacity", [2, 3, 4, 6])
async def test_a_pool_that_grows_again_keeps_its_surplus(home: Home, capacity: int) -> None:
    async with home.open(permits(4)) as pools:
        leases = await lease(pools, pools.find("permits"), 4)
    async with home.open(permits(1)) as pools:
        pool = pools.find("permits")
        await check(pools, pool, 4)
    async with home.open(permits(capacity)) as pools:
        pool = pools.find("permits")
        await check(pools, pool, 4)
        while leases:
            await pools.release(pool, leases.pop())
            await check(pools, pool, len(leases))
        assert len(await values(pools)) == capacity


async def test_deleting_a_surplus_token_frees_no_place(home: Home) -> None:
    async with home.open(permits(4)) as pools:
        leases = await lease(pools, pools.find("permits"), 4)
    async with home.open(permits(2)) as pools:
        pool = pools.find("permits")
        while leases:
            await pools.delete(pool, leases.pop())
            await check(pools, pool, len(leases))
        assert len(await values(pools)) == 2


@pytest.mark.parametrize("in_reverse", [False, True])
async def test_available_means_leasable_without_prefill_too(home: Home, in_reverse: bool) -> None:
    """Also while surplus tokens are still leased."""
    async with home.open(permits(4)) as pools:
        leases = await lease(pools, pools.find("permits"), 4)
    async with home.open(permits(2)):
        pass
    async with home.open(permits(2, prefill=False)) as pools:
        pool = pools.find("permits")
        for released, value in enumerate(reversed(leases) if in_reverse else leases, 1):
            await pools.release(pool, value)
            available, leased = await pools.count(pool)
            assert (leased, available) == (4 - released, max(0, released - 2))
            taken = await lease(pools, pool, available)
            with pytest.raises(NoFreeToken):
                await pools.assign(pool, "one too many")
            for token in taken:
                await pools.release(pool, token)


async def test_prefill_keeps_the_tokens_generated_before(home: Home) -> None:
    async with home.open(permits(9, prefill=False)) as pools:
        made = await pools.generate(pools.find("permits"), 3)
        (leased,) = await lease(pools, pools.find("permits"), 1)
    async with home.open(permits(5)) as pools:
        assert await values(pools) > set(made)
        await check(pools, pools.find("permits"), 1)
        with pytest.raises(LeaseLost):
            await pools.release(pools.find("permits"), (set(made) - {leased}).pop())
