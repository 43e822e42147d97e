"""A circuit breaker: while the database fails, operations are refused at once instead of waiting for it one by one."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from time import monotonic

from tokenauth.errors import StoreUnavailable
from tokenauth.logs import log

SLOW = 2.0
"""Seconds that an operation may take before the database is probed."""

TIMEOUT = 5.0
"""Seconds that an operation may take. Then its caller gets an error, and the outcome is unknown."""

PROBE_TIMEOUT = 1.0
"""Seconds that a probe may take."""

PAUSE = 0.5
"""Seconds between two probes."""

QUICK = 0.1
"""Minimum seconds of a slow failure. Other operations had to wait for it."""

QUIET = 10.0
"""Minimum seconds between two log lines for the same failure."""

WAIT_FOR_WRITES = (
    "remove the cause, and do not restart before that: log-outs are held in memory. docs/production.md,"
    ' "When something happens"'
)
"""What to do while the database cannot be written."""

Probe = Callable[[], Awaitable[str | None]]
"""Checks what operations need; returns what is wrong, or None."""


def _do_nothing() -> None:
    pass


class Circuit:
    """Lets operations through while the database works, and refuses them at once while it does not.

    It opens when a probe fails, or when an operation fails slowly. Then one probe at a time checks whether the
    database works again, and closes it. A quick failure delays no other operation: it only starts a probe, so one bad
    operation does not stop the others.
    """

    def __init__(
        self,
        probe: Probe,
        fails: str,
        works: str,
        opened: Callable[[], object] = _do_nothing,
        probe_failed: Callable[[], object] = _do_nothing,
        refusal: Callable[[], StoreUnavailable] = StoreUnavailable,
        probe_ends_outage: bool = False,
        action: str = "",
    ) -> None:
        """Log the events `fails`, with an `action` for people, and `works`.

        Call `opened` when it opens, and `probe_failed` when a probe fails.
        `refusal` makes the errors that it raises. `probe_ends_outage`: a probe does what the end of an outage needs, so
        a probe that began before the circuit opened does not close it.
        """
        self.problem: str | None = None
        """Why operations are refused; None while it is closed."""
        self.openings = 0
        """How often it has opened. Connections that are older than the last opening may be dead."""
        self._opened_at = 0.0
        self._probe = probe
        self._fails = fails
        self._works = works
        self._action = action
        self._opened = opened
        self._probe_failed = probe_failed
        self._refusal = refusal
        self._probe_ends_outage = probe_ends_outage
        self._running: dict[asyncio.Timeout, float] = {}
        self._watching = False
        self._probing: asyncio.Task[None] | None = None
        self._probe_finished = asyncio.Event()
        self._probe_finished.set()
        self._logged = False
        self._last_logged = ("", -math.inf)

    def open_for(self) -> float:
        """Return for how many seconds operations have been refused; 0 while it is closed. Any thread may call it."""
        return 0.0 if self.problem is None else monotonic() - self._opened_at

    def check_closed(self) -> None:
        """Raise StoreUnavailable while it is open."""
        if self.problem is not None:
            raise self._refusal()

    @asynccontextmanager
    async def attempt(self) -> AsyncIterator[float]:
        """Let one operation through. The value is its start, which the operation passes to `failed` if it fails.

        Raises StoreUnavailable while it is open, and if the operation takes longer than TIMEOUT.
        """
        self.check_closed()
        loop = asyncio.get_running_loop()
        began = loop.time()
        limit = asyncio.timeout(None)  # `_watch` ends it: a timer for each operation would cost more than the rest
        self._running[limit] = began
        if not self._watching:
            self._watching = True
            loop.call_later(SLOW, self._watch)
        try:
            async with limit:
                yield began
        except TimeoutError as error:
            if not limit.expired():
                raise
            self.start_probe()
            raise self._refusal() from error
        finally:
            del self._running[limit]

    def failed(self, reason: str, began: float) -> None:
        """Report a failure: a slow one opens the circuit, a quick one starts a probe."""
        if asyncio.get_running_loop().time() - began < QUICK:
            self._log(reason)
        else:
            self.open(reason)
        self.start_probe()

    def open(self, reason: str) -> None:
        """Refuse operations until a probe succeeds."""
        self._log(reason)
        was_open = self.problem is not None
        self.problem = reason
        if not was_open:
            self.openings += 1
            self._opened_at = monotonic()
            self._opened()
        self.start_probe()

    def start_probe(self) -> None:
        """Probe the database now, unless a probe is running; open if the probe fails."""
        if self._probing is None:
            self._probe_finished.clear()
            self._probing = asyncio.create_task(self._probe_until_it_works(), context=Context())

    async def wait_for_probe(self) -> None:
        """Wait for the result of the probe that is running, if one is."""
        await self._probe_finished.wait()

    def abort_running(self) -> None:
        """Abort the running operations: the database will not answer soon."""
        for limit in self._running:
            _end(limit)

    async def stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            with suppress(asyncio.CancelledError):
                await self._probing

    def _watch(self) -> None:
        """Probe when an operation is slow and abort it when it takes too long; runs while there are operations."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = math.inf
        for limit, began in self._running.items():
            if now >= began + TIMEOUT:
                _end(limit)
            elif now >= began + SLOW:
                self.start_probe()
                due = min(due, began + TIMEOUT)
            else:
                due = min(due, began + min(SLOW, TIMEOUT))
        self._watching = due < math.inf
        if self._watching:
            loop.call_at(due, self._watch)

    async def _probe_until_it_works(self) -> None:
        try:
            while True:
                openings = self.openings
                problem = await self._probe_once()
                if problem is not None:
                    self.open(problem)
                    self._probe_finished.set()
                    self._probe_failed()
                    await asyncio.sleep(PAUSE)
                elif openings == self.openings or not self._probe_ends_outage:
                    break
            self.problem = None
            if self._logged:
                self._logged = False
                log.info(self._works)
        finally:
            self._probe_finished.set()
            self._probing = None

    async def _probe_once(self) -> str | None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                return await self._probe()
        except TimeoutError:
            return f"it did not answer within {PROBE_TIMEOUT:g} s"
        except Exception as error:
            return type(error).__name__

    def _log(self, reason: str) -> None:
        """Log the first failure after a success, unless the same one was logged lately."""
        now = asyncio.get_running_loop().time()
        last_reason, at = self._last_logged
        if not self._logged and not (reason == last_reason and now < at + QUIET):
            self._logged = True
            self._last_logged = (reason, now)
            log.error(self._fails, reason=reason, **({"action": self._action} if self._action else {}))


def _end(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())
