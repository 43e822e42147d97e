"""The sums of what all workers have counted, kept by the main process."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from tokenauth import build, errors
from tokenauth.audit.log import AuditLog
from tokenauth.metrics import FAMILIES, Counts, Key, Snapshot, add
from tokenauth.models import Throttled, longest_waits
from tokenauth.status import LENGTH, STEP, History, NodeStatus, WorkerStatus

STALE = 10.0
"""Seconds after which the gauges of a worker that sends no report are left out."""

_FAILED = {("logins_total", code) for code in (errors.InvalidCredentials.code, errors.TooManyAttempts.code)}
"""Not those that the service could not check, such as while the store cannot be written: nobody guesses there."""

_MERGES: Mapping[str, Callable[[Iterable[float]], float]] = {"sum": sum, "max": max, "min": min}
_MERGE = {family.name: _MERGES[family.merge] for family in FAMILIES}


class _Last(NamedTuple):
    snapshot: Snapshot
    at: float


class _Minute:
    """What was counted before a minute and until now, and the levels of now."""

    def __init__(self, number: int, before: Sequence[int]) -> None:
        self.number = number
        self.before = self.counted = before
        self.levels: Sequence[int | None] = (None, None)

    def numbers(self) -> Sequence[int | None]:
        changes = (after - before for after, before in zip(self.counted, self.before, strict=True))
        return (*changes, *self.levels)


class Totals:
    """Adds up the workers' snapshots, which come with their reports once a second.

    The counts of a worker that has ended stay in the sums, so that no counter falls at a reload or after a crash. A
    worker that stops sends its counts last; of one that is killed, those of its last second are lost.

    The main process changes it, and a thread reads it: neither holds the lock for longer than it takes to copy.
    """

    def __init__(self, configured: int, audit: AuditLog | None = None) -> None:
        """`audit` is that of the main process, which also has what workers that have ended could not write."""
        self.configured = configured
        """How many workers there should be."""
        self.certificate_until: float | None = None
        """When the certificate expires that the workers use, in Unix seconds; None without TLS."""
        self.crashes = 0
        """Workers that had to be replaced."""
        self._audit = audit
        self._started_at = int(time.time())
        self._loaded_at = time.time()
        self._reload_accepted = True
        self._build = build()
        self._minutes: deque[_Minute] = deque(maxlen=LENGTH)
        self._lock = threading.Lock()
        self._workers: dict[int, _Last] = {}
        self._ended: Counts = {}
        self._throttled: Sequence[Throttled] = ()

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
                self._throttled = longest_waits([*self._throttled, *last.snapshot.throttled])

    def note_reload(self, accepted: bool, last: bool = True) -> None:
        """Note that a reload was accepted or refused. last: none was begun after it."""
        if last:
            self._reload_accepted = accepted
        if accepted:
            self._loaded_at = time.time()

    def read(self) -> tuple[Counts, Mapping[Key, float]]:
        """Return the sums of all counts, and the gauges of the workers that report; both with the main process."""
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
        if self._audit is not None:
            add(counts, {("audit_lost_total",): [self._audit.lost]})
            found.setdefault(("audit_up",), []).append(float(self._audit.problem is None))
        gauges: dict[Key, float] = {key: _MERGE[key[0]](values) for key, values in found.items()}
        counts["worker_crashes_total",] = [self.crashes]
        gauges["workers",], gauges["workers_configured",] = reporting, self.configured
        gauges["config_last_reload_successful",] = self._reload_accepted
        gauges["config_last_reload_success_timestamp_seconds",] = self._loaded_at
        if self.certificate_until is not None:
            gauges["tls_certificate_expiry_timestamp_seconds",] = self.certificate_until
        return counts, {**gauges, ("build_info", self._build): 1}

    def update_history(self) -> None:
        """Add what has been counted until now to the history. To be called about once a second."""
        counts, gauges = self.read()
        minute = _minute()
        if not self._minutes or self._minutes[-1].number != minute:
            before = self._minutes[-1].counted if self._minutes else (0, 0, 0)
            self._minutes.append(_Minute(minute, before))
        self._minutes[-1].counted = _happened(counts)
        self._minutes[-1].levels = [_level(gauges, name) for name in ("pool_leased", "pool_waiting")]

    def status(self, workers: Sequence[WorkerStatus]) -> NodeStatus:
        """Return how the node is doing now, with these workers."""
        self.update_history()
        counts, gauges = self.read()
        levels, history = dict(gauges), self._history()
        return NodeStatus(
            self._started_at, workers, self.configured, self.crashes, counts, levels, history, self.list_throttled()
        )

    def list_throttled(self) -> Sequence[Throttled]:
        """Return whom the workers have refused: each once, with the longest wait, at most MAX_THROTTLED."""
        with self._lock:
            found = [*self._throttled, *(each for last in self._workers.values() for each in last.snapshot.throttled)]
        return longest_waits(found)

    def _history(self) -> History:
        known, last = {minute.number: minute.numbers() for minute in self._minutes}, _minute()
        unknown = (None,) * 5
        rows = [known.get(number, unknown) for number in range(last - LENGTH + 1, last + 1)]
        return History(int(time.time()), *map(list, zip(*rows, strict=True)))


def _minute() -> int:
    return int(time.monotonic() // STEP)


def _happened(counts: Counts) -> Sequence[int]:
    """Return how many logins succeeded, how many failed, and how many tokens were checked."""
    succeeded = failed = checked = 0.0
    for key, numbers in counts.items():
        if key[0] == "validations_total":
            checked += numbers[0]
        elif key == ("logins_total", "ok"):
            succeeded += numbers[0]
        elif key in _FAILED:
            failed += numbers[0]
    return int(succeeded), int(failed), int(checked)


def _level(gauges: Mapping[Key, float], name: str) -> int | None:
    """Return the sum of all pools; None while it is not known."""
    found = [value for key, value in gauges.items() if key[0] == name]
    return int(sum(found)) if found else None
