"""The sums of what all workers have counted, kept by the main process."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tokenauth import __version__
from tokenauth.metrics import FAMILIES, Counts, Key, Snapshot, add

STALE = 10.0
"""Seconds after which the gauges of a worker that sends no report are left out."""

_MERGES: Mapping[str, Callable[[Iterable[float]], float]] = {"sum": sum, "max": max, "min": min}
_MERGE = {family.name: _MERGES[family.merge] for family in FAMILIES}


class _Last(NamedTuple):
    snapshot: Snapshot
    at: float


class Totals:
    """Adds up the workers' snapshots, which come with their reports once a second.

    The counts of a worker that has ended stay in the sums, so that no counter falls at a reload or after a crash. A
    worker that stops sends its counts last; of one that is killed, those of its last second are lost.

    The main process changes it, and a thread reads it: neither holds the lock for longer than it takes to copy.
    """

    def __init__(self, configured: int) -> None:
        self.configured = configured
        """How many workers there should be."""
        self.crashes = 0
        """Workers that had to be replaced."""
        self._lock = threading.Lock()
        self._workers: dict[int, _Last] = {}
        self._ended: Counts = {}

    def update(self, pid: int, snapshot: Snapshot) -> None:
        """Replace the snapshot of a worker by a later one."""
        with self._lock:
            self._workers[pid] = _Last(snapshot, time.monotonic())

    def end(self, pid: int) -> None:
        """Keep the counts of a worker that has ended."""
        with self._lock:
            last = self._workers.pop(pid, None)
            if last is not None:
                add(self._ended, last.snapshot.counts)

    def read(self) -> tuple[Counts, Mapping[Key, float]]:
        """Return the sums of all counts, and the gauges of the workers that report."""
        with self._lock:
            counts, workers = self._ended.copy(), list(self._workers.values())
        oldest = time.monotonic() - STALE
        found: dict[Key, list[float]] = {}
        reporting = 0
        for last in workers:
            add(counts, last.snapshot.counts)
            if last.at >= oldest:
                reporting += 1
                for key, value in last.snapshot.gauges.items():
                    found.setdefault(key, []).append(value)
        gauges: dict[Key, float] = {key: _MERGE[key[0]](values) for key, values in found.items()}
        counts["worker_crashes_total",] = [self.crashes]
        own = {("workers",): reporting, ("workers_configured",): self.configured, ("build_info", __version__): 1}
        return counts, {**gauges, **own}
