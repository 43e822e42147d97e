"""Fingerprints of tokens and pools: they differ after each change that a console shows, and otherwise not."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from tests.contract.conftest import token
from tests.support.servers import START
from tokenauth.models import Member, Pool, Reservation
from tokenauth.stores.store import PoolStore, TokenStore

POOL = Pool("p", lease_ttl=60.0, capacity=3)
PHONES = Pool("phones", lease_ttl=60.0, capacity=2, members={"pixel": Member("pixel"), "moto": Member("moto")})

Step = Callable[[PoolStore], Awaitable[object]]

STEPS: Sequence[tuple[str, Step]] = (
    ("generated", lambda pools: pools.generate(POOL, ["a", "b"], START)),
    ("leased", lambda pools: pools.assign(POOL, "ann", START + 1, "ann")),
    ("leased for less time", lambda pools: pools.assign(POOL, "bob", START + 2, "bob", ttl=5.0)),
    ("waits", lambda pools: pools.ask(POOL, "eve", "r", "eve", START + 3, 1, 0, None, (), 30.0)),
    ("left", lambda pools: pools.leave(POOL, ("eve", "r"), START + 3)),
    ("released", lambda pools: pools.release(POOL, "a", START + 3)),
    ("leased again", lambda pools: pools.assign(POOL, "eve", START + 3, "eve")),
    ("kept alive", lambda pools: pools.keep_alive(POOL, "b", START + 4)),
    ("deleted", lambda pools: pools.delete(POOL, "b", START + 4)),
)


async def test_the_fingerprint_of_a_pool_differs_after_each_change(pools: PoolStore) -> None:
    for name, step in STEPS:
        before = await pools.fingerprint(POOL, START + 4)
        assert await pools.fingerprint(POOL, START + 4) == before, name
        await step(pools)
        assert await pools.fingerprint(POOL, START + 4) != before, name


async def test_it_differs_when_a_lease_lapses_and_for_no_other_pool(pools: PoolStore) -> None:
    other = replace(POOL, name="q")
    for pool in (POOL, other):
        await pools.generate(pool, [f"{pool.name}1"], START)
    untouched = await pools.fingerprint(other, START)
    await pools.assign(POOL, "ann", START, "ann")
    assert await pools.fingerprint(other, START) == untouched
    assert await pools.fingerprint(POOL, START + 59) == await pools.fingerprint(POOL, START + 58)
    assert await pools.fingerprint(POOL, START + 60) != await pools.fingerprint(POOL, START + 59)


async def test_it_differs_when_a_reservation_begins_and_ends(pools: PoolStore) -> None:
    await pools.fit(PHONES, ["x", "y"], START)
    free = await pools.fingerprint(PHONES, START)
    await pools.reserve(PHONES, "moto", Reservation(START + 50, None, "battery", "ann"), START)
    reserved = await pools.fingerprint(PHONES, START)
    assert reserved != free
    assert await pools.fingerprint(PHONES, START + 49) == reserved
    assert await pools.fingerprint(PHONES, START + 50) != reserved


@pytest.mark.parametrize("username", ["ann", "O'Neill; --", "жанна", '"', "*"])
async def test_that_of_tokens_differs_for_their_user_only(tokens: TokenStore, username: str) -> None:
    names = [username, "bob"]
    assert await tokens.fingerprints(names, START) == {}
    await tokens.issue(token(1, username="bob"), 0, START)
    nothing = await tokens.fingerprints(names, START)
    assert set(nothing) == {"bob"}
    for number in (2, 3):
        before = (await tokens.fingerprints(names, START)).get(username)
        await tokens.issue(token(number, username=username), 0, START)
        found = await tokens.fingerprints(names, START)
        assert found[username] != before
        assert found["bob"] == nothing["bob"]
    await tokens.revoke(token(2).digest, START)
    assert (await tokens.fingerprints(names, START))[username] != found[username]
    assert await tokens.fingerprints([], START) == {}
