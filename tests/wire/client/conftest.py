"""What the tests of the clients share: an issuer that is told what to answer, and clocks moved by hand."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.wire.client.issuers import URL, Hand, HeldIssuer
from tokenauth.client import RemoteTokens

Connect = Callable[..., RemoteTokens]


@pytest.fixture
def wall() -> Hand:
    """Keep the time of day."""
    return Hand()


@pytest.fixture
def monotonic() -> Hand:
    """Keep the time that passes."""
    return Hand(1000.0)


@pytest.fixture
def issuer(anyio_backend: str) -> HeldIssuer:
    """Make an issuer that takes every token for Ann's."""
    return HeldIssuer()


@pytest.fixture
async def connect(issuer: HeldIssuer, wall: Hand, monotonic: Hand) -> AsyncIterator[Connect]:
    """Make what connects to the issuer; it is closed at the end."""
    async with AsyncExitStack() as stack:

        def connected(**options: Any) -> RemoteTokens:
            tokens = RemoteTokens(URL, **{"client": issuer.client(), "clock": wall, "monotonic": monotonic, **options})
            stack.push_async_callback(tokens.aclose)
            return tokens

        yield connected
