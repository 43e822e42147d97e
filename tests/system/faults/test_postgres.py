"""PostgreSQL is restarted, cut off and frozen under load: every answer is correct or 503, and nothing is lost."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from threading import Event
from time import monotonic

import pytest

from tests.support.connections import LOGIN, Connection
from tests.support.history import RealTime
from tests.support.journal import until
from tests.support.postgres import Cluster, cluster
from tests.support.races import POOLS, Race
from tests.support.servers import starting, worker
from tests.support.tcp_proxy import Proxy
from tests.system.postgres.crowd import POOL, Crowd, check_log, is_outage, postgres_config, two_workers
from tokenauth.stores.postgres.connections import TIMEOUT

LEASE_TTL = 1.0
RESUMED = 2.0
"""Maximum seconds until everything is answered after PostgreSQL is back. This bound is documented."""


@pytest.fixture(scope="module")
def private() -> Iterator[Cluster]:
    """Run a server that tests may stop, with fsync."""
    with cluster() as running:
        yield running


@pytest.fixture
def url(private: Cluster, request: pytest.FixtureRequest) -> str:
    """Create an empty database, and return its URL."""
    return private.create(request.node.name[-60:])


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


def test_a_restart_under_load_is_503_and_loses_nothing(private: Cluster, url: str, tmp_path: Path) -> None:
    """PostgreSQL crashes three times, twice for longer than a cache is trusted. tokenauth is not restarted."""
    resumed = []
    with two_workers(postgres_config(tmp_path, url, POOL)) as servers:
        crowd = Crowd(servers)
        with crowd.running(30):
            for seconds in (0.0, 1.5, 3.0):
                crowd.busy(500)
                outages, down_at = crowd.count(503), monotonic()
                private.stop("immediate")
                until(lambda: not seconds or crowd.count(503) > outages + 100, "the outage is noticed")  # noqa: B023
                until(lambda: monotonic() >= down_at + seconds, "the outage lasts long enough")  # noqa: B023
                private.start()
                resumed.append(crowd.resumed(monotonic()))
            crowd.busy(500)
        assert all(server.process.poll() is None for server in servers)
        with worker(tmp_path / "config.toml") as fresh:
            crowd.check([fresh])
    assert min(resumed) < RESUMED, resumed
    assert crowd.count(503) > 200


def test_connections_ended_under_load_lose_nothing(private: Cluster, url: str, tmp_path: Path) -> None:
    """The next ones are ended when 30 requests have succeeded: on a slow machine, too, the service can reconnect."""
    with two_workers(postgres_config(tmp_path, url, POOL)) as servers:
        crowd = Crowd(servers, seed=2)
        with crowd.running(30):
            for _ in range(100):
                done = len(crowd.seen) - crowd.count(503)
                until(lambda: len(crowd.seen) - crowd.count(503) >= done + 30 or bool(crowd.faults), "30 are served")  # noqa: B023
                private.terminate_all(name_of(url))
            crowd.busy(500)
        crowd.check()
    reads = [seen.status for seen in crowd.seen if seen.kind == "probe"]
    assert reads.count(503) < len(reads) / 10, "must retry queries"


@pytest.mark.parametrize("seed", [1, 2])
def test_restarts_break_no_promise_of_thirty_holders(private: Cluster, url: str, tmp_path: Path, seed: int) -> None:
    """Leases last one second of the database's clock, and no worker is restarted."""
    chance, over = Random(seed), Event()

    def linger() -> None:
        """Wait for a short time, and sometimes for about as long as a lease lasts."""
        over.wait(chance.expovariate(20) if chance.random() < 0.9 else chance.uniform(0.5, 1.5) * LEASE_TTL)

    with two_workers(postgres_config(tmp_path, url, POOLS % {"lease_ttl": LEASE_TTL})) as servers:
        race = Race([server.port for server in servers], RealTime(), LEASE_TTL, seed, outages=True)
        with race.running(lambda: not over.is_set(), linger):
            try:
                for _ in range(6):
                    length, later = race.length, monotonic() + chance.uniform(2, 3) * LEASE_TTL
                    until(lambda: race.length > length + 200 and monotonic() > later, "the race continues")  # noqa: B023
                    private.restart("immediate")
                until(race.is_eventful, "every kind of event has happened", 60)
            finally:
                over.set()
        race.finish()


def test_a_network_that_fails_under_load_loses_nothing(private: Cluster, url: str, tmp_path: Path) -> None:
    """The network is cut, and frozen for longer than a statement may take. Afterwards all requests succeed."""
    with Proxy(private.port) as proxy:
        config = postgres_config(tmp_path, private.url(name_of(url), proxy.port), POOL)
        with two_workers(config) as servers:
            crowd = Crowd(servers, seed=3)
            with crowd.running(20):
                for harm in (proxy.cut, proxy.freeze, proxy.cut):
                    crowd.busy(300)
                    outages, began = crowd.count(503), monotonic()
                    harm()
                    until(lambda: crowd.count(503) > outages + 20 and monotonic() > began + 6, "the outage lasts", 60)  # noqa: B023
                    proxy.heal()
                    crowd.resumed(monotonic())
            crowd.check()


def test_connections_that_are_silently_lost_are_replaced(private: Cluster, url: str, tmp_path: Path) -> None:
    """As when a machine was replaced by another: the old connections never receive anything again.

    The service must notice without writes, which would fail sooner.
    """
    with Proxy(private.port) as proxy, ThreadPoolExecutor(4) as others:
        more = "[tokens]\nper_user = 0\ncache_size = 1"
        config = postgres_config(tmp_path, private.url(name_of(url), proxy.port), more, connections=2)
        with worker(config) as server, Connection(server.port) as connection:
            tokens = [connection.log_in() for _ in range(40)]

            def accepted(number: int) -> bool:
                """Whether all tokens of a quarter are accepted. None of them is in the cache."""
                with Connection(server.port, 60) as mine:
                    answers = [mine.ask("GET", f"/api/token?token={token}") for token in tokens[number::4]]
                return not any(map(is_outage, answers)) and all(answer.json()["valid"] for answer in answers)

            assert all(others.map(accepted, range(4)))
            lost = set(proxy.connections)
            assert len(lost) == 3
            proxy.freeze(only=lambda one: one in lost)
            began = monotonic()
            until(lambda: all(others.map(accepted, range(4))), "all tokens are accepted again", 60)
            assert monotonic() - began < 40
            check_log(server)


def test_a_standby_is_refused_until_it_is_promoted(private: Cluster, url: str, tmp_path: Path) -> None:
    """A standby may lack the latest revocations."""
    name = name_of(url)
    with private.standby() as standby, Proxy(private.port) as proxy:
        config = postgres_config(tmp_path, private.url(name, proxy.port))
        with worker(config) as server, Connection(server.port) as connection:
            kept, ended = connection.log_in(), connection.log_in()
            standby.follow(private)
            proxy._target = ("127.0.0.1", standby.port)
            proxy.cut()
            proxy.heal()
            until(lambda: is_outage(connection.ask("GET", f"/api/token?token={kept}")), "the store is unavailable")
            assert is_outage(connection.ask("POST", "/api/token", LOGIN))
            ready = connection.ask("GET", "/readyz")
            assert ready.status == 503
            reason = f"no host is the primary: 127.0.0.1:{proxy.port} is a standby"
            assert ready.json()["reason"].endswith(f": {reason}")
            connection.log_out(ended)
            with starting(config) as other:
                assert other.process.wait(30) not in {None, 0}
                log = other.log.read_text()
                assert f"cannot be used: {reason}" in log
                check_log(other)
            standby.execute("SELECT pg_promote()")
            until(lambda: connection.ask("POST", "/api/token", LOGIN).status == 200, "the standby is the primary now")
            assert connection.valid(kept)
            until(lambda: bool(server.events("token_revoked")), "the queued revocation is written")
            assert not connection.valid(ended)
            assert connection.ask("GET", "/readyz").status == 200
            check_log(server)


@pytest.mark.parametrize("harm", ["cut", "frozen"])
def test_a_stop_is_quick_without_postgresql(private: Cluster, url: str, tmp_path: Path, harm: str) -> None:
    """It logs the revocations that it could not write. There are two writes, each with its own timeout."""
    with Proxy(private.port) as proxy:
        config = postgres_config(tmp_path, private.url(name_of(url), proxy.port), POOL)
        with worker(config) as server, Connection(server.port) as connection:
            token = connection.log_in()
            crowd = Crowd([server])
            with crowd.running(16):  # opens connections
                until(lambda: len(proxy.connections) >= 4, "the worker has several connections")
            (proxy.cut if harm == "cut" else proxy.freeze)()
            connection.log_out(token)
            assert server.events("revocation_held_in_memory")
            began = monotonic()
            assert server.stop() in {0, -signal.SIGTERM}
            assert monotonic() - began < 2 * TIMEOUT + 10
            assert server.events("revocation_lost")
            assert server.events("stopped")
            assert not [event for event in server.events() if "Exception" in event["event"]]
            check_log(server)
