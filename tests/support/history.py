"""What the clients of a pool have seen, and what of it cannot have been: a record, and pure functions that judge it.

A lease is *certainly held* from the moment its assignment was answered until the first moment at which it may be over:
when its time is up, counted from before the last request for more time was sent that was answered with yes; or when
its release, or the deletion of its token, was sent. What is lent for longer than that only makes the judge milder, and
so does a request that got no answer: it may have been done or not. So whatever is reported did happen.

Instants are of one monotonic clock that all clients share; the clock by which leases end may be another: see `Time`.
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

Verb = Literal["assign", "keep_alive", "release", "generate", "delete"]


class Outcome(Enum):
    """What came of a request."""

    DONE = 1
    REFUSED = 2
    UNKNOWN = 3


class Event(NamedTuple):
    """One request. `lease` names the lease that it is about, also when it is long over; "" where it is about none."""

    verb: Verb
    outcome: Outcome
    invoked: float
    """Read before it was sent."""
    returned: float
    """Read after it was answered; infinity: it was not."""
    clock: float
    """What the clock by which leases end said before it was sent."""
    lease: str = ""
    token: str = ""
    fence: int = 0


class Grant(NamedTuple):
    """What a pool answers with that does as it is asked."""

    token: str
    fence: int = 0


class Time(Protocol):
    """The clock by which leases end."""

    def __call__(self) -> float:
        """Read it."""

    def reached(self, instant: float) -> float:
        """Say when, in monotonic seconds, it said this for the first time, or a moment before; infinity: never."""


class RealTime:
    """Time as it passes."""

    def __call__(self) -> float:
        """Read it."""
        return monotonic()

    def reached(self, instant: float) -> float:
        """Return the instant itself."""
        return instant


class HandTime:
    """A hand-moved clock that remembers when it was moved; any thread may move it."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self._moves = [(clock(), -math.inf)]
        self._lock = Lock()

    def __call__(self) -> float:
        """Read it."""
        return self._clock()

    def advance(self, seconds: float) -> None:
        """Move it."""
        with self._lock:
            instant = self._clock() + seconds
            self._moves.append((instant, monotonic()))  # first: nobody can have read the instant before this one
            self._clock.set(instant)

    def reached(self, instant: float) -> float:
        """Say when it was moved so far."""
        at = bisect_left(self._moves, (instant,))
        return self._moves[at][1] if at < len(self._moves) else math.inf


class History:
    """The events of one pool, from any number of threads."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.events: list[Event] = []

    def record(
        self, verb: Verb, ask: Callable[[], Grant | None], lease: str = "", token: str = "", fence: int = 0
    ) -> Grant | None:
        """Ask, and write down what came of it; None is a refusal. Raises NoAnswer, having written that down too."""
        clock, invoked = self.time(), monotonic()
        try:
            granted = ask()
        except NoAnswer:
            self.events.append(Event(verb, Outcome.UNKNOWN, invoked, math.inf, clock, lease, token, fence))
            raise
        returned = monotonic()
        outcome = Outcome.DONE if granted else Outcome.REFUSED
        self.events.append(Event(verb, outcome, invoked, returned, clock, lease, *(granted or (token, fence))))
        return granted

    def violations(self, lease_ttl: float, capacity: int) -> list[str]:
        """Judge what was recorded."""
        return violations(self.events, lease_ttl, capacity, self.time.reached)

    def count(self, verb: Verb, outcome: Outcome = Outcome.DONE) -> int:
        """Say how many requests of a kind ended so."""
        return sum(event.verb == verb and event.outcome is outcome for event in self.events)


@dataclass(frozen=True)
class Lease:
    """One lease, certainly held from `start` to `end`: for no time at all if its answer came too late."""

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
    """Say in sentences what of one pool's history cannot have been, had it kept its promises.

    `reached` is that of the `Time` by which its leases end.
    """
    leases = find_leases(events, lease_ttl, reached)
    made, ended = _first(events, "generate", "returned"), _first(events, "delete", "invoked", Outcome.UNKNOWN)
    deleted = _first(events, "delete", "returned")
    groups: dict[str, list[Lease]] = defaultdict(list)
    for lease in leases:
        groups[lease.token].append(lease)
    found = list(_unmade(events, leases))
    for token, ones in groups.items():
        sentences = [*_overlaps(ones), *_fence_faults(ones), *_losses(ones), *_ghosts(ones, deleted[token])]
        found += [f"token {token[:8]}: {sentence}" for sentence in sentences]
    found += _crowds([(lease.start, lease.end) for lease in leases], capacity, "leases were certainly held")
    found += _crowds([(made[token], ended[token]) for token in made], capacity, "tokens were certainly in being")
    return found


def find_leases(events: Iterable[Event], lease_ttl: float, reached: Callable[[float], float]) -> list[Lease]:
    """Put together what was asked about each lease, in the order in which they were answered."""
    touches: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.lease:
            touches[event.lease].append(event)
    ended = _first(events, "delete", "invoked", Outcome.UNKNOWN)
    leases = []
    for name, touched in touches.items():
        done = [event for event in touched if event.outcome is Outcome.DONE]
        for assign in (event for event in done if event.verb == "assign"):
            lapse = reached(max(event.clock for event in done if event.verb != "release") + lease_ttl)
            given_up = [one.invoked for one in touched if one.verb == "release" and one.outcome is not Outcome.REFUSED]
            end = min(lapse, ended[assign.token], *given_up)
            leases.append(Lease(name, assign.token, assign.fence, assign.invoked, assign.returned, end, touched))
    return sorted(leases, key=attrgetter("start"))


def _first(events: Iterable[Event], verb: Verb, instant: str, also: Outcome = Outcome.DONE) -> Mapping[str, float]:
    """Say when each token was first made or deleted, as far as that was answered with yes; else infinity."""
    found: dict[str, float] = defaultdict(lambda: math.inf)
    for event in events:
        if event.verb == verb and event.outcome in {Outcome.DONE, also}:
            found[event.token] = min(found[event.token], getattr(event, instant))
    return found


def _overlaps(leases: Sequence[Lease]) -> Iterator[str]:
    """No token is lent to two at once."""
    held = [lease for lease in leases if lease.start < lease.end]
    for before, lease in zip(accumulate(held, _longer), held[1:], strict=False):
        if before.end > lease.start:
            yield f"lent to {lease} at {lease.start:.6f}, and {before} certainly held it until {before.end:.6f}"


def _fence_faults(leases: Sequence[Lease]) -> Iterator[str]:
    """No two leases of a token have the same fence, and none has a lower one than any that was answered before it."""
    falling = sorted(leases, key=attrgetter("fence"), reverse=True)
    for lease, other in pairwise(falling):
        if lease.fence == other.fence:
            yield f"lent to {lease} and to {other}, with one and the same fence"
    for higher, lower in zip(accumulate(falling, _earlier), falling[1:], strict=False):
        if lower.fence < higher.fence and higher.start < lower.invoked:
            yield f"lent to {lower}, who asked for it after {higher} had it"


def _losses(leases: Iterable[Lease]) -> Iterator[str]:
    """Who certainly holds a lease is not told that he has lost it."""
    for lease in leases:
        for event in lease.touches:
            if event.outcome is Outcome.REFUSED and event.returned < lease.end:
                yield f"{event.verb} was refused to {lease}, who certainly held it until {lease.end:.6f}"


def _ghosts(leases: Iterable[Lease], deleted: float) -> Iterator[str]:
    """Nothing is done for a lease that is over: it was released, its token was deleted, or somebody else has it."""
    asked = sorted(leases, key=attrgetter("invoked"))
    first_from = list(accumulate(reversed(asked), _earlier))[::-1]
    for lease in asked:
        over = [(deleted, "its token was deleted")]
        for event in lease.touches:
            if event.verb == "release" and event.outcome is Outcome.DONE:
                over.append((event.returned, "it was released"))
        later = bisect_right(asked, lease.start, key=attrgetter("invoked"))
        if later < len(asked):
            over.append((first_from[later].start, f"{first_from[later]} had the token"))
        instant, reason = min(over)
        for event in lease.touches:
            if event.outcome is Outcome.DONE and event.invoked > instant:
                yield f"{event.verb} was done for {lease} after {reason}"


def _unmade(events: Sequence[Event], leases: Iterable[Lease]) -> Iterator[str]:
    """Nothing is lent that nobody has made."""
    begun = _first(events, "generate", "invoked")
    if not any(event.verb == "generate" and event.outcome is Outcome.UNKNOWN for event in events):
        for lease in leases:
            if lease.start < begun[lease.token]:
                yield f"token {lease.token[:8]}: lent to {lease}, and nobody had made it"


def _crowds(spans: Iterable[tuple[float, float]], capacity: int, what: str) -> Iterator[str]:
    """No more tokens are lent, or in being, at any moment than the pool may have."""
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
