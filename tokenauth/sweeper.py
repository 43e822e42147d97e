"""Deletes expired rows in small batches, only to free disk space: expiry does not depend on it."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from tokenauth.clock import Clock
from tokenauth.errors import RetryLater
from tokenauth.logs import log, safe_traceback
from tokenauth.models import LATE_USE, Instant
from tokenauth.pools import Pools
from tokenauth.stores.store import Store

INTERVAL = 60.0
"""Seconds between two rounds."""

BATCH = 1000
"""Maximum number of rows that one transaction deletes."""

PAUSE = 0.05
"""Seconds between two batches, in which others can write."""

LOG_AGE = 3600.0
"""Seconds that a revocation stays in the log. A worker that did not read it for longer drops its whole cache."""

Purge = Callable[[Instant, int], Awaitable[int]]


class Sweeper:
    """Deletes expired tokens, old revocations and old failed logins. One worker at a time does this."""

    def __init__(self, store: Store, pools: Pools, clock: Clock, forget: float) -> None:
        self._store = store
        self._pools = pools
        self._clock = clock
        self._forget = forget
        self._is_behind = False

    async def run(self) -> None:
        """Sweep every INTERVAL seconds until cancelled; when a round ends before all is deleted, go on at once."""
        while True:
            self._is_behind = False
            try:
                await self.sweep()
            except RetryLater as refusal:
                log.warning("sweep_postponed", reason=refusal.code)
            except Exception as error:
                log.error("unexpected_error", at=safe_traceback(error))
                self._is_behind = False
            await asyncio.sleep(PAUSE if self._is_behind else INTERVAL)

    async def sweep(self) -> int:
        """Delete what has expired, unless another worker is doing so. Return the number of rows.

        This also fills pools that could not be filled at the start.
        """
        await self._pools.prefill()
        now = self._clock()
        until = now + INTERVAL / 2
        if not await self._store.acquire_duty("sweep", now, until):
            return 0
        count = await self._drain(self._store.tokens.purge, now - LATE_USE, until)
        for pool in self._pools.usable_by():
            await self._drain(partial(self._pools.note_lapsed, pool), now, until)  # before their rows are deleted
            count += await self._drain(partial(self._store.pools.purge, pool), now, until)
        count += await self._drain(self._store.purge_revocations, now - LOG_AGE, until)
        count += await self._drain(self._store.failures.purge, now - self._forget, until)
        if count:
            log.info("swept", rows=count)
        return count

    async def _drain(self, purge: Purge, before: Instant, until: Instant) -> int:
        """Delete in batches until `until`. The next round continues from there."""
        total = 0
        while self._clock() < until:
            count = await purge(before, BATCH)
            total += count
            if count < BATCH:
                return total
            await asyncio.sleep(PAUSE)
        self._is_behind = True
        return total
