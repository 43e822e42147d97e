"""Clocks. One clock enters at the top; each operation reads it once and passes the result on as `now`."""

import time
from collections.abc import Callable
from functools import partial

from tokenauth.models import Instant

Clock = Callable[[], Instant]
"""Returns the time. A wall clock returns Unix seconds; a monotonic one, seconds since some point in the past."""

boottime: Clock = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""A monotonic clock that also counts the time that the machine is suspended. On Linux `time.monotonic` does not."""

NOTABLE_ADVANCE = 1.0
"""Seconds by which the wall clock must jump ahead for `on_advance` to be called."""


class MonotonicClock:
    """A wall clock that never goes back.

    When `wall` is set back, time continues from the last value at the pace of `monotonic`. So what has expired stays
    expired, and nothing lives longer than it should. When `wall` jumps ahead, `on_advance` is called with the new time,
    so that other processes that share the store can catch up.
    """

    def __init__(self, wall: Clock, monotonic: Clock) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset = wall() - monotonic()
        self.on_advance: Callable[[Instant], object] | None = None

    def __call__(self) -> Instant:
        """Return Unix seconds, never less than an earlier call returned."""
        now = self._wall()
        floor = self._monotonic() + self._offset
        if now < floor:
            return floor
        self._offset += now - floor
        if now - floor > NOTABLE_ADVANCE and self.on_advance is not None:
            self.on_advance(now)
        return now

    def advance(self, instant: Instant) -> float:
        """Move the clock forward to `instant`, never back. Return the seconds by which it was behind."""
        behind = instant - self()
        if behind > 0:
            self._offset += behind
        return max(behind, 0.0)
