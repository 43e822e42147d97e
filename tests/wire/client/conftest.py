"""Fixtures: an issuer whose responses the test sets, and clocks moved by hand."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.wire.client.issuers import URL, Hand, HeldIssuer
from tokenauth.client import RemoteTokens

Connect = Callable[..., RemoteTokens]


@pytest.fixture
def wall() -> Hand:
    """Return a wall clock."""
    return Hand()


@pytest.fixture
def monotonic() -> Hand:
    """Return a monotonic clock."""
    return Hand(1000.0)


@pytest.fixture
def issuer(anyio_backend: str) -> HeldIssuer:
    """Return an issuer for which every token is a valid one of Ann."""
    return HeldIssuer()


@pytest.fixture
async def connect(issuer: HeldIssuer, wall: Hand, monotonic: Hand) -> AsyncIterator[Connect]:
    """Return what makes clients of the issuer. They are closed at the end."""
    async with AsyncExitStack() as stack:

        def connected(**options: Any) -> RemoteTokens:
            tokens = RemoteTokens(URL, **{"client": issuer.client(), "clock": wall, "monotonic": monotonic, **options})
            stack.push_async_callback(tokens.aclose)
            return tokens

        yield connected
