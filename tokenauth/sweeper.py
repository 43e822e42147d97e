"""Deletes what has expired, in small steps. Nothing depends on it: it only frees disk."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from tokenauth.clock import Clock
from tokenauth.errors import RetryLater
from tokenauth.logs import log
from tokenauth.models import Instant
from tokenauth.pools import Pools
from tokenauth.stores.store import Store

INTERVAL = 60.0
"""Seconds between two rounds."""

BATCH = 1000
"""Rows that one transaction deletes at the most."""

PAUSE = 0.05
"""Seconds between two batches, in which others write."""

LOG_AGE = 3600.0
"""Seconds that a revocation stays in the log. A worker that slept longer forgets its whole cache."""

Purge = Callable[[Instant, int], Awaitable[int]]


class Sweeper:
    """One worker at a time deletes expired tokens, old revocations and forgotten failures."""

    def __init__(self, store: Store, pools: Pools, clock: Clock, forget: float) -> None:
        self._store = store
        self._pools = pools
        self._clock = clock
        self._forget = forget

    async def run(self) -> None:
        """Sweep in every interval until cancelled."""
        while True:
            try:
                await self.sweep()
            except RetryLater as refusal:
                log.warning("sweep_put_off", reason=refusal.code)
            await asyncio.sleep(INTERVAL)

    async def sweep(self) -> int:
        """Delete all that is due, unless another worker does so; say how many rows that was.

        Pools that could not be filled at the start are tried again.
        """
        await self._pools.prefill()
        now = self._clock()
        until = now + INTERVAL / 2
        if not await self._store.claim("sweep", now, until):
            return 0
        count = await self._drain(self._store.tokens.purge, now, until)
        for pool in self._pools.usable_by():
            count += await self._drain(partial(self._pools.purge, pool), now, until)
        count += await self._drain(self._store.purge_log, now - LOG_AGE, until)
        count += await self._drain(self._store.failures.purge_failures, now - self._forget, until)
        if count:
            log.info("swept", rows=count)
        return count

    async def _drain(self, purge: Purge, before: Instant, until: Instant) -> int:
        """Delete batch by batch, for as long as the duty was claimed; the next round goes on from there."""
        total = 0
        while self._clock() < until:
            count = await purge(before, BATCH)
            total += count
            if count < BATCH:
                break
            await asyncio.sleep(PAUSE)
        return total
