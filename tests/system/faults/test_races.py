"""Promise 8, at length: the real clock, leases of one second, and 500 kills of workers, which are restarted."""

from contextlib import ExitStack
from pathlib import Path
from random import Random
from threading import Event
from time import monotonic

import pytest

from tests.support.history import RealTime
from tests.support.journal import until
from tests.support.length import scaled
from tests.support.races import POOLS, Race
from tests.support.servers import worker, write_config

LEASE_TTL = 1.0
KILLS = scaled(250, 6)


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_break_no_promise_of_thirty_holders(tmp_path: Path, seed: int) -> None:
    config = write_config(tmp_path, POOLS % {"lease_ttl": LEASE_TTL})
    chance, over = Random(seed), Event()

    def linger() -> None:
        """Wait for a short time, and sometimes for about as long as a lease lasts."""
        over.wait(chance.expovariate(20) if chance.random() < 0.9 else chance.uniform(0.5, 1.5) * LEASE_TTL)

    with ExitStack() as stack:
        servers = [stack.enter_context(worker(config)) for _ in range(2)]
        ports = [server.port for server in servers]
        race = Race(ports, RealTime(), LEASE_TTL, seed)
        with race.running(lambda: not over.is_set(), linger):
            try:
                for number in range(KILLS):
                    length, later = race.length, monotonic() + chance.uniform(0.2, 1.3) * LEASE_TTL
                    until(lambda: race.length > length + 200 and monotonic() > later, "the race continues")  # noqa: B023
                    servers[number % 2].kill()
                    servers[number % 2] = stack.enter_context(worker(config))
                    ports[number % 2] = servers[number % 2].port
                until(lambda: race.length > length + 200, "the race continues")
            finally:
                over.set()
        race.finish()
