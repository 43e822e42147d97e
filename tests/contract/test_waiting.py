"""A release that serves who waits: it is finished, whatever becomes of its caller."""

import asyncio

import pytest
import structlog

from tests.contract.conftest import Place
from tests.support.servers import START
from tokenauth.models import ANY_LEASE, Grant, Identity, LeaseTerms, Pool, PoolToken
from tokenauth.pools import Pools, Waits

POOL = Pool("p", lease_ttl=60, capacity=1, log_leases=True)


class Scene:
    """A pool of one token, which is leased, and a client that waits for it."""

    def __init__(self, place: Place) -> None:
        self.pools = Pools({"p": POOL}, place.store, lambda: START)

    async def begin(self) -> tuple[PoolToken, asyncio.Task[Grant | Waits]]:
        await self.pools.generate(POOL, 1)
        first = await self.pools.assign(POOL, "first", "bob")
        terms = LeaseTerms("next", wait=30)
        waiting = asyncio.get_running_loop().create_task(self.pools.lease(POOL, Identity("ann"), terms))
        while not self.pools.waiting.someone_waits(POOL):  # noqa: ASYNC110 - a waiter has no event for this
            await asyncio.sleep(0.001)
        return first, waiting


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
async def test_a_cancelled_release_serves_who_waits(place: Place, steps: int) -> None:
    """It is counted and logged like any other: the database has done it."""
    scene = Scene(place)
    with structlog.testing.capture_logs() as logs:
        first, waiting = await scene.begin()
        release = asyncio.get_running_loop().create_task(scene.pools.release(POOL, first.value))
        for _ in range(steps):
            await asyncio.sleep(0)
        release.cancel()
        with pytest.raises(asyncio.CancelledError):
            await release
        granted = await waiting
    assert isinstance(granted, Grant)
    assert [(token.value, token.fence) for token in granted.tokens] == [(first.value, 2)]
    assert [(event["event"], event["holder"]) for event in logs] == [
        ("lease_granted", "first"),
        ("request_waits", "next"),
        ("lease_released", "first"),
        ("lease_granted", "next"),
    ]
    counters = scene.pools.counters["p"]
    assert (counters.released, counters.granted, counters.waited) == (1, 2, 1)
    await scene.pools.waiting.close()


async def test_a_release_that_cannot_be_noted_serves(place: Place) -> None:
    def fail(_: PoolToken) -> None:
        raise MemoryError

    scene = Scene(place)
    first, waiting = await scene.begin()
    with pytest.raises(MemoryError):
        await scene.pools.waiting.release(POOL, first.value, START, ANY_LEASE, fail)
    granted = await waiting
    assert isinstance(granted, Grant)
    assert scene.pools.counters["p"].granted == 2
    assert scene.pools.counters["p"].waited == 1
    await scene.pools.waiting.close()
