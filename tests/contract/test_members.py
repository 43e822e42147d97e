"""PoolStore: pools whose tokens have names, their reservations, and what a user can lease of them."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.contract.conftest import Place, Places
from tests.contract.test_pools import JUST
from tests.support.servers import START
from tokenauth.errors import TooManyLeases
from tokenauth.models import Grant, LeaseCheck, LeaseRequest, Member, Pool, PoolCounts, PoolToken, Reservation
from tokenauth.stores.store import PoolStore

PIXEL, MOTO, NOKIA = Member("pixel", ("android", "arm")), Member("moto", ("android",)), Member("nokia")


def phones(*members: Member, **more: Any) -> Pool:
    """Return a pool with these members."""
    return replace(
        Pool("phones", lease_ttl=60, capacity=len(members), members={member.name: member for member in members}),
        **more,
    )


PHONES = phones(PIXEL, MOTO, NOKIA)


async def fill(pools: PoolStore, pool: Pool = PHONES, now: float = START) -> None:
    """Add the members of a pool; their values are their names."""
    assert await pools.fit(pool, [f"value of {name}" for name in pool.members], now) == 0


async def lease(
    pools: PoolStore, labels: Sequence[str] = (), now: float = START, user: str | None = "ann", pool: Pool = PHONES
) -> str | None:
    """Lease a member and return its name."""
    token = (await pools.assign(pool, "ci", now, user, labels=labels)).token
    return None if token is None else token.member


async def named(pools: PoolStore, pool: Pool = PHONES, now: float = START) -> dict[str | None, PoolToken]:
    """Return the members by name."""
    return {token.member: token for token in await pools.members(pool, now)}


def until(seconds: float, username: str | None = None, by: str = "ops") -> Reservation:
    """Return a reservation that ends some seconds after START."""
    return Reservation(START + seconds, username, "demo", by)


async def test_a_pool_gets_one_token_for_each_name(pools: PoolStore) -> None:
    assert await pools.fit(PHONES, ["a"], START) == 2
    assert await pools.fit(PHONES, ["b", "c", "d"], START) == 0
    assert await pools.fit(PHONES, ["e", "f", "g"], START) == 0
    assert {name: token.value for name, token in (await named(pools)).items()} == {
        "pixel": "a", "moto": "b", "nokia": "c",
    }  # fmt: skip
    assert await pools.count(PHONES, START) == PoolCounts(3, 0)


async def test_the_member_with_all_labels_is_leased(pools: PoolStore) -> None:
    await fill(pools)
    assert await lease(pools, ["arm", "android"]) == "pixel"
    assert await lease(pools, ["arm"]) is None
    assert await lease(pools, ["android"]) == "moto"
    assert await lease(pools, ["android"]) is None
    assert await lease(pools, []) == "nokia"
    assert await pools.count(PHONES, START) == PoolCounts(0, 3)


async def test_a_name_selects_its_member(pools: PoolStore) -> None:
    await fill(pools)
    assert await lease(pools, ["moto"]) == "moto"
    assert await lease(pools, ["moto"]) is None
    assert await lease(pools, ["pixel", "arm"]) == "pixel"
    assert await lease(pools, ["nokia", "arm"]) is None


async def test_the_member_that_is_free_longest_is_leased(pools: PoolStore) -> None:
    await fill(pools)
    assert [await lease(pools, now=START + number) for number in range(3)] == ["pixel", "moto", "nokia"]
    for number, name in enumerate(("nokia", "pixel", "moto")):
        await pools.release(PHONES, f"value of {name}", START + 10 + number)
    assert await lease(pools, ["android"], START + 20) == "pixel"
    assert [await lease(pools, now=START + 20) for _ in range(2)] == ["nokia", "moto"]


async def test_a_refusal_says_when_a_fitting_member_is_free(pools: PoolStore) -> None:
    await fill(pools)
    assert [await lease(pools, now=START + number) for number in range(3)] == ["pixel", "moto", "nokia"]
    for labels, free_at in (((), START + 60), (["nokia"], START + 62), (["moto"], START + 61)):
        assert (await pools.assign(PHONES, "ci", START + 5, "bob", labels=labels)).next_end == free_at
    await pools.reserve(PHONES, "moto", until(500), START + 5)
    assert (await pools.assign(PHONES, "ci", START + 5, "bob", labels=["moto"])).next_end == START + 500


async def test_members_are_leased_once_by_processes_at_once(place: Place, other: Place) -> None:
    pool = phones(*(Member(f"m{number}", ("even",) if number % 2 == 0 else ()) for number in range(10)))
    await fill(place.pools, pool)
    requests = [(place, other)[number % 2].pools for number in range(14)]
    answers = await asyncio.gather(
        *(lease(pools, ["even"] if number < 8 else [], pool=pool) for number, pools in enumerate(requests))
    )
    leased = [name for name in answers if name is not None]
    assert len(set(leased)) == len(leased) == 10
    even = [name for name in answers[:8] if name is not None]
    assert all(int(name[1:]) % 2 == 0 for name in even)


async def test_a_member_that_is_gone_is_retired_after_its_lease(pools: PoolStore) -> None:
    await fill(pools)
    assert await lease(pools, ["pixel"]) == "pixel"
    smaller = phones(NOKIA)
    await fill(pools, smaller, START + 1)
    assert set(await named(pools, smaller, START + 1)) == {"pixel", "nokia"}
    assert await pools.count(smaller, START + 1) == PoolCounts(1, 1), "nothing is withheld for it"
    kept = await pools.keep_alive(smaller, "value of pixel", START + 30, LeaseCheck(username="ann"))
    assert kept is not None
    assert kept.granted
    assert await lease(pools, pool=smaller, now=START + 30) == "nokia"
    assert await lease(pools, pool=smaller, now=START + 30) is None
    assert set(await named(pools, smaller, START + 90)) == {"nokia"}
    assert await pools.get(smaller, "value of pixel", START + 90) is None
    assert await pools.get(smaller, "value of moto", START + 1) is None, "it was free, and is retired at once"


@pytest.mark.parametrize("leased", [True, False])
async def test_a_member_that_returns_keeps_its_fence(pools: PoolStore, leased: bool) -> None:
    await fill(pools)
    assert await lease(pools, ["pixel"]) == "pixel"
    await fill(pools, phones(NOKIA), START + 1)
    back = START + (2 if leased else 3600)
    await pools.purge(phones(NOKIA), back, 100)
    await fill(pools, PHONES, back)
    token = (await named(pools, PHONES, back))["pixel"]
    assert (token.value, token.fence, token.retired) == ("value of pixel", 1, False)
    assert token.is_leased(back) is leased
    assert await pools.count(PHONES, back) == PoolCounts(3 - leased, int(leased))


async def test_an_unfitted_member_is_not_leased(pools: PoolStore) -> None:
    """Another node may still have the earlier configuration."""
    await fill(pools)
    assert await lease(pools, pool=phones(MOTO)) == "moto"
    assert await lease(pools, pool=phones(MOTO)) is None
    assert await pools.count(phones(MOTO), START) == PoolCounts(0, 1)


async def test_tokens_without_a_name_leave_a_pool_with_members(pools: PoolStore) -> None:
    plain = Pool("phones", lease_ttl=60)
    await pools.generate(plain, ["a", "b", "c"], START)
    held = (await pools.assign(plain, "ci", START, "ann")).token
    assert held is not None
    await fill(pools, PHONES, START + 1)
    assert await pools.get(PHONES, "b", START + 1) is None
    kept = await pools.keep_alive(PHONES, held.value, START + 1)
    assert kept is not None
    assert kept.granted
    assert {await lease(pools, now=START + 1) for _ in range(4)} == {"pixel", "moto", "nokia", None}
    assert await pools.get(PHONES, held.value, START + 61) is None


async def test_a_deleted_member_is_replaced_and_its_fences_go_on(pools: PoolStore) -> None:
    await fill(pools)
    assert await lease(pools, ["pixel"]) == "pixel"
    assert await pools.delete(PHONES, "value of pixel", START + 1, "new")
    assert await pools.get(PHONES, "value of pixel", START + 1) is None
    again = (await pools.assign(PHONES, "ci", START + 1, "bob", labels=["pixel"])).token
    assert again is not None
    assert (again.value, again.fence, again.member) == ("new", 2, "pixel")


async def test_a_reserved_member_is_out_of_the_count(pools: PoolStore) -> None:
    await fill(pools)
    change = await pools.reserve(PHONES, "pixel", until(100), START)
    assert change is not None
    assert change.after == (await named(pools))["pixel"]
    assert PHONES.reservation((await named(pools))["pixel"], START) == until(100)
    assert await pools.count(PHONES, START) == PoolCounts(2, 0)
    assert await lease(pools, ["pixel"]) is None
    assert {await lease(pools) for _ in range(3)} == {"moto", "nokia", None}
    assert await lease(pools, ["pixel"], START + 100 - JUST) is None
    assert await lease(pools, ["pixel"], START + 100) == "pixel", "a reservation ends by itself"


async def test_a_reserved_member_is_leased_by_its_user_only(pools: PoolStore) -> None:
    await fill(pools)
    await pools.reserve(PHONES, "moto", until(100, "bob"), START)
    assert await lease(pools, ["moto"]) is None
    assert await lease(pools, ["moto"], user=None) is None
    assert await lease(pools, user="bob") == "moto", "it comes before those that all can lease"
    await pools.release(PHONES, "value of moto", START + 1)
    assert await lease(pools, ["moto"], START + 1) is None, "it is reserved until its end"


async def test_a_reservation_of_a_leased_member_applies_later(pools: PoolStore) -> None:
    await fill(pools)
    assert await lease(pools, ["moto"]) == "moto"
    await pools.reserve(PHONES, "moto", until(100), START + 1)
    assert await pools.count(PHONES, START + 1) == PoolCounts(2, 1)
    kept = await pools.keep_alive(PHONES, "value of moto", START + 30)
    assert kept is not None
    assert kept.granted
    await pools.release(PHONES, "value of moto", START + 31)
    assert await lease(pools, ["moto"], START + 31) is None
    assert await pools.count(PHONES, START + 31) == PoolCounts(2, 0)


async def test_a_reservation_of_someone_else_is_replaced_on_demand(pools: PoolStore) -> None:
    await fill(pools)
    await pools.reserve(PHONES, "moto", until(100), START)
    refused = await pools.reserve(PHONES, "moto", until(200, by="amy"), START)
    assert refused is not None
    assert not refused.granted
    assert (await named(pools))["moto"].reservation == until(100)
    for reservation, replaces in ((until(300), False), (until(200, by="amy"), True)):
        assert await pools.reserve(PHONES, "moto", reservation, START, replaces) is not None
        assert (await named(pools))["moto"].reservation == reservation
    changed = await pools.reserve(PHONES, "moto", until(400), START + 200)
    assert changed is not None
    assert changed.granted, "the other one has ended"
    assert await pools.reserve(PHONES, "moto", None, START + 200) is not None
    assert await lease(pools, ["moto"], START + 200) == "moto"
    assert await pools.reserve(PHONES, "razr", until(100), START) is None


async def test_a_reservation_survives_a_restart_and_a_lease(places: Places) -> None:
    place = await places.open()
    await fill(place.pools)
    await place.pools.reserve(PHONES, "moto", until(1000, "ann"), START)
    assert await lease(place.pools, ["moto"], START + 1) == "moto"
    await places.close(place, START + 1)
    again = await places.open()
    assert await again.pools.fit(PHONES, [], START + 2) == 0
    token = (await named(again.pools, now=START + 2))["moto"]
    assert (token.username, token.reservation) == ("ann", until(1000, "ann"))


PLAIN = Pool("plain", lease_ttl=60, reclaim_delay=15)


async def test_a_lapsed_token_is_free_after_reclaim_delay(pools: PoolStore) -> None:
    await pools.generate(PLAIN, ["a"], START)
    assert (await pools.assign(PLAIN, "ci", START)).token is not None
    for now in (START + 60, START + 75 - JUST):
        assert await pools.count(PLAIN, now) == PoolCounts(0, 1)
        assert (await pools.assign(PLAIN, "ci", now))[:2] == (None, START + 75)
        kept = await pools.keep_alive(PLAIN, "a", now)
        assert kept is not None
        assert not kept.granted, "the lease is over"
        assert await pools.list_leases(PLAIN, now, (0, 0), 9) == []
        assert [token.value for token in await pools.list_tokens(PLAIN, now, "", 9)] == ["a"]
        await pools.keep_alive(PLAIN, "a", now, include_free=True)
        await pools.keep_alive_free(PLAIN, now, now, 9)
    assert await pools.count(PLAIN, START + 75) == PoolCounts(1, 0)
    assert (await pools.assign(PLAIN, "ci", START + 75)).token is not None


async def test_a_released_token_is_free_at_once(pools: PoolStore) -> None:
    await pools.generate(PLAIN, ["a"], START)
    assert (await pools.assign(PLAIN, "ci", START)).token is not None
    await pools.release(PLAIN, "a", START + 1)
    assert await pools.count(PLAIN, START + 1) == PoolCounts(1, 0)
    assert (await pools.assign(PLAIN, "ci", START + 1)).token is not None


async def test_reclaim_delay_applies_to_members_too(pools: PoolStore) -> None:
    pool = phones(MOTO, reclaim_delay=15)
    await fill(pools, pool)
    assert await lease(pools, pool=pool) == "moto"
    assert await lease(pools, pool=pool, now=START + 75 - JUST) is None
    assert await pools.count(pool, START + 75 - JUST) == PoolCounts(0, 1)
    assert await lease(pools, pool=pool, now=START + 75) == "moto"


async def test_a_token_never_expires_within_reclaim_delay(pools: PoolStore) -> None:
    pool = replace(PLAIN, token_ttl=5)
    await pools.generate(pool, ["a"], START)
    assert (await pools.assign(pool, "ci", START)).token is not None
    assert await pools.purge(pool, START + 75 - JUST, 9) == 0
    token = await pools.get(pool, "a", START + 75 - JUST)
    assert token is not None
    assert pool.expires_at(token) == START + 75
    assert await pools.get(pool, "a", START + 75) is None
    assert await pools.purge(pool, START + 75, 9) == 1


async def test_a_surplus_token_is_withheld_within_reclaim_delay(pools: PoolStore) -> None:
    two, one = (replace(PLAIN, capacity=capacity, prefill=True) for capacity in (2, 1))
    assert await pools.fit(two, ["a", "b"], START) == 0
    for _ in range(2):
        assert (await pools.assign(two, "ci", START)).token is not None
    assert await pools.fit(one, [], START + 61) == 0
    assert await pools.count(one, START + 61) == PoolCounts(0, 2)
    assert await pools.count(one, START + 75) == PoolCounts(1, 0)
    assert (await pools.assign(one, "ci", START + 75)).token is not None
    assert (await pools.assign(one, "ci", START + 75)).token is None


@pytest.mark.parametrize("pool", [replace(PLAIN, per_user=2), phones(PIXEL, MOTO, NOKIA, per_user=2)], ids=str)
async def test_a_user_leases_at_most_per_user_at_once(place: Place, other: Place, pool: Pool) -> None:
    await (fill(place.pools, pool) if pool.members else place.pools.generate(pool, ["a", "b", "c"], START))
    requests = [(place, other)[number % 2].pools.assign(pool, f"h{number}", START, "ann") for number in range(6)]
    answers = await asyncio.gather(*requests)
    tokens = [answer.token for answer in answers if answer.token is not None]
    assert len(tokens) == 2
    assert all(answer.over_limit for answer in answers if answer.token is None)
    assert (await place.pools.assign(pool, "ci", START, "bob")).token is not None, "another user is not affected"
    full = await place.pools.assign(pool, "ci", START, "bob")
    assert (full.token, full.over_limit) == (None, False)
    await place.pools.release(pool, tokens[0].value, START + 1)
    again = [await place.pools.assign(pool, "ci", START + 1, "ann") for _ in range(2)]
    assert [answer.over_limit for answer in again] == [False, True]


async def test_per_user_counts_no_lease_without_a_user(pools: PoolStore) -> None:
    pool = replace(PLAIN, per_user=1)
    await pools.generate(pool, ["a", "b", "c"], START)
    for _ in range(2):
        assert (await pools.assign(pool, "ci", START)).token is not None
    assert (await pools.assign(pool, "ci", START, "ann")).token is not None


async def test_a_lapsed_lease_counts_for_per_user_until_reclaimed(pools: PoolStore) -> None:
    pool = replace(PLAIN, per_user=1)
    await pools.generate(pool, ["a", "b"], START)
    assert (await pools.assign(pool, "ci", START, "ann")).token is not None
    assert (await pools.assign(pool, "ci", START + 75 - JUST, "ann")).over_limit
    assert (await pools.assign(pool, "ci", START + 75, "ann")).token is not None


@pytest.mark.parametrize("pool", [PLAIN, PHONES], ids=["plain", "members"])
async def test_a_lease_keeps_its_own_ttl_and_ends_at_lease_max(pools: PoolStore, pool: Pool) -> None:
    bounded = replace(pool, lease_max=100)
    await (fill(pools, bounded) if pool.members else pools.generate(bounded, ["a"], START))
    token = (await pools.assign(bounded, "ci", START, "ann", ttl=40)).token
    assert token is not None
    assert (token.free_at, token.leased_at, bounded.lease_ends_by(token)) == (START + 40, START, START + 100)
    for now, end in ((30, 70), (65, 100), (99, 100)):
        kept = await pools.keep_alive(bounded, token.value, START + now)
        assert kept is not None
        assert kept.token.free_at == START + end
    late = await pools.keep_alive(bounded, token.value, START + 100)
    assert late is not None
    assert not late.granted


async def ask(pools: PoolStore, id: str, pool: Pool, now: float = START, user: str = "ann", **more: Any) -> object:
    """Ask for a lease, with a place in the line."""
    return await pools.ask(pool, user, id, "ci", now, keep=600, **more)


async def turns(pools: PoolStore, pool: Pool, *keys: tuple[str, str], now: float = START) -> dict[str, list[str]]:
    """Serve those of some requests whose turn it is, as a worker does; return the members that each got."""
    asks = dict.fromkeys(keys, 1)
    may = await pools.may_have_turn(pool, asks, now)
    served = await pools.take_turns(pool, asks, now)
    assert may is bool(served), "a worker looks first"
    return {grant.request.id: [token.member or token.value for token in grant.tokens] for grant in served}


async def test_a_waiting_request_withholds_only_what_it_could_use(pools: PoolStore) -> None:
    await fill(pools)
    assert await lease(pools, ["arm"]) == "pixel"
    assert isinstance(await ask(pools, "first", PHONES, labels=("arm",)), LeaseRequest)
    assert isinstance(await ask(pools, "both", PHONES, labels=("android",), count=2), LeaseRequest)
    assert await lease(pools, ["android"], user="bob") is None, "moto is withheld for the request for both"
    assert await lease(pools, user="bob") == "nokia"
    assert await turns(pools, PHONES, ("ann", "first"), ("ann", "both")) == {}
    await pools.release(PHONES, "value of pixel", START + 1)
    keys = (("ann", "first"), ("ann", "both"))
    assert await turns(pools, PHONES, keys[1], now=START + 1) == {}, "pixel is withheld for the first"
    assert await turns(pools, PHONES, *keys, now=START + 1) == {"first": ["pixel"]}
    await pools.release(PHONES, "value of pixel", START + 2)
    assert await turns(pools, PHONES, *keys, now=START + 2) == {"both": ["moto", "pixel"]}


async def test_a_reservation_passes_those_who_cannot_use_it(pools: PoolStore) -> None:
    pool = phones(MOTO)
    await fill(pools, pool)
    await pools.reserve(pool, "moto", until(100, "bob"), START)
    assert isinstance(await ask(pools, "ann", pool), LeaseRequest)
    assert isinstance(await ask(pools, "bob", pool, user="bob"), Grant)
    await pools.release(pool, "value of moto", START + 1)
    assert await turns(pools, pool, ("ann", "ann"), now=START + 1) == {}
    assert await turns(pools, pool, ("ann", "ann"), now=START + 100) == {"ann": ["moto"]}


@pytest.mark.parametrize("pool", [replace(PLAIN, per_user=2), phones(PIXEL, MOTO, NOKIA, per_user=2)], ids=str)
async def test_a_request_over_per_user_waits_and_withholds_none(pools: PoolStore, pool: Pool) -> None:
    await (fill(pools, pool) if pool.members else pools.generate(pool, ["a", "b", "c"], START))
    granted = await ask(pools, "one", pool)
    assert isinstance(granted, Grant)
    assert isinstance(await ask(pools, "two", pool, count=2), LeaseRequest)
    assert isinstance(await ask(pools, "three", pool), Grant), "a request for fewer may still be served"
    refused = await pools.ask(pool, "ann", "four", "ci", START)
    assert isinstance(refused, TooManyLeases)
    assert isinstance(await ask(pools, "bob", pool, user="bob"), Grant)
    keys = (("ann", "two"),)
    assert await turns(pools, pool, *keys) == {}
    await pools.release(pool, granted.tokens[0].value, START + 1)
    assert await turns(pools, pool, *keys, now=START + 1) == {}
    assert set(await turns(pools, pool, *keys, now=START + 75)) == {"two"}


async def test_a_retired_member_does_not_stop_the_line(pools: PoolStore) -> None:
    await fill(pools)
    assert await lease(pools, ["pixel"]) == "pixel"
    assert await lease(pools, ["moto"]) == "moto"
    smaller = phones(MOTO)
    await fill(pools, smaller)
    assert isinstance(await ask(pools, "ann", smaller), LeaseRequest)
    await pools.release(smaller, "value of moto", START + 1)
    assert await turns(pools, smaller, ("ann", "ann"), now=START + 1) == {"ann": ["moto"]}
