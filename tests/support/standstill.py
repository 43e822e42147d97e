"""Notices when the whole machine stands still, as a virtual machine does that its host suspends."""

from threading import Event, Thread
from time import monotonic

LEAST = 3.0
"""Seconds that count as a standstill. A machine that is only busy runs a thread sooner."""

_TICK = 0.25


class StandstillWatch(Thread):
    """Looks at the clock all the time, and remembers for how long it could not."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._looked_at = monotonic()
        self._found: list[tuple[float, float]] = []

    def run(self) -> None:
        pause = Event()
        while True:
            pause.wait(_TICK)
            now, before = monotonic(), self._looked_at
            self._looked_at = now
            if now - before > LEAST:
                self._found.append((now, now - before))

    def seconds_since(self, instant: float) -> float:
        """Return for how many seconds the machine has stood still since an instant of `monotonic`."""
        last = monotonic() - self._looked_at  # the thread may not have run yet since the end of it
        return sum(seconds for ended, seconds in self._found if ended > instant) + (last if last > LEAST else 0)
