"""What a worker is told about tokens that another worker of its machine found missing from the store."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.contract.conftest import token
from tests.support.servers import START
from tests.system.postgres.feeds import Node, opened
from tests.system.postgres.nodes import fetch


@pytest.fixture
async def node(url: str) -> AsyncIterator[Node]:
    async with opened(url) as made:
        await made.tokens.issue(token(0), 0, START)
        await made.tokens.issue(token(1), 0, START)
        yield made


async def delete(url: str) -> None:
    """Delete the first token without an entry in the log, as if its notification had not arrived yet."""
    await fetch(url, "DELETE FROM tokens WHERE digest = $1", token(0).digest)


async def test_a_cached_token_that_is_missing_is_dropped(node: Node, url: str) -> None:
    assert await node.valid([token(0), token(1)]) == [True, True]
    await delete(url)
    assert await node.valid([token(0)]) == [True], "cached"
    node.tokens.forget_missing([token(0).digest])
    assert await node.valid([token(0), token(1)]) == [False, True]
    assert await node.looks_up([token(1)]) == [False]


async def test_a_look_up_that_is_older_is_not_cached(node: Node, url: str) -> None:
    """The store answered it before the token was deleted."""
    look_up, answered, may_return = node._look_up, asyncio.Event(), asyncio.Event()

    async def delayed(digest: bytes) -> object:
        found = await look_up(digest)
        answered.set()
        await may_return.wait()
        return found

    node.tokens._cache._look_up = delayed  # type: ignore[assignment]
    looking = asyncio.create_task(node.tokens.get(token(0).digest))
    await answered.wait()
    await delete(url)
    node.tokens.forget_missing([token(0).digest])
    may_return.set()
    assert await looking == token(0)
    assert await node.valid([token(0)]) == [False]


async def test_made_up_tokens_keep_no_other_from_the_cache(node: Node) -> None:
    before = node.tokens._cache.generation
    node.tokens.forget_missing([bytes([number]) * 32 for number in range(100)])
    assert node.tokens._cache.generation == before
