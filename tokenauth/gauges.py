"""Reads the numbers that metrics show of a running service, in the background and at a bounded cost."""

import asyncio
from time import monotonic

from tokenauth.errors import RetryLater
from tokenauth.logs import log, safe_traceback
from tokenauth.metrics import Key, Snapshot
from tokenauth.service import Service

_INTERVAL = 10.0
"""Minimum seconds between two looks at the database."""

_TOKENS_INTERVAL = 60.0
"""Minimum seconds between two counts of all tokens."""

_SHARE = 0.01
"""Maximum share of the time in which the database is read."""

_STEP = 50_000
"""Maximum number of tokens that one query counts: some milliseconds, whatever the number of tokens.

More that expire in the same second count as this many.
"""

_PAUSE = 0.02
"""Seconds between two such queries."""


class Gauges:
    """The metrics of one worker.

    What costs a read is read in the background: the state of the store by each worker, and what is the same for all of
    them by one, `counts_store`. No scrape waits for it. The number of live tokens is counted in steps of _STEP index
    entries, at most once a minute, and less often where this takes long: 10,000,000 tokens are some hundred queries.
    """

    def __init__(self, service: Service, counts_store: bool) -> None:
        self._service = service
        self._counts_store = counts_store
        self._store: dict[Key, float] = {}
        self._tokens_due = 0.0

    def snapshot(self) -> Snapshot:
        """Return all numbers of this worker now."""
        service = self._service
        counts = service.metrics.counts()
        counts["throttle_refusals_total",] = [service.throttle.refusals]
        for result, number in service.credentials.results.items():
            counts["logins_total", result] = [number]
        for pool, leases in service.pools.counters.items():
            counts["pool_granted_total", pool] = [leases.granted]
            counts["pool_denied_total", pool] = [leases.denied]
            counts["pool_lapsed_total", pool] = [leases.lapsed]
            counts["pool_forced_total", pool] = [leases.forced]
            counts["pool_wait_seconds", pool] = [leases.waited, leases.seconds_waited]
            counts["pool_hold_seconds", pool] = [leases.released + leases.lapsed, leases.seconds_held]
        gauges: dict[Key, float] = {
            ("password_queue",): service.throttle.queued,
            ("revocations_held",): len(service.tokens.revocations.held),
            ("feed_age_seconds",): service.store.feed_age,
        }
        if service.audit is not None:
            counts["audit_lost_total",] = [service.audit.lost]
            gauges["audit_up",] = float(service.audit.problem is None)
        return Snapshot(counts, gauges | self._store, service.throttle.list_throttled())

    async def run(self) -> None:
        """Read until cancelled."""
        try:
            while True:
                began = monotonic()
                await self.read()
                await asyncio.sleep(max(_INTERVAL, (monotonic() - began) / _SHARE))
        finally:
            self._store = {}  # what is no longer read is not shown

    async def read(self) -> None:
        """Read the database once; the tokens only when they are due."""
        store = self._service.store
        try:
            self._store["store_up",] = float(await store.ready() is None)
            if self._counts_store:
                await self._read_pools()
                if monotonic() >= self._tokens_due:
                    self._store["live_tokens",], seconds = await self._count_tokens()
                    self._tokens_due = monotonic() + max(_TOKENS_INTERVAL, seconds / _SHARE)
        except RetryLater:
            self._store = {("store_up",): 0.0}
        except Exception as error:
            self._store = {("store_up",): 0.0}
            log.error("unexpected_error", at=safe_traceback(error))

    async def _read_pools(self) -> None:
        for pool in self._service.pools.usable_by():
            counts = await self._service.pools.count(pool)
            capacity = counts.available + counts.leased if pool.capacity is None else pool.capacity
            self._store["pool_capacity", pool.name] = capacity
            self._store["pool_leased", pool.name] = counts.leased
            self._store["pool_waiting", pool.name] = await self._service.pools.count_waiting(pool)

    async def _count_tokens(self) -> tuple[int, float]:
        """Count the live tokens, in ranges of time that have at most _STEP of them. Return also the seconds of reading.

        The widths of the ranges follow the density of the tokens.
        """
        store = self._service.store.tokens
        start = int(self._service.clock()) + 1
        end = await store.last_expiry() + 1
        count, width, seconds = 0, 3600, 0.0
        while start < end:
            began = monotonic()
            found = await store.count_expiring(start, start + width, _STEP)
            seconds += monotonic() - began
            if found == _STEP and width > 1:
                width = max(1, width // 4)
                continue
            count += found
            start += width
            if found <= _STEP // 4:
                width *= 2
            await asyncio.sleep(_PAUSE)
        return count, seconds
