"""RemoteTokens: how long a response is reused, which calls share a lookup, and what is cached."""

import asyncio
import gc
from typing import Any

import pytest

from tests.support.servers import START
from tests.wire.client.conftest import Connect
from tests.wire.client.issuers import INVALID, Hand, HeldIssuer, me, token, turns


async def test_an_answer_is_reused_for_max_age_only(connect: Connect, issuer: HeldIssuer, monotonic: Hand) -> None:
    tokens = connect(max_age=2)
    first = await tokens.identify(token(1))
    monotonic.now += 1.9
    assert await tokens.identify(token(1)) is first
    assert len(issuer.asked) == 1
    monotonic.now += 0.1
    await tokens.identify(token(1))
    assert len(issuer.asked) == 2


async def test_an_answer_ages_from_the_time_of_its_request(
    connect: Connect, issuer: HeldIssuer, monotonic: Hand
) -> None:
    tokens = connect(max_age=2)
    issuer.gate.clear()
    lookup = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(1)
    monotonic.now += 1.5
    issuer.gate.set()
    await lookup
    monotonic.now += 0.6
    issuer.reply = lambda _: INVALID
    assert await tokens.identify(token(1)) is None


@pytest.mark.parametrize("max_age", [0, 2])
async def test_max_age_holds_during_an_older_lookup(
    connect: Connect, issuer: HeldIssuer, monotonic: Hand, max_age: float
) -> None:
    tokens = connect(max_age=max_age)
    issuer.gate.clear()
    before = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(1)
    issuer.reply = lambda _: INVALID  # the token was revoked
    monotonic.now += max_age + 0.001
    after = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(2)
    issuer.gate.set()
    assert await before is not None
    assert await after is None
    assert await tokens.identify(token(1)) is None


async def test_a_late_answer_replaces_no_newer_one(connect: Connect, issuer: HeldIssuer, monotonic: Hand) -> None:
    tokens = connect(max_age=2)
    late = issuer.gate
    late.clear()
    before = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(1)
    monotonic.now += 2
    issuer.gate = asyncio.Event()
    issuer.gate.set()
    issuer.reply = lambda _: INVALID
    assert await tokens.identify(token(1)) is None
    late.set()
    assert await before is not None
    assert await tokens.identify(token(1)) is None
    assert len(issuer.asked) == 2


@pytest.mark.parametrize("max_age", [0, 2])
async def test_concurrent_requests_share_a_lookup(connect: Connect, issuer: HeldIssuer, max_age: float) -> None:
    tokens = connect(max_age=max_age)
    logins = await asyncio.gather(*(tokens.identify(token(1)) for _ in range(20)))
    assert len(issuer.asked) == 1
    assert {login.user.username for login in logins if login} == {"ann"}


async def test_at_most_100_lookups_are_sent_at_once(connect: Connect, issuer: HeldIssuer) -> None:
    """The pool of httpx loses connections when requests are cancelled that wait for one."""
    tokens = connect(timeout=60)
    issuer.gate.clear()
    asking = [asyncio.create_task(tokens.identify(token(number))) for number in range(150)]
    await issuer.await_requests(100)
    await turns()
    assert len(issuer.asked) == 100
    issuer.gate.set()
    assert None not in await asyncio.gather(*asking)
    assert len(issuer.asked) == 150


async def test_without_max_age_no_request_joins_a_lookup(connect: Connect, issuer: HeldIssuer) -> None:
    """Even if the clock does not move."""
    tokens = connect(max_age=0)
    issuer.gate.clear()
    first = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(1)
    second = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(2)
    issuer.gate.set()
    await asyncio.gather(first, second)
    await tokens.identify(token(1))
    assert len(issuer.asked) == 3


async def test_a_cancelled_caller_leaves_the_lookup_to_others(connect: Connect, issuer: HeldIssuer) -> None:
    tokens = connect()
    issuer.gate.clear()
    first, second = (asyncio.create_task(tokens.identify(token(1))) for _ in range(2))
    await issuer.await_requests(1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    issuer.gate.set()
    assert await second is not None
    assert len(issuer.asked) == 1


async def test_an_abandoned_lookup_fails_silently(connect: Connect, issuer: HeldIssuer) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    tokens = connect()
    issuer.gate.clear()
    issuer.reply = lambda _: (500, b"")
    lookup = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(1)
    lookup.cancel()
    await asyncio.wait([lookup])
    issuer.gate.set()
    await turns()
    del lookup
    gc.collect()
    await turns()
    assert not tokens._tasks
    assert errors == []


async def test_an_expired_token_is_not_taken_from_the_cache(connect: Connect, issuer: HeldIssuer, wall: Hand) -> None:
    tokens = connect()
    issuer.reply = lambda value: (200, me(value, expiry_time=int(START) + 10))
    assert await tokens.identify(token(1)) is not None
    issuer.reply = lambda _: INVALID
    wall.now += 9
    assert await tokens.identify(token(1)) is not None
    wall.now += 1
    assert await tokens.identify(token(1)) is None


async def test_an_expired_token_joins_no_older_lookup(connect: Connect, issuer: HeldIssuer, wall: Hand) -> None:
    tokens = connect()
    issuer.reply = lambda value: (200, me(value, expiry_time=int(START) + 10))
    issuer.gate.clear()
    before = asyncio.create_task(tokens.identify(token(1)))
    await issuer.await_requests(1)
    issuer.reply = lambda _: INVALID
    wall.now += 10
    after = asyncio.create_task(tokens.identify(token(1)))
    await turns()
    issuer.gate.set()
    assert await before is not None
    assert await after is None


async def test_the_issuer_decides_when_a_token_has_expired(connect: Connect, issuer: HeldIssuer, wall: Hand) -> None:
    """The local clock may be wrong: it only causes a lookup."""
    tokens = connect()
    issuer.reply = lambda value: (200, me(value, expiry_time=int(START) - 10))
    assert await tokens.identify(token(1)) is not None
    assert await tokens.identify(token(1)) is not None
    assert len(issuer.asked) == 2


async def test_a_refusal_is_cached_for_max_age(connect: Connect, issuer: HeldIssuer, monotonic: Hand) -> None:
    tokens = connect(max_age=2)
    issuer.reply = lambda _: INVALID
    assert await tokens.identify(token(1)) is None
    monotonic.now += 1.9
    assert await tokens.identify(token(1)) is None
    assert len(issuer.asked) == 1
    monotonic.now += 0.1
    assert await tokens.identify(token(1)) is None
    assert len(issuer.asked) == 2


@pytest.mark.parametrize("value", [b"", b"x", token(1)[:-1], token(1) + b"0", b"-" * 64, b"\xff" * 64])
async def test_a_malformed_token_is_refused_without_lookup(connect: Connect, issuer: HeldIssuer, value: bytes) -> None:
    assert await connect().identify(value) is None
    assert issuer.asked == []


async def test_the_least_recently_used_entry_is_evicted(connect: Connect, issuer: HeldIssuer) -> None:
    tokens = connect(cache_size=2)
    for number in (1, 2, 1, 3):
        await tokens.identify(token(number))
    assert len(issuer.asked) == 3
    await tokens.identify(token(1))
    assert len(issuer.asked) == 3
    await tokens.identify(token(2))
    assert len(issuer.asked) == 4


async def test_invalid_tokens_evict_no_valid_one_from_the_cache(connect: Connect, issuer: HeldIssuer) -> None:
    tokens = connect(cache_size=2)
    await tokens.identify(token(0))
    issuer.reply = lambda _: INVALID
    for number in range(1, 10):
        assert await tokens.identify(token(number)) is None
    assert await tokens.identify(token(0)) is not None
    assert len(issuer.asked) == 10
    assert len(tokens._refused._entries) == 2


async def test_no_token_value_is_kept_in_memory(connect: Connect, issuer: HeldIssuer) -> None:
    tokens = connect(stale_grace=10, client=issuer.client())
    value = token(1)
    assert await tokens.identify(value) is not None
    issuer.reply = lambda _: INVALID
    assert await tokens.identify(token(2)) is None
    issuer.asked.clear()
    held: list[object] = [tokens._valid, tokens._refused, tokens._lookups, tokens._tasks]
    for thing in held:
        held += [found for found in gc.get_referents(thing) if not isinstance(found, type)][: 2000 - len(held)]
    texts = [thing if isinstance(thing, bytes) else thing.encode() for thing in held if isinstance(thing, bytes | str)]
    assert b"ann" in texts
    assert not {value, token(2)} & set(texts)
