"""PoolStore: which holder has a token, until when, and what others get. No sweeper runs in these tests."""

import asyncio
from dataclasses import replace

import pytest

from tests.contract.conftest import Place, Places
from tests.contract.test_pools import JUST, POOL, lease, members
from tests.support.servers import START
from tokenauth.models import (
    ANY_LEASE,
    START_OF_LEASES,
    Assignment,
    LeaseChange,
    LeaseCheck,
    LeaseCursor,
    Pool,
    PoolCounts,
    PoolToken,
)
from tokenauth.stores.store import PoolStore

HUGE = [2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**40, 0, -1, -(10**40)]


async def holders(pools: PoolStore, now: float) -> dict[str, str]:
    """Return the holders by token."""
    tokens = await pools.list_tokens(POOL, now, "", 1000)
    return {token.value: lease.holder for token in tokens if (lease := token.lease(now)) is not None}


async def test_a_lapsed_lease_is_free_again(pools: PoolStore) -> None:
    """Time alone frees a token."""
    await pools.generate(POOL, ["t1"], START)
    assert await pools.assign(POOL, "ann", START) == Assignment(
        PoolToken("p", "t1", START + 60, "ann", fence=1, leased_at=START)
    )

    assert (await pools.assign(POOL, "bob", START + 60 - JUST)).token is None
    taken = await pools.assign(POOL, "bob", START + 60)
    assert taken.token == PoolToken("p", "t1", START + 120, "bob", fence=2, leased_at=START + 60)


async def test_a_failed_lease_says_when_the_next_lease_ends(pools: PoolStore) -> None:
    await pools.generate(POOL, ["a", "b", "c"], START)
    for number in range(3):
        await pools.assign(POOL, f"h{number}", START + number)
    assert (await pools.assign(POOL, "ann", START + 9))[:2] == (None, START + 60)
    await pools.keep_alive(POOL, "a", START + 10)
    assert (await pools.assign(POOL, "ann", START + 10))[:2] == (None, START + 61)
    await pools.delete(POOL, "b", START + 10)
    assert (await pools.assign(POOL, "ann", START + 62 - JUST))[:2] == (None, START + 62)
    assert await lease(pools, now=START + 62) == "c"


async def test_without_leases_no_end_is_named(pools: PoolStore) -> None:
    assert (await pools.assign(POOL, "ann", START))[:2] == (None, None)
    await pools.generate(POOL, ["t1"], START)
    assert await lease(pools) == "t1"
    await pools.delete(POOL, "t1", START)
    assert (await pools.assign(POOL, "ann", START))[:2] == (None, None)


async def test_the_longest_free_token_is_leased_first(pools: PoolStore) -> None:
    for number, value in enumerate("bdac"):
        await pools.generate(POOL, [value], START + number)
    assert [await lease(pools, now=START + 5) for _ in range(5)] == ["b", "d", "a", "c", None]
    for number, value in enumerate("acdb"):
        await pools.release(POOL, value, START + 10 + number)
    assert [await lease(pools, now=START + 20 + number) for number in range(2)] == ["a", "c"]
    await pools.keep_alive(POOL, "d", START + 20, include_free=True)
    assert [await lease(pools, now=START + 22 + number) for number in range(2)] == ["b", "d"]


async def test_a_lapsed_token_is_free_since_its_lease_ended(pools: PoolStore) -> None:
    await pools.generate(POOL, ["a", "b"], START)
    assert [await lease(pools, now=START + number) for number in (0, 1)] == ["a", "b"]
    await pools.release(POOL, "b", START + 59)
    await pools.generate(POOL, ["c"], START + 60 + JUST)
    assert [await lease(pools, now=START + 70) for _ in range(3)] == ["b", "a", "c"]


async def test_the_leases_of_a_user_are_listed_by_their_end(pools: PoolStore) -> None:
    """Also those that were retired. Those that have lapsed, and those of others and of other pools, are left out."""
    await pools.generate(POOL, ["a", "b", "c", "d"], START)
    for number, user in enumerate(["ann", "bob", "ann", "ann"]):
        await pools.assign(POOL, "h", START + number, user)
    await pools.generate(replace(POOL, name="q"), ["x"], START)
    await pools.assign(replace(POOL, name="q"), "h", START, "ann")
    await pools.keep_alive(POOL, "c", START + 30)

    async def of_ann(now: float, after: LeaseCursor = START_OF_LEASES) -> list[str]:
        looked = await pools.list_leases_of(POOL, "ann", now, after)
        assert looked.following is None
        return [token.value for token in looked.found]

    assert await of_ann(START + 4) == ["a", "d", "c"]
    assert await of_ann(START + 60) == ["d", "c"]
    (first, _), *_ = await pools.list_leases(POOL, START + 4, START_OF_LEASES, 1)
    assert await of_ann(START + 4, after=first) == ["d", "c"]
    await pools.fit(replace(POOL, capacity=1, prefill=True), (), START + 61)
    assert await of_ann(START + 62) == ["d", "c"]


async def test_only_a_lease_increments_the_fence(places: Places) -> None:
    place, now = await places.open(), START
    await place.pools.generate(POOL, ["t1"], now)
    for fence in range(1, 7):
        leased = (await place.pools.assign(POOL, "ann", now)).token
        assert leased is not None
        assert leased.fence == fence
        if fence % 3 == 0:
            await places.close(place, now)
            place = await places.open()
        extended = await place.pools.keep_alive(POOL, "t1", now + 1)
        assert extended is not None
        assert extended.token.fence == fence
        if fence % 2:
            released = await place.pools.release(POOL, "t1", now + 2)
            assert released is not None
            assert released.token.fence == fence
        free = await place.pools.keep_alive(POOL, "t1", now + 100, include_free=True)
        assert free is not None
        assert free.token.fence == fence
        assert await place.pools.keep_alive_free(POOL, now + 101, now + 101, 9) == 1
        now += 102


async def test_a_counted_lease_returns_the_number_left(pools: PoolStore) -> None:
    await pools.generate(POOL, ["a", "b", "c"], START)
    assert [(await pools.assign(POOL, "ann", START, counted=True)).left for _ in range(4)] == [2, 1, 0, 0]
    await pools.release(POOL, "b", START + 1)
    counted = [pools.assign(POOL, "ann", START + 60, counted=True) for _ in range(5)]
    leased = await asyncio.gather(*counted)
    assert [each.left for each in leased] == [2, 1, 0, 0, 0]
    assert [each.token is not None for each in leased] == [True, True, True, False, False]


HELD = [LeaseCheck(holder, fence) for holder in (None, "ann") for fence in (None, 2)]
LOST = [
    LeaseCheck("bob", None),
    LeaseCheck("bob", 2),
    LeaseCheck("Ann", 2),
    LeaseCheck("", None),
    *(LeaseCheck("ann", n) for n in (1, 3, 0, -2)),
]
LOST += [LeaseCheck(None, number) for number in (1, 3, *HUGE)]


async def touch(
    pools: PoolStore, action: str, now: float, check: LeaseCheck = ANY_LEASE, pool: Pool = POOL
) -> LeaseChange | None:
    """Extend or release the lease of t1."""
    if action == "release":
        return await pools.release(pool, "t1", now, check)
    return await pools.keep_alive(pool, "t1", now, check, include_free=action == "extend include_free")


async def second_lease(pools: PoolStore, pool: Pool) -> PoolToken:
    """Lease t1 to ann for the second time."""
    await pools.generate(pool, ["t1"], START)
    await lease(pools, pool)
    await pools.release(pool, "t1", START)
    leased = (await pools.assign(pool, "ann", START)).token
    assert leased == PoolToken(pool.name, "t1", START + 60, "ann", fence=2, leased_at=START)
    return leased


@pytest.mark.parametrize("action", ["extend", "extend include_free", "release"])
async def test_a_lease_is_changed_only_if_its_check_matches(pools: PoolStore, action: str) -> None:
    """What a check leaves out is not compared; the rest must match."""
    for check in HELD:
        pool = replace(POOL, name=str(check))
        leased = await second_lease(pools, pool)
        free = leased._replace(free_at=START + 1, holder=None, leased_at=None)
        after = free if action == "release" else leased._replace(free_at=START + 61)
        assert await touch(pools, action, START + 1, check, pool) == LeaseChange(leased, after), check
        assert await pools.get(pool, "t1", START + 1) == after
    leased = await second_lease(pools, POOL)
    for check in LOST:
        assert await touch(pools, action, START + 1, check) == LeaseChange(leased, None), check
        assert await pools.get(POOL, "t1", START + 1) == leased


@pytest.mark.parametrize("check", [ANY_LEASE, LeaseCheck("ann"), LeaseCheck("ann", 1), LeaseCheck("bob")], ids=str)
@pytest.mark.parametrize("action", ["extend", "release"])
async def test_a_lease_that_has_ended_has_no_holder(pools: PoolStore, action: str, check: LeaseCheck) -> None:
    await pools.generate(POOL, ["t1"], START)
    leased = (await pools.assign(POOL, "ann", START)).token
    assert leased is not None
    assert await touch(pools, action, START + 60, check) == LeaseChange(leased, None), "at `until` it is over"
    assert await lease(pools, now=START + 60, holder="bob") == "t1"
    if check.holder == "ann":
        touched = await touch(pools, action, START + 61, check)
        assert touched is not None
        assert not touched.granted
        assert touched.token.lease(START + 61) == ("bob", START + 120)
    await pools.release(POOL, "t1", START + 62)
    touched = await touch(pools, action, START + 62, check)
    assert touched == LeaseChange(PoolToken("p", "t1", START + 62, None, fence=2), None)


async def test_an_extension_at_the_last_instant_is_complete(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    await lease(pools)
    now = START
    for _ in range(10):  # far past `token_ttl`: a leased token does not expire
        now += 60 - JUST
        extended = await pools.keep_alive(POOL, "t1", now)
        assert extended is not None
        assert extended.after == PoolToken("p", "t1", now + 60, "ann", 1, leased_at=START)
        assert (await pools.assign(POOL, "bob", now)).token is None
    assert await members(pools, now=now + 300 - JUST) == ["t1"]
    assert await members(pools, now=now + 300) == []


async def test_a_changed_lease_ttl_applies_and_never_shortens(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    await lease(pools)
    for lease_ttl, until in ((5, START + 60), (90, START + 91)):
        extended = await pools.keep_alive(replace(POOL, lease_ttl=lease_ttl), "t1", START + 1)
        assert extended is not None
        assert extended.token.free_at == until


async def test_an_older_now_still_finds_a_released_token(pools: PoolStore) -> None:
    """Two processes read the clock one after the other, and commit the other way round."""
    one = replace(POOL, capacity=1)
    await pools.generate(one, ["t1"], START)
    await pools.assign(one, "ann", START)
    await pools.release(one, "t1", START + 1)
    assert await pools.count(one, START + 0.5) == (1, 0)
    assert not await pools.generate(one, ["t2"], START + 0.5)
    found = await pools.get(one, "t1", START + 0.5)
    assert found is not None
    assert found.lease(START + 0.5) is None
    leased = await pools.assign(one, "bob", START + 0.5)
    assert leased.token is not None
    assert leased.token.holder == "bob"


@pytest.mark.parametrize("lapsed", [False, True])
async def test_include_free_gives_a_free_token_its_full_time(pools: PoolStore, lapsed: bool) -> None:
    await pools.generate(POOL, ["t1"], START)
    if lapsed:
        await lease(pools)
    assert await pools.keep_alive(POOL, "t1", START + 100) is not None
    now = START + 239
    kept = PoolToken("p", "t1", now, holder=None, fence=int(lapsed))
    touched = await pools.keep_alive(POOL, "t1", now, LeaseCheck("nobody", 99), include_free=True)
    assert touched is not None
    assert touched.after == kept
    assert await pools.get(POOL, "t1", now + 240 - JUST) == kept
    assert await pools.get(POOL, "t1", now + 240) is None


async def test_without_include_free_a_free_token_is_not_touched(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    untouched = LeaseChange(PoolToken("p", "t1", START), None)
    assert await pools.keep_alive(POOL, "t1", START + 9) == untouched
    assert await pools.release(POOL, "t1", START + 9) == untouched
    assert await pools.get(POOL, "t1", START + 240) is None


async def test_only_free_tokens_are_extended_in_batches(pools: PoolStore) -> None:
    await pools.generate(POOL, [f"{number}" for number in range(9)], START)
    await lease(pools)
    await lease(pools)
    await pools.keep_alive(POOL, "8", START + 5, include_free=True)
    assert await pools.keep_alive_free(POOL, START, START + 5, 10) == 0, "none was free before that"
    assert await pools.keep_alive_free(POOL, START + 5, START + 6, 0) == 0
    assert [await pools.keep_alive_free(POOL, START + 5, START + 6, 4) for _ in range(3)] == [4, 2, 0]
    tokens = {token.value: token.free_at - START for token in await pools.list_tokens(POOL, START + 6, "", 10)}
    assert tokens == {"0": 60, "1": 60, "8": 5, **{f"{number}": 6 for number in range(2, 8)}}
    assert await pools.keep_alive_free(POOL, START + 61, START + 61, 99) == 9, "lapsed ones are free"
    assert await pools.count(POOL, START + 301 - JUST) == PoolCounts(9, 0)
    assert await pools.keep_alive_free(POOL, START + 301, START + 301, 99) == 0, "what has expired stays so"


async def test_the_lease_that_would_end_first_is_released_next(pools: PoolStore) -> None:
    assert await pools.release_next(POOL, START) == (False, 0)
    await pools.generate(POOL, ["a", "b", "c", "d"], START)
    assert await pools.release_next(POOL, START) == (False, 4)
    for number in range(3):
        await lease(pools, now=START + number)
    await pools.keep_alive(POOL, "a", START + 5)
    gone: list[str] = []
    for count in (2, 3, 4):
        before = await holders(pools, START + 6)
        assert await pools.release_next(POOL, START + 6) == (True, count)
        gone += before.keys() - (await holders(pools, START + 6)).keys()
    assert gone == ["b", "c", "a"]
    assert await pools.release_next(POOL, START + 6) == (False, 4)


async def test_the_next_lease_of_a_user_is_no_other_users(pools: PoolStore) -> None:
    await pools.generate(POOL, [f"t{number}" for number in range(6)], START)
    for number, user in enumerate(["ann", "bob", None, "ann", "bob"]):
        await pools.assign(POOL, f"h{number}", START + number, user)
    ended: list[str] = []
    for user, answer in (
        ("kim", (False, 1)), ("bob", (True, 2)), ("ann", (True, 3)), ("bob", (True, 4)), ("bob", (False, 4)),
        ("ann", (True, 5)), (None, (True, 6)), (None, (False, 6)),
    ):  # fmt: skip
        before = await holders(pools, START + 6)
        assert await pools.release_next(POOL, START + 6, user) == answer
        ended += set(before.values()) - set((await holders(pools, START + 6)).values())
    assert ended == ["h1", "h0", "h4", "h3", "h2"]


async def test_the_next_leases_of_many_at_once_are_their_own(place: Place, other: Place) -> None:
    """They share a commit, and each ends another lease."""
    await place.pools.generate(POOL, [f"t{number}" for number in range(12)], START)
    for number in range(12):
        await place.pools.assign(POOL, f"h{number}", START + number, ["ann", "bob", "kim"][number % 3])
    users = ["ann", "bob", "ann", None, "ann", "bob", "eve", "bob"]
    answers = await asyncio.gather(
        *((place, place, other)[at % 3].pools.release_next(POOL, START + 12, user) for at, user in enumerate(users))
    )
    left = [lease.holder for token in await place.pools.list_tokens(POOL, START + 12, "", 99)
            if (lease := token.lease(START + 12)) is not None]  # fmt: skip
    assert sum(done for done, _ in answers) == 12 - len(left) == 7
    assert not answers[6][0], "she has none"
    assert {"h2", "h5", "h8", "h11"} - set(left) <= {"h2"}, "only a release without a user can end one of kim's"


async def test_a_lease_that_has_lapsed_is_not_the_next(pools: PoolStore) -> None:
    await pools.generate(POOL, ["a", "b"], START)
    await lease(pools)
    await lease(pools, now=START + 1)
    assert await pools.release_next(POOL, START + 60) == (True, 2)
    assert await holders(pools, START + 60) == {}
    assert await pools.release_next(POOL, START + 60) == (False, 2)
