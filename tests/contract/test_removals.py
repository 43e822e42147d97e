"""TokenStore: every process refuses a revoked token in the next iteration of its event loop, cached or not."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.contract.conftest import Place, Places, token
from tests.support.servers import START
from tokenauth.errors import MustWait
from tokenauth.models import Token
from tokenauth.stores.cache import TokenCache
from tokenauth.stores.engine import Engine
from tokenauth.stores.store import TokenStore

ROUNDS = pytest.mark.parametrize("rounds", [30, pytest.param(300, marks=pytest.mark.faults)])
"""How often to repeat what a cache could get wrong."""


async def fill(place: Place, number: int, *, one_user: bool = False) -> list[Token]:
    """Add one token for each round of a test."""
    added = [token(n, "ann" if one_user else f"user{n}", age=number - n) for n in range(number)]
    await asyncio.gather(*(place.tokens.issue(one, 0, START) for one in added))
    return added


async def warm(tokens: TokenStore, known: Sequence[Token]) -> None:
    """Get tokens, so that they are cached."""
    for one in known:
        assert await tokens.get(one.digest) == one


@asynccontextmanager
async def busy(place: Place, tokens: Sequence[Token]) -> AsyncIterator[None]:
    """Get tokens in every iteration of the event loop meanwhile, so that the cache is always hot."""

    async def read() -> None:
        while True:
            for one in tokens:
                await place.tokens.get(one.digest)
                await asyncio.sleep(0)

    reader = asyncio.create_task(read())
    yield
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)


@ROUNDS
async def test_the_other_process_sees_a_removal_at_once(place: Place, other: Place, rounds: int) -> None:
    added = await fill(place, rounds)
    await warm(other.tokens, added)
    async with busy(other, added[-5:]):
        for one in added:
            assert await other.tokens.get(one.digest) == one
            assert await place.tokens.revoke(one.digest, START)
            assert await other.tokens.get(one.digest) is None
            assert await place.tokens.get(one.digest) is None


@ROUNDS
async def test_the_other_process_sees_revoke_all_at_once(place: Place, other: Place, rounds: int) -> None:
    added = await fill(place, rounds)
    await warm(other.tokens, added)
    async with busy(other, added[-5:]):
        for one in added:
            assert await place.tokens.revoke_all(one.username, START) == 1
            assert await other.tokens.get(one.digest) is None


@ROUNDS
async def test_the_other_process_sees_an_eviction_at_once(place: Place, other: Place, rounds: int) -> None:
    previous = token(0, age=1)
    await place.tokens.issue(previous, 1, START)
    async with busy(other, [previous]):
        for number in range(1, rounds + 1):
            one = token(number, age=-number)
            assert await other.tokens.get(previous.digest) == previous
            await place.tokens.issue(one, 1, START)
            assert await other.tokens.get(previous.digest) is None
            assert await other.tokens.get(one.digest) == one
            previous = one


async def test_the_other_process_sees_all_removals_of_a_commit(place: Place, other: Place) -> None:
    added = await fill(place, 100, one_user=True)
    await warm(other.tokens, added)
    kept = added[17]
    assert await place.tokens.revoke_all("ann", START, kept.digest) == 99
    assert [one for one in added if await other.tokens.get(one.digest)] == [kept]
    assert await place.tokens.revoke_all(None, START) == 1
    assert await other.tokens.get(kept.digest) is None


async def test_a_removal_is_seen_as_soon_as_it_is_answered(place: Place, other: Place) -> None:
    """The first caller that is answered may ask again in the same iteration of the event loop."""
    added = await fill(place, 100)
    await warm(place.tokens, added)
    await warm(other.tokens, added)

    async def end(one: Token) -> list[Token | None]:
        await place.tokens.revoke(one.digest, START)
        return [await each.tokens.get(one.digest) for each in (place, other)]

    assert await asyncio.gather(*(end(one) for one in added)) == [[None, None]] * 100


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
async def test_a_removal_trimmed_from_the_log_is_not_missed(place: Place, other: Place, limit: int) -> None:
    added = await fill(place, 20)
    await warm(other.tokens, added)
    for one in added[:10]:
        await place.tokens.revoke(one.digest, START)
    assert await place.store.purge_revocations(START + 1, limit) == min(limit, 9), "the last entry stays"
    assert [one for one in added if await other.tokens.get(one.digest)] == added[10:]
    await place.tokens.revoke(added[10].digest, START)
    assert [one for one in added if await other.tokens.get(one.digest)] == added[11:]


async def test_a_log_trimmed_and_regrown_is_incomplete(place: Place, other: Place) -> None:
    added = await fill(place, 20)
    await warm(other.tokens, added)
    for one in added[:15]:
        await place.tokens.revoke(one.digest, START)
        await place.store.purge_revocations(START + 1, 1000)
    assert [one for one in added if await other.tokens.get(one.digest)] == added[15:]


async def test_a_trimmed_log_is_complete_for_a_later_start(places: Places, place: Place) -> None:
    added = await fill(place, 4)
    for one in added[:2]:
        await place.tokens.revoke(one.digest, START)
    await place.store.purge_revocations(START + 1, 1000)
    late = await places.open()
    await warm(late.tokens, added[2:])
    await place.tokens.revoke(added[2].digest, START)
    assert [one for one in added if await late.tokens.get(one.digest)] == added[3:]


class Counted:
    """Looks up tokens for a cache, and counts how often."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.count = 0

    async def token(self, digest: bytes) -> Token | None:
        """Count, then look it up."""
        self.count += 1
        return await self._engine.token(digest)


class Delayed:
    """Looks up tokens for a cache, and answers for one of them only when it may."""

    def __init__(self, engine: Engine, slow: bytes) -> None:
        self._engine = engine
        self._slow = slow
        self.looked_up, self.may_answer = asyncio.Event(), asyncio.Event()

    async def token(self, digest: bytes) -> Token | None:
        """Look it up, and wait."""
        found = await self._engine.token(digest)
        if digest == self._slow:
            self.looked_up.set()
            await self.may_answer.wait()
        return found


@pytest.mark.parametrize("known", [True, False])
async def test_a_token_revoked_during_a_lookup_is_not_cached(place: Place, other: Place, known: bool) -> None:
    """The token existed when the store was asked. `known`: its revocation is known before the store answers."""
    gone, kept = await fill(place, 2)
    delayed = Delayed(other.engine, gone.digest)
    tokens = other.tokens_of(TokenCache(delayed.token, other.engine.feed, 10))
    looking = asyncio.create_task(tokens.get(gone.digest))
    await delayed.looked_up.wait()
    assert await place.tokens.revoke(gone.digest, START)
    if known:
        assert await tokens.get(kept.digest) == kept
    delayed.may_answer.set()
    assert await looking in {gone, None}
    assert await tokens.get(gone.digest) is None
    assert await tokens.get(kept.digest) == kept


async def test_a_look_up_that_must_not_wait_sees_a_removal(place: Place, other: Place) -> None:
    """It is what a check of a token does with SQLite. With PostgreSQL, all that is not cached must wait."""
    gone, kept = await fill(place, 2)
    tokens = other.store.tokens
    assert tokens.has_now(gone.digest) is (other.engine.token_now is not None)
    if other.engine.token_now is None:
        with pytest.raises(MustWait):
            tokens.look_up_now(gone.digest)
        return
    for one in (gone, kept):
        assert tokens.cached(one.digest) is None
        assert tokens.look_up_now(one.digest) == tokens.cached(one.digest) == one
    assert await place.tokens.revoke(gone.digest, START)
    assert tokens.cached(gone.digest) is tokens.look_up_now(gone.digest) is None
    assert tokens.cached(kept.digest) == kept


@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_a_full_cache_drops_its_oldest_entry(place: Place, size: int) -> None:
    counted = Counted(place.engine)
    tokens = TokenStore(place.engine, TokenCache(counted.token, place.engine.feed, size))
    added = await fill(place, 10)
    dice = random.Random(size)
    known: list[Token] = []
    for _ in range(60):
        one = dice.choice(added)
        before = counted.count
        assert await tokens.get(one.digest) == one
        assert counted.count - before == (one not in known)
        if one not in known:
            known = [*known, one][-size:]


async def test_a_cache_does_not_keep_absent_tokens(place: Place) -> None:
    counted = Counted(place.engine)
    tokens = TokenStore(place.engine, TokenCache(counted.token, place.engine.feed, 10))
    for _ in range(3):
        assert await tokens.get(token().digest) is None
    assert counted.count == 3
    await place.tokens.issue(token(), 0, START)
    assert await tokens.get(token().digest) == token()


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_small_cache_is_right_while_tokens_come_and_go(places: Places, size: int) -> None:
    place, other = await places.open(size), await places.open(size)
    dice = random.Random(size)
    live: dict[bytes, Token] = {}
    for number in range(25):
        one = token(number, age=-number)
        live[one.digest] = one
        await place.tokens.issue(one, 0, START)
        if dice.random() < 0.6:
            gone = dice.choice(list(live))
            await dice.choice([place, other]).tokens.revoke(gone, START)
            del live[gone]
        for n in dice.sample(range(number + 1), min(number + 1, 6)):
            assert await dice.choice([place, other]).tokens.get(token(n).digest) == live.get(token(n).digest)
