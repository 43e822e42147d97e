"""A history of the requests of a pool's clients, and pure functions that find violations of the pool's promises in it.

A lease is *certainly held* from the instant its assignment was answered until the earliest instant at which it may have
ended: when its release or the deletion of its token was sent, or its lifetime after the last successful assign or
keep-alive was sent. This is conservative: a real lease may last longer, and a request without an answer may or may not
have been executed. So there are no false reports.

Instants are read from one monotonic clock that all clients share. Leases may end by another clock: see `Time`.
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from operator import attrgetter
from threading import Lock
from time import monotonic
from typing import Literal, NamedTuple, Protocol

from tests.support.connections import NoAnswer
from tests.support.servers import HandClock

Operation = Literal["assign", "keep_alive", "release", "generate", "delete"]


class Outcome(Enum):
    """The result of a request."""

    DONE = 1
    REFUSED = 2
    UNKNOWN = 3


class Event(NamedTuple):
    """One request. `lease` names its lease, even if that has ended, or is ""."""

    operation: Operation
    outcome: Outcome
    invoked: float
    """Read before it was sent."""
    returned: float
    """Read after it was answered; infinity if it was not."""
    clock: float
    """The time of the clock by which leases end, read before it was sent."""
    lease: str = ""
    token: str = ""
    fence: int = 0


class Grant(NamedTuple):
    """A successful answer of a pool."""

    token: str
    fence: int = 0


class Time(Protocol):
    """The clock by which leases end."""

    def __call__(self) -> float:
        """Return the time."""

    def reached(self, instant: float) -> float:
        """Return the monotonic time at or just before which the clock reached `instant`; infinity if it never did."""


class RealTime:
    """The monotonic clock itself."""

    def __call__(self) -> float:
        return monotonic()

    def reached(self, instant: float) -> float:
        return instant


class HandTime:
    """A hand-moved clock that records when it was moved. Any thread may move it."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self._moves = [(clock(), -math.inf)]
        self._lock = Lock()

    def __call__(self) -> float:
        return self._clock()

    def advance(self, seconds: float) -> None:
        with self._lock:
            instant = self._clock() + seconds
            self._moves.append((instant, monotonic()))  # before anyone can read the new time
            self._clock.set(instant)

    def reached(self, instant: float) -> float:
        at = bisect_left(self._moves, (instant,))
        return self._moves[at][1] if at < len(self._moves) else math.inf


class History:
    """The events of one pool. Thread-safe."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.events: list[Event] = []

    def record(
        self, operation: Operation, ask: Callable[[], Grant | None], lease: str = "", token: str = "", fence: int = 0
    ) -> Grant | None:
        """Send a request and record the result. None is a refusal. NoAnswer is recorded and raised again."""
        clock, invoked = self.time(), monotonic()
        try:
            granted = ask()
        except NoAnswer:
            self.events.append(Event(operation, Outcome.UNKNOWN, invoked, math.inf, clock, lease, token, fence))
            raise
        returned = monotonic()
        outcome = Outcome.DONE if granted else Outcome.REFUSED
        self.events.append(Event(operation, outcome, invoked, returned, clock, lease, *(granted or (token, fence))))
        return granted

    def violations(self, lease_ttl: float, capacity: int) -> list[str]:
        return violations(self.events, lease_ttl, capacity, self.time.reached)

    def count(self, operation: Operation, outcome: Outcome = Outcome.DONE) -> int:
        """Count the requests of a kind with this outcome."""
        return sum(event.operation == operation and event.outcome is outcome for event in self.events)


@dataclass(frozen=True)
class Lease:
    """One lease, certainly held from `start` to `end`. If its answer came too late, `end` is before `start`."""

    name: str
    token: str
    fence: int
    invoked: float
    start: float
    end: float
    touches: Sequence[Event]

    def __str__(self) -> str:
        return f"{self.name} (fence {self.fence})"


def violations(
    events: Sequence[Event],
    lease_ttl: float,
    capacity: int,
    reached: Callable[[float], float] = lambda instant: instant,
) -> list[str]:
    """Return a sentence for each violation of the promises in one pool's history.

    `reached` is that method of the `Time` by which its leases end.
    """
    leases = find_leases(events, lease_ttl, reached)
    made, ended = _first(events, "generate", "returned"), _first(events, "delete", "invoked", Outcome.UNKNOWN)
    deleted = _first(events, "delete", "returned")
    groups: dict[str, list[Lease]] = defaultdict(list)
    for lease in leases:
        groups[lease.token].append(lease)
    found = list(_unknown_tokens(events, leases))
    for token, ones in groups.items():
        sentences = [*_overlaps(ones), *_fence_faults(ones), *_losses(ones), *_late_successes(ones, deleted[token])]
        found += [f"token {token[:8]}: {sentence}" for sentence in sentences]
    found += _over_capacity([(lease.start, lease.end) for lease in leases], capacity, "leases were certainly held")
    found += _over_capacity([(made[token], ended[token]) for token in made], capacity, "tokens certainly existed")
    return found


def find_leases(events: Iterable[Event], lease_ttl: float, reached: Callable[[float], float]) -> list[Lease]:
    """Build the leases from their requests, in the order of their assignment."""
    touches: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.lease:
            touches[event.lease].append(event)
    ended = _first(events, "delete", "invoked", Outcome.UNKNOWN)
    leases = []
    for name, touched in touches.items():
        done = [event for event in touched if event.outcome is Outcome.DONE]
        for assign in (event for event in done if event.operation == "assign"):
            lapse = reached(max(event.clock for event in done if event.operation != "release") + lease_ttl)
            given_up = [
                one.invoked for one in touched if one.operation == "release" and one.outcome is not Outcome.REFUSED
            ]
            end = min(lapse, ended[assign.token], *given_up)
            leases.append(Lease(name, assign.token, assign.fence, assign.invoked, assign.returned, end, touched))
    return sorted(leases, key=attrgetter("start"))


def _first(
    events: Iterable[Event], operation: Operation, instant: str, also: Outcome = Outcome.DONE
) -> Mapping[str, float]:
    """Return when each token was first generated or deleted, as far as that succeeded; else infinity."""
    found: dict[str, float] = defaultdict(lambda: math.inf)
    for event in events:
        if event.operation == operation and event.outcome in {Outcome.DONE, also}:
            found[event.token] = min(found[event.token], getattr(event, instant))
    return found


def _overlaps(leases: Sequence[Lease]) -> Iterator[str]:
    """Find tokens with two leases at once."""
    held = [lease for lease in leases if lease.start < lease.end]
    for before, lease in zip(accumulate(held, _longer), held[1:], strict=False):
        if before.end > lease.start:
            yield f"leased to {lease} at {lease.start:.6f}, and {before} certainly held it until {before.end:.6f}"


def _fence_faults(leases: Sequence[Lease]) -> Iterator[str]:
    """Find leases of a token with equal fences, or with a lower fence than a lease that was answered earlier."""
    falling = sorted(leases, key=attrgetter("fence"), reverse=True)
    for lease, other in pairwise(falling):
        if lease.fence == other.fence:
            yield f"leased to {lease} and to {other} with the same fence"
    for higher, lower in zip(accumulate(falling, _earlier), falling[1:], strict=False):
        if lower.fence < higher.fence and higher.start < lower.invoked:
            yield f"leased to {lower}, which requested it after {higher} had it"


def _losses(leases: Iterable[Lease]) -> Iterator[str]:
    """Find requests that were refused although the client certainly held the lease."""
    for lease in leases:
        for event in lease.touches:
            if event.outcome is Outcome.REFUSED and event.returned < lease.end:
                yield f"{event.operation} was refused to {lease}, which certainly held it until {lease.end:.6f}"


def _late_successes(leases: Iterable[Lease], deleted: float) -> Iterator[str]:
    """Find requests that succeeded after the lease's end: by a release, a deletion of its token, or a later lease."""
    asked = sorted(leases, key=attrgetter("invoked"))
    first_from = list(accumulate(reversed(asked), _earlier))[::-1]
    for lease in asked:
        over = [(deleted, "its token was deleted")]
        for event in lease.touches:
            if event.operation == "release" and event.outcome is Outcome.DONE:
                over.append((event.returned, "it was released"))
        later = bisect_right(asked, lease.start, key=attrgetter("invoked"))
        if later < len(asked):
            over.append((first_from[later].start, f"{first_from[later]} had the token"))
        instant, reason = min(over)
        for event in lease.touches:
            if event.outcome is Outcome.DONE and event.invoked > instant:
                yield f"{event.operation} was done for {lease} after {reason}"


def _unknown_tokens(events: Sequence[Event], leases: Iterable[Lease]) -> Iterator[str]:
    """Find leases of tokens that had not been generated."""
    begun = _first(events, "generate", "invoked")
    if not any(event.operation == "generate" and event.outcome is Outcome.UNKNOWN for event in events):
        for lease in leases:
            if lease.start < begun[lease.token]:
                yield f"token {lease.token[:8]}: leased to {lease} before it was generated"


def _over_capacity(spans: Iterable[tuple[float, float]], capacity: int, what: str) -> Iterator[str]:
    """Find the instant with the most leases, or tokens, if they are more than the capacity."""
    edges = [edge for start, end in spans if start < end for edge in ((start, 1), (end, -1))]
    count = most = 0
    at = 0.0
    for instant, change in sorted(edges):
        count += change
        if count > most:
            most, at = count, instant
    if most > capacity:
        yield f"{most} {what} at {at:.6f}, and the capacity is {capacity}"


def _longer(lease: Lease, other: Lease) -> Lease:
    return max(lease, other, key=attrgetter("end"))


def _earlier(lease: Lease, other: Lease) -> Lease:
    return min(lease, other, key=attrgetter("start"))
