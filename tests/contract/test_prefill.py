"""PoolStore.fit: always `capacity` tokens; no lease ends when more are leased."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tests.contract.conftest import Place, Places
from tests.contract.test_pools import JUST, lease, members
from tests.support.servers import START
from tokenauth.models import LeaseChange, Pool, PoolCounts, PoolToken
from tokenauth.stores.changes import pools as pool_changes
from tokenauth.stores.store import PoolStore

PERMITS = Pool("permits", lease_ttl=60, capacity=5, prefill=True)


def of(capacity: int) -> Pool:
    """Return the pool with another capacity."""
    return replace(PERMITS, capacity=capacity)


async def fill(pools: PoolStore, leased: int, free: int = 0) -> list[str]:
    """Fill a pool, and lease this many tokens, one per second; return their values."""
    pool, values = of(leased + free), [f"t{number}" for number in range(leased + free)]
    assert await pools.fit(pool, values, START) == 0
    for number in range(leased):
        assert await lease(pools, pool, START + number, f"h{number}") == f"t{number}"
    return values[:leased]


async def leased_now(pools: PoolStore, now: float) -> dict[str, PoolToken]:
    """Return the leased tokens."""
    return {token.value: token for token in await pools.list_tokens(PERMITS, now, "", 1000) if token.lease(now)}


async def test_an_empty_pool_is_filled_in_batches(pools: PoolStore) -> None:
    assert await pools.fit(PERMITS, (), START) == 5
    assert await pools.fit(PERMITS, ["a", "b"], START + 1) == 3
    assert await pools.fit(PERMITS, ["c"], START + 2) == 2
    assert await pools.fit(PERMITS, (), START + 2) == 2
    assert await pools.fit(PERMITS, ["d", "e", "f", "g"], START + 3) == 0
    added = dict(zip("abcde", [1, 1, 2, 3, 3], strict=True))
    wanted = [PoolToken("permits", value, START + seconds) for value, seconds in added.items()]
    assert await pools.list_tokens(PERMITS, START + 3, "", 10) == wanted


async def test_a_large_surplus_is_removed_in_batches(pools: PoolStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others write between two steps. Free tokens go first; then those whose leases end first are retired."""
    monkeypatch.setattr(pool_changes, "_STEP", 3)
    await fill(pools, leased=5, free=5)
    small = of(2)
    assert await pools.fit(small, (), START) == -5
    assert await pools.count(small, START) == (2, 5)
    assert await pools.fit(small, ["x"], START) == -2
    assert await pools.fit(small, (), START) == 0
    assert await pools.count(small, START) == (0, 5)
    assert await pools.fit(small, (), START + 10_000) == 0
    assert await pools.count(small, START + 10_000) == (2, 0)


async def test_a_pool_with_its_capacity_is_unchanged(pools: PoolStore) -> None:
    await fill(pools, leased=2, free=3)
    before = await pools.list_tokens(PERMITS, START + 5, "", 10)
    assert await pools.fit(PERMITS, ["x", "y"], START + 5) == 0
    assert await pools.list_tokens(PERMITS, START + 5, "", 10) == before
    assert await pools.generate(PERMITS, ["x"], START + 5) is False


async def test_tokens_of_a_prefilled_pool_never_expire(pools: PoolStore) -> None:
    await fill(pools, leased=2, free=3)
    assert await pools.count(PERMITS, START + 1e9) == PoolCounts(5, 0)
    assert await pools.fit(PERMITS, (), START + 1e9) == 0
    assert await pools.purge(PERMITS, START + 1e9, 10) == 0


async def test_a_larger_capacity_adds_tokens_and_ends_no_lease(pools: PoolStore) -> None:
    await fill(pools, leased=2, free=1)
    before = await leased_now(pools, START + 5)
    assert await pools.fit(PERMITS, ["x", "y", "z"], START + 5) == 0
    assert await leased_now(pools, START + 5) == before
    assert await members(pools, PERMITS, START + 5) == ["t0", "t1", "t2", "x", "y"]


@pytest.mark.parametrize("capacity", [4, 2])
async def test_a_smaller_capacity_takes_free_tokens_first(pools: PoolStore, capacity: int) -> None:
    await fill(pools, leased=2, free=3)
    before = await leased_now(pools, START + 5)
    assert await pools.fit(of(capacity), ["x"], START + 5) == 0
    assert await leased_now(pools, START + 5) == before
    assert await pools.count(of(capacity), START + 5) == PoolCounts(capacity - 2, 2)


@pytest.mark.parametrize("capacity", [3, 1, 0])
async def test_leases_that_are_too_many_go_on(pools: PoolStore, capacity: int) -> None:
    """They are extended and released as before: a holder does not notice that its token is retired."""
    values, pool = await fill(pools, leased=4, free=2), of(capacity)
    before = await leased_now(pools, START + 5)
    assert await pools.fit(pool, ["x"], START + 5) == 0
    after = await leased_now(pools, START + 5)
    assert {value: token._replace(retired=False) for value, token in after.items()} == before
    assert sum(token.retired for token in after.values()) == 4 - capacity
    assert await pools.count(pool, START + 5) == PoolCounts(0, 4)
    for value in values:
        extended = await pools.keep_alive(pool, value, START + 6)
        assert extended == LeaseChange(after[value], after[value]._replace(free_at=START + 66))
    assert (await pools.assign(pool, "more", START + 6))[:2] == (None, START + 66)
    for value in values:
        released = await pools.release(pool, value, START + 7)
        assert released is not None
        assert released.granted
    assert await pools.count(pool, START + 7) == PoolCounts(capacity, 0)
    assert len(await members(pools, pool, START + 7)) == capacity


@pytest.mark.parametrize(
    ("end", "order"),
    [("release", 1), ("release", -1), ("remove", 1), ("remove", -1), ("lapse", 1), ("release_next", 1)],
)
async def test_leases_never_exceed_capacity_with_retired_ones(pools: PoolStore, end: str, order: int) -> None:
    """Whether the retired ones end first or last: each that is out keeps a free one back."""
    values, pool, now = await fill(pools, leased=5), of(2), START + 5
    await pools.fit(pool, (), now)
    for leased, value in zip((4, 3, 2, 1, 0), values[::order], strict=True):
        now = START + 60 + values.index(value) if end == "lapse" else now + 1
        if end == "release":
            await pools.release(pool, value, now)
        elif end == "remove":
            await pools.delete(pool, value, now, f"after {value}")
        elif end == "release_next":
            assert await pools.release_next(pool, now) == (True, max(0, 2 - leased))
        assert await pools.count(pool, now) == PoolCounts(max(0, 2 - leased), leased), value
        if leased >= 2:
            assert await lease(pools, pool, now) is None
    first = await pools.assign(pool, "ann", now, counted=True)
    assert first.token is not None
    assert first.left == 1
    assert [await lease(pools, pool, now) is None for _ in range(2)] == [False, True]


async def test_a_withheld_token_is_leasable_after_the_retired_one(pools: PoolStore) -> None:
    await fill(pools, leased=3)
    pool = of(2)
    await pools.fit(pool, (), START + 5)
    kept_back = [value for value, token in (await leased_now(pools, START + 5)).items() if not token.retired]
    assert kept_back == ["t1", "t2"], "of the leases that are too many, those go first that end first"
    await pools.release(pool, "t2", START + 6)
    assert (await pools.assign(pool, "ann", START + 60 - JUST))[:2] == (None, START + 60), "t0's lease ends then"
    assert await lease(pools, pool, START + 60) == "t2"


ENDS: dict[str, Callable[[PoolStore, Pool, float], Awaitable[object]]] = {
    "release": lambda pools, pool, now: pools.release(pool, "t0", now),
    "remove": lambda pools, pool, now: pools.delete(pool, "t0", now),
    "remove for a successor": lambda pools, pool, now: pools.delete(pool, "t0", now, "x"),
    "lapse": lambda pools, pool, now: asyncio.sleep(0),
}


@pytest.mark.parametrize("end", ENDS)
async def test_a_retired_token_is_gone_with_its_lease(pools: PoolStore, end: str) -> None:
    """It is not replaced, and no sweeper has to run."""
    await fill(pools, leased=2)
    pool = of(1)
    await pools.fit(pool, (), START + 2)
    retired = await pools.get(pool, "t0", START + 2)
    assert retired == PoolToken("permits", "t0", START + 60, "h0", 1, retired=True, leased_at=START)
    now = START + 60 if end == "lapse" else START + 3
    await ENDS[end](pools, pool, now)
    assert await pools.get(pool, "t0", now) is None
    assert await pools.keep_alive(pool, "t0", now, include_free=True) is None
    assert await pools.release(pool, "t0", now) is None
    assert await pools.delete(pool, "t0", now) is None
    assert await members(pools, pool, now) == ["t1"]
    assert await pools.count(pool, now) == PoolCounts(0, 1)
    assert await pools.keep_alive_free(pool, now, now, 10) == 0
    assert await pools.purge(pool, now, 10) == (1 if end in {"lapse", "release"} else 0)
    assert await lease(pools, pool, START + 61) == "t1"


async def test_a_retired_token_is_gone_for_concurrent_callers(pools: PoolStore) -> None:
    await fill(pools, leased=2)
    pool, now = of(1), START + 3
    await pools.fit(pool, (), now)
    released, again, extended = await asyncio.gather(
        pools.release(pool, "t0", now), pools.release(pool, "t0", now), pools.keep_alive(pool, "t0", now)
    )
    assert released is not None
    assert released.granted
    assert again is None
    assert extended is None or extended.token.holder is not None, "after the release, or before it"


async def test_retired_tokens_count_while_they_are_leased(pools: PoolStore) -> None:
    await fill(pools, leased=3)
    await pools.fit(of(1), (), START + 5)
    assert await pools.generate(of(3), ["x"], START + 5) is False
    assert await pools.generate(of(3), ["x"], START + 60) is True


async def test_purge_keeps_a_retired_token_while_leased(pools: PoolStore) -> None:
    await fill(pools, leased=3)
    pool = of(0)
    await pools.fit(pool, (), START + 5)
    assert await pools.purge(pool, START + 60 - JUST, 10) == 0
    assert await pools.purge(pool, START + 61, 1) == 1
    assert await pools.purge(pool, START + 61, 10) == 1
    assert await members(pools, pool, START + 61) == ["t2"]


async def test_a_growing_capacity_keeps_retired_leased_tokens(pools: PoolStore) -> None:
    await fill(pools, leased=5)
    before = await leased_now(pools, START + 5)
    await pools.fit(of(1), (), START + 5)
    assert await pools.fit(of(3), ["x"], START + 5) == 0
    assert await pools.count(of(3), START + 5) == PoolCounts(0, 5)
    assert sum(token.retired for token in (await leased_now(pools, START + 5)).values()) == 2
    assert await pools.fit(of(7), ["x"], START + 5) == 1
    assert await pools.fit(of(7), ["y", "z"], START + 5) == 0
    assert await leased_now(pools, START + 5) == before, "nothing has changed"
    assert await members(pools, of(7), START + 5) == ["t0", "t1", "t2", "t3", "t4", "x", "y"]


async def test_those_whose_lease_is_over_are_not_taken_back(pools: PoolStore) -> None:
    await fill(pools, leased=3)
    await pools.fit(of(0), (), START + 5)
    await pools.release(of(0), "t1", START + 6)
    assert await pools.fit(of(3), ["x", "y", "z"], START + 60) == 0
    assert await members(pools, of(3), START + 60) == ["t2", "x", "y"]


@pytest.mark.parametrize("retired_first", [True, False])
async def test_release_next_ends_the_first_lease_retired_or_not(pools: PoolStore, retired_first: bool) -> None:
    await fill(pools, leased=3)
    pool = of(2)
    await pools.fit(pool, (), START + 5)
    for token in (await leased_now(pools, START + 5)).values():
        if token.retired is not retired_first:
            await pools.keep_alive(pool, token.value, START + 9)
    first, *_ = sorted((await leased_now(pools, START + 9)).values(), key=lambda token: token.free_at)
    assert first.retired is retired_first
    assert await pools.release_next(pool, START + 10) == (True, 0)
    assert first.value not in await leased_now(pools, START + 10)


async def test_a_deleted_token_of_a_full_pool_is_replaced(pools: PoolStore) -> None:
    await fill(pools, leased=2, free=3)
    assert await pools.delete(PERMITS, "t0", START + 5, "x")
    assert await pools.delete(PERMITS, "t4", START + 5, "y")
    assert await members(pools, PERMITS, START + 5) == ["t1", "t2", "t3", "x", "y"]
    assert await pools.count(PERMITS, START + 5) == PoolCounts(4, 1)
    assert await pools.fit(PERMITS, ["z"], START + 5) == 0


async def test_processes_that_fit_at_once_fill_a_pool_once(place: Place, other: Place) -> None:
    pool = of(100)
    fits = [(place, other)[n % 2].pools.fit(pool, [f"{n}-{m}" for m in range(30)], START) for n in range(8)]
    lacking = await asyncio.gather(*fits)
    assert sorted(lacking) == [0, 0, 0, 0, 0, 10, 40, 70]
    for each in (place, other):
        assert await each.pools.count(pool, START) == PoolCounts(100, 0)


async def test_concurrent_fits_and_leases_respect_the_capacity(place: Place, other: Place) -> None:
    await fill(place.pools, leased=5, free=5)
    pool = of(7)
    leases = [(place, other)[n % 2].pools.assign(pool, "ann", START + 5) for n in range(10)]
    leased, *_ = await asyncio.gather(
        asyncio.gather(*leases), place.pools.fit(pool, (), START + 5), other.pools.fit(pool, (), START + 5)
    )
    granted = sum(each.token is not None for each in leased)
    assert await place.pools.count(pool, START + 5) == PoolCounts(max(0, 2 - granted), 5 + granted)
    assert 2 <= granted <= 5


async def test_a_retired_token_stays_retired_after_a_restart(places: Places) -> None:
    place = await places.open()
    await fill(place.pools, leased=4)
    await place.pools.fit(of(1), (), START + 5)
    before = await leased_now(place.pools, START + 6)
    await places.close(place, START + 6)
    again = await places.open()
    assert await leased_now(again.pools, START + 6) == before
    assert await again.pools.fit(of(1), ["x"], START + 6) == 0
    assert await leased_now(again.pools, START + 6) == before
