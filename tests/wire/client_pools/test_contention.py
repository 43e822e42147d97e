"""Clients that contend for one permit. Some cannot reach the server while they hold it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from random import Random

from tests.support.journal import until
from tests.support.servers import HandClock, Server
from tests.wire.client_pools.clients import Client, Connect, Held
from tests.wire.client_pools.conftest import TTL
from tests.wire.client_pools.proxy import Proxy
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
    """Leases the permit again and again. Every other time its proxy holds back responses until the lease is lost."""

    def __init__(self, client: Client, proxy: Proxy, traffic: Traffic, rivals: "list[Contender]") -> None:
        self._client = client
        self._proxy = proxy
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
            self._check_rivals(self.lease)
            if dead:
                self._proxy.hold()
                until(self._is_lost, "the lease is lost")
                self._proxy.resume()
            return True
        return False

    def _is_lost(self) -> bool:
        self._traffic.pass_time(TTL / 4)
        return self.lease is not None and self.lease.lost.is_set()

    def _check_rivals(self, mine: Held) -> None:
        """Check twice which clients hold a lease.

        A client that holds one at the second check also held it while the others were checked.
        """
        leases = [rival.lease for rival in self._rivals if rival.lease is not None]
        held = [lease for lease in leases if not lease.lost.is_set()]
        held = [lease for lease in held if not lease.lost.is_set()]
        assert held in ([], [mine]), "two clients hold the only permit"


def test_two_clients_never_hold_the_only_permit(
    connect: Connect, login: dict[str, str], server: Server, clock: HandClock
) -> None:
    """Server and clients read the same clock, and leases end while messages are in flight."""
    rivals: list[Contender] = []
    traffic = Traffic(clock)
    with ExitStack() as stack:
        for _ in range(3):
            proxy = stack.enter_context(closing(Proxy(server.port, traffic.lag)))
            rivals.append(Contender(connect(proxy.url, headers=login, monotonic=clock), proxy, traffic, rivals))
        threads = stack.enter_context(ThreadPoolExecutor(3))
        for running in [threads.submit(rival.run) for rival in rivals]:
            running.result()
