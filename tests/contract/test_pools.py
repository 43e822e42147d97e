"""PoolStore: which tokens exist, and how each of them ends. How many there may be: `test_capacity.py`."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tests.contract.conftest import Place, Places
from tests.support.servers import START
from tokenauth.errors import StoreUnavailable
from tokenauth.models import Pool, PoolCounts, PoolToken
from tokenauth.stores.store import PoolStore

POOL = Pool("p", lease_ttl=60, token_ttl=240)
OTHER = replace(POOL, name="q")
AGEING = replace(POOL, ages_while_leased=True)
PATIENT = replace(POOL, token_ttl=math.inf)
END = START + 240
"""When a token expires that has been free since START."""

JUST = 0.001
ODD_TEXTS = [" ", "x'; DROP TABLE pool_tokens --", "%", "_", '"', "[1,2]", "жанна", "\U0001f511", "x" * 5000]


async def members(pools: PoolStore, pool: Pool = POOL, now: float = START) -> list[str]:
    """Return the values of a pool's tokens."""
    return [token.value for token in await pools.list_tokens(pool, now, "", 1000)]


async def lease(pools: PoolStore, pool: Pool = POOL, now: float = START, holder: str = "ann") -> str | None:
    """Lease a token; return its value."""
    leased = await pools.assign(pool, holder, now)
    return None if leased.token is None else leased.token.value


async def test_a_generated_token_is_free_with_fence_zero(pools: PoolStore) -> None:
    assert await pools.generate(POOL, ["t1", "t2"], START + 0.123456)
    added = [PoolToken("p", value, START + 0.123456, holder=None, fence=0, retired=False) for value in ("t1", "t2")]
    assert [await pools.get(POOL, one.value, START + 1) for one in added] == added
    assert await pools.list_tokens(POOL, START + 1, "", 10) == added


async def test_text_comes_back_as_it_was_given(pools: PoolStore) -> None:
    for text in ODD_TEXTS:
        odd = replace(POOL, name=text)
        assert await pools.generate(odd, [text], START)
        leased = (await pools.assign(odd, text, START)).token
        assert leased == PoolToken(text, text, START + 60, text, 1, leased_at=START)
        assert await pools.get(odd, text, START) == leased
        assert await pools.list_tokens(odd, START, "", 10) == [leased]
        for change in (pools.keep_alive, pools.release):
            touched = await change(odd, text, START)
            assert touched is not None
            assert touched.granted
            assert touched.token.value == text
        assert await pools.delete(odd, text, START, text + text)
        assert await pools.delete(odd, text + text, START)


async def test_a_token_never_generated_is_absent(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    for value in ("t2", "T1", "t", "t11", "", "%"):
        assert await pools.get(POOL, value, START) is None
        assert await pools.keep_alive(POOL, value, START, include_free=True) is None
        assert await pools.release(POOL, value, START) is None
        assert await pools.delete(POOL, value, START) is None


async def test_one_value_is_never_two_tokens(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    leased = (await pools.assign(POOL, "ann", START)).token
    with pytest.raises(Exception, match=r".") as refusal:
        await pools.generate(POOL, ["t2", "t1"], START + 1)
    assert not isinstance(refusal.value, StoreUnavailable)
    assert await pools.list_tokens(POOL, START + 1, "", 10) == [leased]


async def test_an_impossible_change_spoils_no_other(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t"], START)
    adds = [pools.generate(POOL, [f"t{number}"], START) for number in range(10)]
    adds.insert(4, pools.generate(POOL, ["t10", "t"], START))
    adds.insert(7, pools.generate(POOL, ["\ud800"], START))
    answers = await asyncio.gather(*adds, return_exceptions=True)
    assert isinstance(answers.pop(7), Exception)
    assert isinstance(answers.pop(4), Exception)
    assert answers == [True] * 10
    assert await members(pools) == ["t", *(f"t{number}" for number in range(10))]


async def test_pools_do_not_see_each_others_tokens(pools: PoolStore) -> None:
    names = ["p", "q", "P", "p "]
    all_pools = [replace(POOL, name=name, capacity=3) for name in names]
    for pool in all_pools:
        assert await pools.generate(pool, ["t1", "t2", pool.name], START)
    before = [await pools.list_tokens(pool, START, "", 10) for pool in all_pools]
    first = all_pools[0]
    assert [await lease(pools, first) for _ in range(4)] == ["t1", "t2", "p", None]
    await pools.keep_alive(first, "t1", START + 1)
    await pools.release(first, "t2", START + 1)
    assert await pools.release_next(first, START + 1) == (True, 2)
    assert await pools.keep_alive_free(first, START + 9, START + 9, 10) == 2
    assert await pools.release(first, "q", START) is None
    assert await pools.delete(first, "t1", START + 1)
    assert await pools.purge(first, START + 1000, 10) == 2
    assert await members(pools, first) == []
    assert [await pools.list_tokens(pool, START, "", 10) for pool in all_pools[1:]] == before[1:]
    assert [await pools.count(pool, START) for pool in all_pools[1:]] == [PoolCounts(3, 0)] * 3


TOUCHES: dict[str, Callable[[PoolStore, Pool, float], Awaitable[object]]] = {
    "get": lambda pools, pool, now: pools.get(pool, "t1", now),
    "members": members,
    "lease": lease,
    "extend": lambda pools, pool, now: pools.keep_alive(pool, "t1", now, include_free=True),
    "release": lambda pools, pool, now: pools.release(pool, "t1", now),
    "force_end": lambda pools, pool, now: pools.force_end(pool, "t1", now, "ops"),
    "extend_free": lambda pools, pool, now: pools.keep_alive_free(pool, now, now, 10),
    "remove": lambda pools, pool, now: pools.delete(pool, "t1", now, "t2"),
}


@pytest.mark.parametrize(
    ("pool", "leased", "end"),
    [(POOL, False, END), (POOL, True, END + 60), (AGEING, False, END), (AGEING, True, END)],
    ids=["never leased", "after a lease", "ageing, never leased", "ageing, after a lease"],
)
async def test_an_expired_token_is_absent_from_its_end(pools: PoolStore, pool: Pool, leased: bool, end: float) -> None:
    """The boundary belongs to the end. No sweeper runs: the row is there."""
    for name, touch in TOUCHES.items():
        own = replace(pool, name=name)
        await pools.generate(own, ["t1"], START)
        if leased:
            await lease(pools, own)
        for now in (end, end + 1e6):
            assert not await touch(pools, own, now), name
            assert await pools.count(own, now) == PoolCounts(0, 0), name
        assert await pools.count(own, end - JUST) == PoolCounts(1, 0), name
        assert await touch(pools, own, end - JUST), name


async def test_without_a_token_ttl_a_token_never_expires(pools: PoolStore) -> None:
    await pools.generate(PATIENT, ["t1", "t2"], START)
    far = START + 1e9
    assert await pools.count(PATIENT, far) == PoolCounts(2, 0)
    assert await pools.purge(PATIENT, far, 10) == 0
    assert await lease(pools, PATIENT, far) == "t1"
    assert await members(pools, PATIENT, far + 1e9) == ["t1", "t2"]


async def test_the_current_pool_settings_apply(pools: PoolStore) -> None:
    await pools.generate(PATIENT, ["t1"], START)
    assert await pools.get(replace(POOL, token_ttl=10), "t1", START + 10) is None
    assert await pools.get(replace(POOL, token_ttl=10), "t1", START + 10 - JUST) is not None


async def test_a_count_returns_leasable_and_leased_tokens(pools: PoolStore) -> None:
    assert await pools.count(POOL, START) == PoolCounts(0, 0)
    await pools.generate(POOL, ["a", "b", "c"], START)
    await lease(pools)
    await lease(pools, now=START + 10)
    for now, counts in [(60 - JUST, (1, 2)), (60, (2, 1)), (70, (3, 0)), (240, (2, 0)), (300, (1, 0)), (310, (0, 0))]:
        assert await pools.count(POOL, START + now) == counts, now


async def test_members_are_ordered_by_value_and_come_in_pages(pools: PoolStore) -> None:
    values = ["b", "a", "C", "ä", "aa", "\U0001f511", "~"]
    await pools.generate(POOL, values, START)
    assert await lease(pools) == "b"
    assert await lease(pools) == "a"
    assert await members(pools) == sorted(values)
    pages, after = [], ""
    while page := await pools.list_tokens(POOL, START, after, 3):
        pages.append([token.value for token in page])
        after = page[-1].value
    assert pages == [sorted(values)[:3], sorted(values)[3:6], sorted(values)[6:]]
    assert [token.value for token in await pools.list_tokens(POOL, START, "ab", 2)] == ["b", "~"], (
        "`after` need not exist"
    )
    assert await pools.list_tokens(POOL, START, "", 0) == []


async def test_what_has_expired_takes_no_place_on_a_page(pools: PoolStore) -> None:
    await pools.generate(POOL, ["a", "c", "e"], START)
    await pools.generate(POOL, ["b", "d", "f"], START + 1)
    assert [token.value for token in await pools.list_tokens(POOL, END, "", 2)] == ["b", "d"]


async def test_a_deleted_token_is_gone_free_or_leased(place: Place, other: Place) -> None:
    await place.pools.generate(POOL, ["free", "leased"], START)
    await place.pools.keep_alive(POOL, "free", START + 1, include_free=True)
    assert await lease(place.pools, now=START + 1) == "leased"
    for value in ("free", "leased"):
        assert await place.pools.delete(POOL, value, START + 1)
        assert await place.pools.delete(POOL, value, START + 1) is None
        for pools in (place.pools, other.pools):
            assert await pools.get(POOL, value, START + 1) is None
            assert await pools.keep_alive(POOL, value, START + 1) is None
            assert await pools.release(POOL, value, START + 1) is None
    assert await place.pools.count(POOL, START + 1) == PoolCounts(0, 0)
    assert await lease(place.pools, now=START + 100) is None


async def test_of_removals_at_once_one_finds_the_token(place: Place, other: Place) -> None:
    """Within one process they share a commit; between two they do not."""
    await place.pools.generate(POOL, [f"t{number}" for number in range(10)], START)
    for number in range(10):
        removals = [each.pools.delete(POOL, f"t{number}", START) for each in (place, other, place, other)]
        found = [token.value for token in await asyncio.gather(*removals) if token is not None]
        assert found == [f"t{number}"]


@pytest.mark.parametrize("leased", [False, True], ids=["free", "leased"])
async def test_a_successor_takes_the_place_of_what_was_removed(pools: PoolStore, leased: bool) -> None:
    pool = replace(POOL, capacity=2)
    await pools.generate(pool, ["t1", "t2"], START)
    if leased:
        assert await lease(pools, pool) == "t1"
    deleted = await pools.delete(pool, "t1", START + 5, "t3")
    assert deleted is not None
    assert (deleted.value, deleted.holder is not None) == ("t1", leased)
    assert await pools.get(pool, "t1", START + 5) is None
    assert await pools.get(pool, "t3", START + 5) == PoolToken("p", "t3", START + 5)
    assert await members(pools, pool, START + 5) == ["t2", "t3"]
    assert [await lease(pools, pool, START + 5) for _ in range(3)] == ["t2", "t3", None], "t2 has been free longer"


async def test_deleting_an_absent_token_adds_no_successor(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    assert await pools.delete(POOL, "t9", START, "t2") is None
    assert await members(pools) == ["t1"]


async def test_purge_deletes_what_has_expired_and_nothing_else(pools: PoolStore) -> None:
    for number in range(4):
        await pools.generate(POOL, [f"t{number}"], START + number)
    assert await lease(pools, now=START + 3) == "t0"
    assert await pools.purge(POOL, END + 1 - JUST, 100) == 0
    assert await pools.purge(POOL, END + 2, 100) == 2
    assert await members(pools, PATIENT, END + 2) == ["t0", "t3"]
    assert await pools.purge(POOL, END + 2, 100) == 0


async def test_purge_takes_the_oldest_up_to_its_limit(pools: PoolStore) -> None:
    for number in (3, 1, 4, 2, 0):
        await pools.generate(POOL, [f"t{number}"], START + number)
    late = END + 50
    assert await pools.purge(POOL, late, 0) == 0
    for done in (2, 4):
        assert await pools.purge(POOL, late, 2) == 2
        assert await members(pools, PATIENT, late) == [f"t{number}" for number in range(done, 5)]
    assert await pools.purge(POOL, late, 2) == 1


async def test_everything_is_still_there_after_a_restart(places: Places) -> None:
    place = await places.open()
    await place.pools.generate(POOL, ["a", "b", "c", "d"], START)
    await place.pools.assign(POOL, "ann", START + 1)
    await place.pools.assign(POOL, "bob", START + 2)
    await place.pools.release(POOL, "a", START + 3)
    await place.pools.delete(POOL, "d", START + 4)
    before = await place.pools.list_tokens(POOL, START + 5, "", 10)
    await places.close(place, START + 5)
    again = await places.open()
    assert again.started == START + 5
    assert await again.pools.list_tokens(POOL, START + 5, "", 10) == before
    assert [(token.value, token.fence) for token in before] == [("a", 1), ("b", 1), ("c", 0)]
