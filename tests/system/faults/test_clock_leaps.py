"""Promises 2 and 8 while the clocks of workers, and of PostgreSQL, leap forward and back under load."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import Event

from tests.support.leaps import Leaps, Observer, leaping, libfaketime
from tests.support.length import scaled
from tests.support.postgres import Cluster
from tests.support.races import POOLS, Race
from tests.support.servers import write_config
from tests.system.postgres.clocks import ShiftedDatabase
from tests.system.postgres.nodes import fresh, write_config_for

LEASE_TTL, TOKEN_TTL = 2.0, 4
LEAPS = scaled(200, 30)
SETTINGS = f"{POOLS % {'lease_ttl': LEASE_TTL}}\n[tokens]\nttl = '3650d'\nper_user = 0\n"


def under_leaps(config: Path, also: Callable[[float], object], library: Path | None = None) -> None:
    """Let the clock leap under load. No token lives longer than its ttl, and no token is leased twice."""
    leaps, over, chance = Leaps(config.with_name("clock"), LEASE_TTL, 1, also), Event(), Random(1)
    with leaping(config, leaps, library) as one, leaping(config, leaps, library) as other:
        ports = [one.port, other.port]
        race = Race(ports, leaps, LEASE_TTL, 1, outages=True)
        observers = [Observer(ports, TOKEN_TTL) for _ in range(3)]
        for observer in observers:
            observer.start()

        def linger() -> None:
            """Wait for a short time, and sometimes for about as long as a lease lasts."""
            over.wait(chance.expovariate(20) if chance.random() < 0.9 else chance.uniform(0.5, 1.5) * LEASE_TTL)

        with race.running(lambda: not over.is_set(), linger):
            try:
                for _ in range(LEAPS):
                    over.wait(chance.expovariate(1))
                    leaps.leap()
                over.wait(3 * LEASE_TTL)
            finally:
                over.set()
                for observer in observers:
                    observer.stopping.set()
        for observer in observers:
            observer.join(150)
            assert not observer.faults, observer.faults[:5]
            assert observer.lifetimes
        race.finish()
        logged = {event["event"] for event in [*one.errors(), *other.errors()]}
        assert logged <= {"store_not_writable", "store_unreachable"}, "the machine may have been suspended"


def test_leaps_lengthen_no_token_and_double_no_lease(tmp_path: Path) -> None:
    under_leaps(write_config(tmp_path, SETTINGS), lambda _: None)


def test_leaps_by_libfaketime_lengthen_no_token(tmp_path: Path) -> None:
    under_leaps(write_config(tmp_path, SETTINGS), lambda _: None, libfaketime())


def test_leaps_of_postgresql_lengthen_no_token(tmp_path: Path, postgres: Cluster) -> None:
    """The clock of the database leaps together with those of the workers."""
    with fresh(postgres) as url:
        moved = ShiftedDatabase(postgres, url)
        under_leaps(write_config_for(url, tmp_path, SETTINGS), moved.move)
