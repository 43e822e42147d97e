"""Clients that contend for one permit. Some cannot reach the server while they hold it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from random import Random

from tests.support.journal import until
from tests.support.servers import HandClock, Server
from tests.wire.client_pools.clients import Client, Connect, Held
from tests.wire.client_pools.conftest import TTL
from tests.wire.client_pools.lines import Line
from tokenauth.errors import LeaseLost, NoFreeToken

TURNS = 4
"""Number of leases of each client."""


class Traffic:
    """A clock that moves with the responses, not with real time: a slow machine sees the same race."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._chance = Random(7)

    def pass_time(self, seconds: float) -> None:
        """Move the clock. Thread-safe."""
        with self._lock:
            self._clock.advance(seconds)

    def lag(self) -> None:
        """Let a third of a lease pass before every third response, and a little before the others."""
        slow = self._chance.random() < 1 / 3
        for _ in range(10 if slow else 1):
            self.pass_time(TTL / 30)
            threading.Event().wait(0.001)


class Contender:
    """Leases the permit again and again. Every other time its line is dead until the lease is lost."""

    def __init__(self, client: Client, line: Line, traffic: Traffic, rivals: "list[Contender]") -> None:
        self._client = client
        self._line = line
        self._traffic = traffic
        self._rivals = rivals
        self.lease: Held | None = None

    def run(self) -> None:
        """Lease it TURNS times."""
        for turn in range(TURNS):
            while not self._hold(dead=turn % 2 == 1):
                pass

    def _hold(self, dead: bool) -> bool:
        with suppress(NoFreeToken, LeaseLost), self._client.lease("permit") as self.lease:
            self._look_around(self.lease)
            if dead:
                self._line.hold()
                until(self._is_lost, "the lease is lost")
                self._line.free()
            return True
        return False

    def _is_lost(self) -> bool:
        self._traffic.pass_time(TTL / 4)
        return self.lease is not None and self.lease.lost.is_set()

    def _look_around(self, mine: Held) -> None:
        """Ask all twice whether they hold a lease.

        One that holds it the second time also held it when the others were asked.
        """
        leases = [rival.lease for rival in self._rivals if rival.lease is not None]
        held = [lease for lease in leases if not lease.lost.is_set()]
        held = [lease for lease in held if not lease.lost.is_set()]
        assert held in ([], [mine]), "two have the only permit"


def test_no_two_clients_ever_both_have_the_only_permit(
    connect: Connect, login: dict[str, str], server: Server, clock: HandClock
) -> None:
    """Server and clients read the same clock, and leases end while messages are in flight."""
    rivals: list[Contender] = []
    traffic = Traffic(clock)
    with ExitStack() as stack:
        for _ in range(3):
            line = stack.enter_context(closing(Line(server.port, traffic.lag)))
            rivals.append(Contender(connect(line.url, headers=login, monotonic=clock), line, traffic, rivals))
        threads = stack.enter_context(ThreadPoolExecutor(3))
        for running in [threads.submit(rival.run) for rival in rivals]:
            running.result()
