"""A circuit breaker: while the database fails, operations are refused at once instead of waiting for it one by one."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from tokenauth.errors import StoreUnavailable
from tokenauth.logs import log

SLOW = 2.0
"""Seconds that an operation may take before the database is probed."""

PATIENCE = 5.0
"""Seconds that an operation may take. Then its caller gets an error, and cannot know whether it was done."""

PROBE_PATIENCE = 1.0
"""Seconds that a probe may take."""

PAUSE = 0.5
"""Seconds between two probes."""

QUICK = 0.1
"""Seconds after which a failure counts as one that others had to wait for."""

QUIET = 10.0
"""Seconds in which the same failure is not logged again, when the database has worked meanwhile."""

Probe = Callable[[], Awaitable[str | None]]
"""Tries what operations need; returns what is wrong, or None."""


def _do_nothing() -> None:
    pass


class Circuit:
    """Lets operations through while the database works, and refuses them at once while it does not.

    It opens when a probe fails, or when an operation fails after others had to wait for it. Then one probe at a time
    looks whether the database works again, and closes it. A failure that comes quickly holds nobody up: it only starts
    a probe, so what is wrong with one operation does not stop the others.
    """

    def __init__(
        self,
        probe: Probe,
        fails: str,
        works: str,
        opened: Callable[[], object] = _do_nothing,
        probe_failed: Callable[[], object] = _do_nothing,
    ) -> None:
        """Log the events `fails` and `works`; call `opened` each time that it opens, `probe_failed` at each failure."""
        self.trouble: str | None = None
        """Why operations are refused; None while they are not."""
        self.openings = 0
        """How often it has opened: what was connected before an opening may be dead."""
        self._probe = probe
        self._fails = fails
        self._works = works
        self._opened = opened
        self._probe_failed = probe_failed
        self._under_way: dict[asyncio.Timeout, float] = {}
        self._watching = False
        self._probing: asyncio.Task[None] | None = None
        self._known = asyncio.Event()
        self._known.set()
        self._logged = False
        self._last_logged = ("", -math.inf)

    def demand(self) -> None:
        """Raise StoreUnavailable while it is open."""
        if self.trouble is not None:
            raise StoreUnavailable

    @asynccontextmanager
    async def attempt(self) -> AsyncIterator[float]:
        """Let one operation through; its value is when that was, for `failed`, which the operation calls if it fails.

        Raises StoreUnavailable while it is open, and when the operation takes longer than PATIENCE.
        """
        self.demand()
        loop = asyncio.get_running_loop()
        began = loop.time()
        limit = asyncio.timeout(None)  # `_watch` ends it: a timer for each operation would cost more than the rest
        self._under_way[limit] = began
        if not self._watching:
            self._watching = True
            loop.call_later(SLOW, self._watch)
        try:
            async with limit:
                yield began
        except TimeoutError as error:
            if not limit.expired():
                raise
            self.suspect()
            raise StoreUnavailable from error
        finally:
            del self._under_way[limit]

    def failed(self, reason: str, began: float) -> None:
        """Take in that an operation has failed: open if others had to wait for it, else probe first."""
        if asyncio.get_running_loop().time() - began < QUICK:
            self._log(reason)
        else:
            self.open(reason)
        self.suspect()

    def open(self, reason: str) -> None:
        """Refuse operations until a probe succeeds."""
        self._log(reason)
        was_open = self.trouble is not None
        self.trouble = reason
        if not was_open:
            self.openings += 1
            self._opened()
        self.suspect()

    def suspect(self) -> None:
        """Probe the database now, unless a probe is running; open if the probe fails."""
        if self._probing is None:
            self._known.clear()
            self._probing = asyncio.create_task(self._probe_until_it_works())

    async def verdict(self) -> None:
        """Wait for the probe that runs, if one does, while it is not known whether the database works."""
        await self._known.wait()

    def give_up(self) -> None:
        """End the operations that are under way: nothing that they wait for will come soon."""
        for limit in self._under_way:
            _end(limit)

    async def stop(self) -> None:
        """Probe no more."""
        if self._probing is not None:
            self._probing.cancel()
            with suppress(asyncio.CancelledError):
                await self._probing

    def _watch(self) -> None:
        """Look for operations that are slow, or take too long, for as long as any are under way."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = math.inf
        for limit, began in self._under_way.items():
            if now >= began + PATIENCE:
                _end(limit)
            elif now >= began + SLOW:
                self.suspect()
                due = min(due, began + PATIENCE)
            else:
                due = min(due, began + min(SLOW, PATIENCE))
        self._watching = due < math.inf
        if self._watching:
            loop.call_at(due, self._watch)

    async def _probe_until_it_works(self) -> None:
        try:
            while (trouble := await self._probe_once()) is not None:
                self.open(trouble)
                self._known.set()
                self._probe_failed()
                await asyncio.sleep(PAUSE)
            self.trouble = None
            if self._logged:
                self._logged = False
                log.info(self._works)
        finally:
            self._known.set()
            self._probing = None

    async def _probe_once(self) -> str | None:
        try:
            async with asyncio.timeout(PROBE_PATIENCE):
                return await self._probe()
        except TimeoutError:
            return f"it did not answer within {PROBE_PATIENCE:g} s"
        except Exception as error:
            return type(error).__name__

    def _log(self, reason: str) -> None:
        """Log once when operations begin to fail; the same failure over and over, between successes, less often."""
        now = asyncio.get_running_loop().time()
        last_reason, at = self._last_logged
        if not self._logged and not (reason == last_reason and now < at + QUIET):
            self._logged = True
            self._last_logged = (reason, now)
            log.error(self._fails, reason=reason)


def _end(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())
