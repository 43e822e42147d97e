"""PoolStore under concurrent callers of one process and of two: each is served as if it were alone."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from tests.contract.conftest import Place
from tests.contract.test_leases import holders
from tests.contract.test_pools import POOL, lease
from tests.support.servers import START
from tokenauth.models import LeaseCheck, PoolCounts, PoolToken
from tokenauth.stores.store import PoolStore


async def test_200_concurrent_leases_take_100_tokens_once_each(place: Place, other: Place) -> None:
    await place.pools.generate(POOL, [f"t{number}" for number in range(100)], START)
    asked = [(place, other)[number % 2].pools.assign(POOL, f"h{number}", START) for number in range(200)]
    leased = await asyncio.gather(*asked)
    taken = {each.token.value: each.token for each in leased if each.token is not None}
    assert Counter(each.token is None for each in leased) == {True: 100, False: 100}
    assert len(taken) == 100
    assert {token.fence for token in taken.values()} == {1}
    assert await holders(other.pools, START) == {value: token.holder for value, token in taken.items()}
    assert [each.token.holder for each in leased if each.token] == [f"h{n}" for n in range(200) if leased[n].token], (
        "each client got its own answer"
    )


async def test_as_many_callers_as_free_tokens_all_get_one(place: Place, other: Place) -> None:
    await place.pools.generate(POOL, [f"t{number}" for number in range(60)], START)
    for fence in range(1, 6):
        now = START + 60 * fence
        asked = ((place, other)[number % 2].pools.assign(POOL, f"h{number}", now) for number in range(60))
        leased = [each.token for each in await asyncio.gather(*asked)]
        assert None not in leased
        assert len({token.value for token in leased if token}) == 60


@pytest.mark.parametrize("operation", ["stale extend", "stale release", "keep free", "replace"])
async def test_a_free_token_is_leased_despite_other_operations(place: Place, other: Place, operation: str) -> None:
    """Whichever of the two comes first, there is a free token all the time."""
    await place.pools.generate(POOL, ["t0"], START)
    refused = 0

    async def touch(number: int) -> None:
        pools, value = other.pools, f"t{number}"
        if operation == "stale extend":
            await pools.keep_alive(POOL, value, START, LeaseCheck("nobody"))
        elif operation == "stale release":
            await pools.release(POOL, value, START, LeaseCheck("nobody"))
        elif operation == "keep free":
            await pools.keep_alive(POOL, value, START, include_free=True)
        else:
            await pools.delete(POOL, value, START, f"t{number + 1}")

    for number in range(40):
        touched = touch(number if operation == "replace" else 0)
        leased, _ = await asyncio.gather(place.pools.assign(POOL, "ann", START), touched)
        refused += leased.token is None
        await place.pools.release_next(POOL, START)
    assert refused == 0, f"{refused} times the only token was free, and nobody got it"


async def test_of_releases_at_once_one_is_done(place: Place, other: Place) -> None:
    await place.pools.generate(POOL, ["t1"], START)
    for fence in range(1, 11):
        await lease(place.pools)
        releases = [each.pools.release(POOL, "t1", START, LeaseCheck("ann", fence)) for each in (place, other, place)]
        released = await asyncio.gather(*releases)
        assert sorted(touched is not None and touched.granted for touched in released) == [False, False, True]


async def test_concurrent_release_nexts_end_distinct_leases(place: Place, other: Place) -> None:
    await place.pools.generate(POOL, [f"t{number}" for number in range(10)], START)
    for _ in range(10):
        await lease(place.pools)
    answers = await asyncio.gather(
        *((place, other)[number % 2].pools.release_next(POOL, START) for number in range(14))
    )
    assert sorted(answers) == [(False, 10)] * 4 + [(True, count) for count in range(1, 11)]
    assert await place.pools.count(POOL, START) == PoolCounts(10, 0)


async def test_concurrent_changes_are_applied_in_order(place: Place) -> None:
    """Within one process those of a kind share a commit; each still sees what the one before it did."""
    await place.pools.generate(POOL, ["t1", "t2"], START)
    await lease(place.pools)
    now = START + 1
    lost, released, again, extended, removed, removed_again = await asyncio.gather(
        place.pools.release(POOL, "t1", now, LeaseCheck("bob")),
        place.pools.release(POOL, "t1", now, LeaseCheck("ann")),
        place.pools.release(POOL, "t1", now, LeaseCheck("ann")),
        place.pools.keep_alive(POOL, "t1", now, LeaseCheck("ann")),
        place.pools.delete(POOL, "t2", now),
        place.pools.delete(POOL, "t2", now),
    )
    assert [touched is not None and touched.granted for touched in (lost, released, again)] == [False, True, False]
    assert extended is not None
    assert extended.granted is (extended.token.holder == "ann"), "before the release, or after it"
    assert (removed and removed.value, removed_again) == ("t2", None)
    assert await place.pools.list_tokens(POOL, now, "", 9) == [PoolToken("p", "t1", now, None, 1)]


async def test_concurrent_leases_use_their_own_pools(pools: PoolStore) -> None:
    terms = [replace(POOL, name=name, lease_ttl=ttl) for ttl, name in enumerate("xyzx", 60)]
    for pool in terms[:3]:
        await pools.generate(pool, [f"{pool.name}{number}" for number in range(2)], START)
    leased = await asyncio.gather(
        *(pools.assign(pool, pool.name, START) for pool in (*terms, terms[1], terms[2], terms[0]))
    )
    assert [each.token and each.token.value for each in leased] == ["x0", "y0", "z0", "x1", "y1", "z1", None]
    assert all(each.token.pool == each.token.holder for each in leased if each.token)
    released = await asyncio.gather(*(pools.release(pool, f"{pool.name}1", START) for pool in terms[:3]))
    assert [touched and touched.token.value for touched in released] == ["x1", "y1", "z1"]
