"""Sends requests at times that are fixed in advance, and measures each from its time: a slow answer delays no request.

wrk sends the next request of a connection after an answer. While the server stalls it sends little, and so the stall is
in few of its measurements (coordinated omission). Here, whatever should have been sent meanwhile waits, and counts.
"""

import gc
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import repeat
from random import Random
from select import EPOLLIN, epoll, select
from statistics import quantiles
from typing import NamedTuple

from bench.load import CONNECTIONS
from bench.machine import LOAD_CORE, on_core

Check = Callable[[int, bytes], None]
"""Takes the status and the body of a response. Raises RuntimeError if they are not as expected."""

Make = Callable[[], tuple[bytes, Check]]
"""Makes the next request of a kind."""

Plan = Sequence[tuple[float, str]]
"""Seconds from the start, and the kind of request that is sent then; in this order.

A time below 0 is that at which a connection becomes free.
"""

_TIMEOUT = 60.0
"""Seconds that a run may take longer than its plan."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Percentiles(NamedTuple):
    """Milliseconds from the planned time of a request until its response."""

    p50: float
    p99: float
    p999: float


class Outcome(NamedTuple):
    """The result of a run."""

    seconds: float
    milliseconds: Mapping[str, Sequence[float]]
    """Of each kind, the time from the planned time of each request until its response."""
    late_p99_ms: float
    """99th percentile of the time by which this generator itself was late: the request was due, a connection idle."""
    busy: float
    """The share of its core that this generator used."""

    @property
    def requests(self) -> int:
        return sum(map(len, self.milliseconds.values()))

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    def percentiles(self, *kinds: str) -> Percentiles:
        """Return the percentiles of some kinds together."""
        found = [taken for kind in kinds for taken in self.milliseconds[kind]]
        cuts = quantiles(found, n=1000)
        return Percentiles(cuts[499], cuts[989], cuts[998])


def at_random(rate: float, seconds: float, weights: Mapping[str, float], random: Random) -> Plan:
    """Plan a Poisson process: what many clients send that know nothing of each other."""
    kinds, shares = list(weights), list(weights.values())
    times = []
    at = random.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += random.expovariate(rate)
    return list(zip(times, random.choices(kinds, shares, k=len(times)), strict=True))


def evenly(rate: float, seconds: float, kind: str) -> Plan:
    """Plan requests at equal distances."""
    return [(number / rate, kind) for number in range(int(rate * seconds))]


def at_once(count: int, weights: Mapping[str, float], random: Random) -> Plan:
    """Plan requests that each connection sends one after the other, without a pause."""
    return list(zip(repeat(-1.0), random.choices(list(weights), list(weights.values()), k=count)))


def run(port: int, makers: Mapping[str, Make], plan: Plan, connections: int = CONNECTIONS) -> Outcome:
    """Send what is planned, on the core of the load generator. Raises RuntimeError for any unexpected response."""
    with on_core(LOAD_CORE), _without_gc(), ExitStack() as stack:
        opened = [stack.enter_context(closing(_Connection(port))) for _ in range(connections)]
        return _run(stack.enter_context(epoll()), opened, makers, plan)


def _run(poll: epoll, idle: "list[_Connection]", makers: Mapping[str, Make], plan: Plan) -> Outcome:
    by_number = {connection.fileno(): connection for connection in idle}
    for number in by_number:
        poll.register(number, EPOLLIN)
    milliseconds: dict[str, list[float]] = defaultdict(list)
    late: list[float] = []
    following, count, answered = 0, len(plan), 0
    began_cpu, began = time.process_time(), time.perf_counter()
    deadline = plan[-1][0] + _TIMEOUT
    while answered < count:
        now = time.perf_counter() - began
        while idle and following < count and plan[following][0] <= now:
            at, kind = plan[following]
            following += 1
            connection = idle.pop()
            due = at if at >= 0 else connection.free_since
            late.append(now - max(due, connection.free_since))
            connection.send(due, kind, *makers[kind]())
            now = time.perf_counter() - began
        if now > deadline:
            raise RuntimeError(f"{count - answered} of {count} requests were not answered in time")
        until = plan[following][0] - now if idle and following < count else 1.0
        select([poll], [], [], max(0.0, until))  # of a shorter wait than the milliseconds of epoll
        for number, _ in poll.poll(0):
            connection = by_number[number]
            if connection.receive():
                connection.free_since = time.perf_counter() - began
                milliseconds[connection.kind].append((connection.free_since - connection.due) * 1000)
                idle.append(connection)
                answered += 1
    seconds = time.perf_counter() - began
    busy = (time.process_time() - began_cpu) / seconds
    return Outcome(seconds, milliseconds, quantiles(late, n=100)[98] * 1000, busy)


class _Connection:
    """One connection, with at most one request at a time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), _TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self.free_since = 0.0
        self.due = 0.0
        self.kind = ""

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, due: float, kind: str, request: bytes, check: Check) -> None:
        self.due, self.kind, self._check = due, kind, check
        self._socket.sendall(request)

    def receive(self) -> bool:
        """Read what has come. Return whether the response is complete."""
        found = self._socket.recv(65536)
        if not found:
            raise RuntimeError(f"{self.kind}: the server closed a connection")
        self._received += found
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not end or len(body) < (int(length[1]) if length else 0):
            return False
        self._received = b""
        self._check(int(head[9:12]), body)
        return True


@contextmanager
def _without_gc() -> Iterator[None]:
    """Keep Python's garbage collector from delaying requests."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
