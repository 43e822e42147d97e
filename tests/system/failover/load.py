"""All kinds of clients at once, through HAProxy, while machines fail; and what their histories must show."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from threading import Event
from typing import NamedTuple

from tests.support.connections import Connection
from tests.support.history import RealTime
from tests.support.journal import until
from tests.support.pool_users import PASSWORDS
from tests.support.queueing import CAPACITIES, Line, all_can_be_leased, check
from tests.support.races import Race
from tests.support.servers import Server
from tests.system.failover.nodes import LEASE_TTL
from tests.system.postgres.crowd import KINDS, Crowd

SERVICE = 3.0
"""Maximum seconds from the promotion of a standby until no request is refused any more."""

_WRITES = ("login", "assign", "keep", "release")
"""Requests that the primary must answer; a log-out can be held, and a probe be answered from the cache."""


class Outage(NamedTuple):
    """How one fault was felt, in seconds, and the number of answers by kind and status."""

    fault: str
    without_writes: float
    """The longest time without a successful write of some kind."""
    without_probes: float
    after_promotion: float | None
    """From the promotion until no request was refused any more. None if none was promoted."""
    statuses: dict[int, int]

    def __str__(self) -> str:
        after = "-" if self.after_promotion is None else f"{self.after_promotion:.2f}"
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        return f"| {self.fault} | {self.without_writes:.2f} | {self.without_probes:.2f} | {after} | {counts} |"


class Load:
    """Logins, log-outs and probes; holders that race for leases; and requests that wait in line."""

    def __init__(self, port: int, servers: Sequence[Server], seed: int = 1) -> None:
        self.crowd = Crowd(servers, seed, balancer=port, pool="gate", pace=20)
        self.race = Race([port], RealTime(), LEASE_TTL, seed, outages=True)
        self._chance = Random(seed)
        self._over = Event()
        with Connection(port) as connection:
            self._tokens = [connection.log_in(name, password) for name, password in PASSWORDS.items()]
        self.lines = {pool: Line(pool, [port], self._tokens, Random(seed)) for pool in CAPACITIES}
        self._jobs: dict[str, list[str]] = {pool: [] for pool in CAPACITIES}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run all clients. Raises their errors."""
        with (
            ThreadPoolExecutor(8) as threads,
            self.crowd.running(10),
            self.race.running(lambda: not self._over.is_set(), self._linger),
        ):
            waiting = [threads.submit(self._wait, pool, number) for pool in self.lines for number in range(4)]
            try:
                yield
                until(self.race.is_eventful, "every kind of event has happened", 60)
            finally:
                self._over.set()
                for line in self.lines.values():
                    line.over.set()
                for one in waiting:
                    one.result()

    def _linger(self) -> None:
        """Wait for a short time, and sometimes for about as long as a lease lasts."""
        short = self._chance.random() < 0.95
        self._over.wait(self._chance.expovariate(10) if short else self._chance.uniform(0.5, 1.5) * LEASE_TTL)

    def _wait(self, pool: str, client: int) -> None:
        number = 0
        while not self._over.is_set():
            id = f"{client}-{number}"
            self._jobs[pool].append(id)
            self.lines[pool].job(id)
            number += 1

    def busy(self) -> None:
        """Wait until each kind of client has been answered for a while."""
        self.crowd.busy(200)

    def outage(self, fault: str, since: float, promotions: Sequence[float]) -> Outage:
        """Describe what the clients have seen since an instant. Instants are those of the monotonic clock."""
        seen = [one for one in list(self.crowd.seen) if one.at >= since]
        refused = [one.at for one in seen if one.status == 503]
        after = max([0.0, *(at - max(promotions) for at in refused)]) if promotions else None
        bounds = [since, max(one.at for one in seen)]
        done = [one for one in seen if one.status < 500]
        gaps = {kind: _gap([*bounds, *(one.at for one in done if one.kind == kind)]) for kind in KINDS}
        writes = max(gaps[kind] for kind in _WRITES)
        return Outage(fault, writes, gaps["probe"], after, dict(Counter(one.status for one in seen)))

    def check(self, order: Sequence[tuple[str, Sequence[tuple[str, float, str | None]]]]) -> None:
        """Check that no promise was broken. order: the requests of each pool, from the database."""
        self.crowd.check()
        for pool, rows in order:
            check(self.lines[pool], rows, self._jobs[pool])
            assert all_can_be_leased(self.lines[pool], self._tokens[0]), f"a token of {pool} is out of use"
        self.race.finish()


def _gap(instants: Sequence[float]) -> float:
    """Return the longest time between two instants that follow each other."""
    ordered = sorted(instants)
    return max((later - earlier for earlier, later in pairwise(ordered)), default=0.0)
