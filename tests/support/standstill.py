"""Notices when the whole machine stands still, as a virtual machine does that its host suspends, or its disk does."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from time import monotonic

LEAST = 3.0
"""Seconds that count as a standstill. A machine that is only busy runs a thread sooner."""

LEAST_SYNC = 1.0
"""Seconds that count as a standstill of the disk: a change of tokenauth waits no longer for another."""

_TICK = 0.25


def _sync_a_block() -> None:
    """Write one block of a file, where the tests have their databases, and wait for the disk."""
    with tempfile.TemporaryFile(buffering=0) as block:
        block.write(b"x")
        os.fdatasync(block.fileno())


class StandstillWatch(Thread):
    """Uses the disk and looks at the clock all the time, and remembers for how long it could not."""

    def __init__(self, use_disk: Callable[[], object] = _sync_a_block) -> None:
        super().__init__(daemon=True)
        self._use_disk = use_disk
        self._looked_at = monotonic()
        self._found: list[tuple[float, float]] = []

    def run(self) -> None:
        pause = Event()
        while True:
            pause.wait(_TICK)
            resumed, before = monotonic(), self._looked_at
            with suppress(OSError):  # a test may have taken all file descriptors
                self._use_disk()
            now = self._looked_at = monotonic()
            if resumed - before > LEAST or now - resumed > LEAST_SYNC:
                self._found.append((now, now - before))

    def seconds_since(self, instant: float) -> float:
        """Return for how many seconds the machine has stood still since an instant of `monotonic`."""
        last = monotonic() - self._looked_at  # the thread may not have run yet since the end of it
        return sum(seconds for ended, seconds in self._found if ended > instant) + (last if last > LEAST else 0)
