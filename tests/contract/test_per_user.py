"""TokenStore.add: of a user's live tokens no more than `per_user` stay, and it is the oldest that end."""

import asyncio
from collections import Counter
from itertools import chain

import pytest

from tests.contract.conftest import Place, token
from tests.support.servers import START
from tokenauth.stores.store import TokenStore


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_the_oldest_end_when_a_user_has_too_many(tokens: TokenStore, limit: int) -> None:
    added = [token(number, age=10 - number) for number in range(8)]
    for count, one in enumerate(added, 1):
        ended = await tokens.issue(one, limit, START)
        assert [*ended] == [each.digest for each in added[: max(count - limit, 0)][-1:]]
        assert await tokens.list("ann", START, 10) == added[max(count - limit, 0) : count][::-1]
    for gone in added[:-limit]:
        assert await tokens.get(gone.digest) is None


async def test_one_login_ends_a_bounded_number_of_tokens(tokens: TokenStore) -> None:
    """`per_user` was lowered: later logins revoke the rest, and the new tokens always stay."""
    await asyncio.gather(*(tokens.issue(token(number), 0, START) for number in range(1010)))
    for number, left in ((2000, 11), (2001, 2)):
        await tokens.issue(token(number), 2, START)
        assert len(await tokens.list("ann", START, 2000)) == left
        assert await tokens.get(token(number).digest) == token(number)


async def test_of_equal_issued_at_the_new_one_stays(tokens: TokenStore) -> None:
    """Two logins in one instant of a coarse clock: each token that was issued can be used."""
    for number in range(12):
        await tokens.issue(token(number), 1, START)
        assert await tokens.list("ann", START, 10) == [token(number)]
        assert await tokens.get(token(number).digest) == token(number)


async def test_of_equal_issued_at_the_new_one_stays_among_several(tokens: TokenStore) -> None:
    for number in range(12):
        await tokens.issue(token(number), 3, START)
        assert await tokens.get(token(number).digest) == token(number)
        assert len(await tokens.list("ann", START, 10)) == min(number + 1, 3)


async def test_fifty_concurrent_adds_leave_the_newest_five(place: Place, other: Place) -> None:
    added = [token(number, age=50 - number) for number in range(50)]
    await asyncio.gather(*(place.tokens.issue(one, 5, START) for one in added))
    for each in (place, other):
        assert await each.tokens.list("ann", START, 100) == added[:-6:-1]
        assert [one for one in added if await each.tokens.get(one.digest)] == added[-5:]


async def test_fifty_adds_of_two_processes_at_once_leave_five(place: Place, other: Place) -> None:
    """They are counted in the transaction that inserts: no other insert can come between."""
    added = [token(number) for number in range(50)]
    ended = await asyncio.gather(
        *((place, other)[number % 2].tokens.issue(one, 5, START) for number, one in enumerate(added))
    )
    left = await place.tokens.list("ann", START, 100)
    assert Counter(chain.from_iterable(ended)) == Counter({one.digest for one in added} - {one.digest for one in left})
    for each in (place, other):
        assert len(await each.tokens.list("ann", START, 100)) == 5
        assert len([one for one in added if await each.tokens.get(one.digest)]) == 5


async def test_0_is_any_number(tokens: TokenStore) -> None:
    await asyncio.gather(*(tokens.issue(token(number), 0, START) for number in range(300)))
    assert len(await tokens.list("ann", START, 1000)) == 300


async def test_other_users_tokens_do_not_count(tokens: TokenStore) -> None:
    names = ["ann", "bob", "ann ", "Ann"]
    await asyncio.gather(*(tokens.issue(token(number, names[number % 4]), 3, START) for number in range(40)))
    for name in names:
        assert len(await tokens.list(name, START, 100)) == 3


async def test_only_live_tokens_count(tokens: TokenStore) -> None:
    expired = [token(number, life=10) for number in range(3)]
    for one in expired:
        await tokens.issue(one, 0, START)
    now = START + 10
    live = [token(number, age=-10 - number) for number in range(10, 12)]
    for one in live:
        await tokens.issue(one, 2, now)
    assert await tokens.list("ann", now, 10) == live[::-1]
    for one in expired:
        assert await tokens.find(one.id) == one, "only what was live has been ended"


async def test_named_tokens_neither_count_nor_end(tokens: TokenStore) -> None:
    named = [token(number, name=f"job {number}", scopes=()) for number in range(4)]
    logins = [token(number) for number in range(10, 14)]
    for one, login in zip(named, logins, strict=True):
        await tokens.issue(one, 0, START)
        await tokens.issue(login, 2, START)
    assert await tokens.list("ann", START, 100) == [logins[3], named[3], logins[2], *named[2::-1]]


async def test_a_lower_limit_ends_all_that_are_too_many(tokens: TokenStore) -> None:
    await asyncio.gather(*(tokens.issue(token(number, age=20 - number), 0, START) for number in range(20)))
    await tokens.issue(token(20), 3, START)
    assert await tokens.list("ann", START, 100) == [token(20), token(19, age=1), token(18, age=2)]


async def test_concurrent_limits_apply_per_user(tokens: TokenStore) -> None:
    limits = {"ann": 1, "bob": 4, "eve": 0}
    await asyncio.gather(
        *(tokens.issue(token(100 * limit + n, name), limit, START) for name, limit in limits.items() for n in range(9))
    )
    assert {name: len(await tokens.list(name, START, 100)) for name in limits} == {"ann": 1, "bob": 4, "eve": 9}


async def test_each_user_of_a_batch_learns_of_their_own(tokens: TokenStore) -> None:
    names = [f"user{number}" for number in range(20)]
    before = [token(number, username=name) for number, name in enumerate(names)]
    await asyncio.gather(*(tokens.issue(one, 1, START) for one in before))
    after = [token(100 + number, username=name) for number, name in enumerate(names)]
    ended = await asyncio.gather(*(tokens.issue(one, 1, START) for one in after))
    assert [[*digests] for digests in ended] == [[one.digest] for one in before]
