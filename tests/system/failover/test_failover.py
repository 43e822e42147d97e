"""A cluster with automatic failover keeps every promise while its machines fail, one kind of fault after another."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.support.connections import LOGIN
from tests.support.journal import until
from tests.support.queueing import CAPACITIES, ORDER
from tests.system.failover.load import SERVICE, Load, Outage
from tests.system.failover.machines import Machines, machines
from tests.system.failover.nodes import Nodes, nodes
from tests.system.postgres.crowd import check_log

TTL = 20
"""Seconds after which a leader that Patroni does not hear of is replaced, as in docs/scaling.md."""

_names = (f"failover_{number}" for number in count())


class _LeadershipOverwritten(Exception):
    """Patroni has given the leadership back to a former primary. What its successor has answered is lost."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines() as running:
        yield running


@pytest.fixture(scope="module")
def report() -> Iterator[list[Outage]]:
    """Print a table of the faults at the end."""
    outages: list[Outage] = []
    yield outages
    print("\n| fault | without writes, s | without probes, s | promotion to service, s | answers by status |")
    print("|---|---|---|---|---|", *map(str, outages), sep="\n")


class Trial:
    """Nodes and clients on the cluster, and what they see of one fault."""

    def __init__(self, cluster: Machines, nodes: Nodes, load: Load, report: list[Outage]) -> None:
        self.cluster = cluster
        self.nodes = nodes
        self.load = load
        self._report = report
        self._since = 0.0
        self._promoted: Sequence[float] = ()

    def begin(self) -> None:
        """Begin to measure."""
        self.load.busy()
        self._promoted = self.cluster.promotions()
        self._since = monotonic()

    def promotions(self) -> Sequence[float]:
        """Return when machines were promoted since the beginning."""
        return self.cluster.promotions()[len(self._promoted) :]

    def promoted(self) -> None:
        """Wait until a machine is promoted, and for a while of service."""
        until(lambda: len(self.promotions()) > 0, "a standby is promoted", 60)
        self.served()

    def served(self) -> None:
        """Wait until nothing has been refused for some seconds."""
        crowd = self.load.crowd

        def refused_at() -> float:
            return max((one.at for one in list(crowd.seen) if one.status == 503), default=self._since)

        def calm() -> bool:
            return monotonic() - max(refused_at(), *self.promotions(), self._since) > 2 * SERVICE

        until(lambda: calm() or bool(crowd.faults), "service is back", 60)

    def end(self, fault: str) -> Outage:
        """Note what was measured."""
        outage = self.load.outage(fault, self._since, self.promotions())
        self._report.append(outage)
        return outage


@contextmanager
def trial(cluster: Machines, directory: Path, report: list[Outage]) -> Iterator[Trial]:
    """Run nodes and clients on a new database. At the end, check what they saw."""
    name = next(_names)
    cluster.settle()
    cluster.execute(cluster.primary, f"CREATE DATABASE {name} OWNER tokenauth ENCODING 'UTF8' TEMPLATE template0")
    with nodes(directory / "nodes", cluster.hosts(), name) as running:
        load = Load(running.port, running.servers)
        with load.running():
            yield Trial(cluster, running, load, report)
        primary = cluster.primary
        load.check([(pool, _order(cluster.execute(primary, ORDER.format(pool), name))) for pool in CAPACITIES])
        for server in running.servers:
            check_log(server)


def _order(rows: list[tuple[Any, ...]]) -> list[tuple[str, float, str | None]]:
    return [(id, since, leases) for id, since, leases in rows]


def check_service(outage: Outage) -> None:
    """Check that nothing was refused for longer than SERVICE after the promotion."""
    assert outage.after_promotion is not None
    assert outage.after_promotion < SERVICE, outage


def test_a_killed_primary_costs_nothing_that_was_answered(
    cluster: Machines, tmp_path: Path, report: list[Outage]
) -> None:
    with trial(cluster, tmp_path, report) as run:
        run.begin()
        primary = cluster.primary
        primary.kill()
        run.promoted()
        outage = run.end("primary killed (machine)")
        primary.start_patroni()
        cluster.settle()
        run.load.busy()
    check_service(outage)


def test_a_killed_postgresql_is_replaced_at_once(cluster: Machines, tmp_path: Path, report: list[Outage]) -> None:
    """Patroni of the same machine sees it, and gives the leadership away."""
    with trial(cluster, tmp_path, report) as run:
        run.begin()
        cluster.primary.kill_postgres()
        run.promoted()
        outage = run.end("primary killed (PostgreSQL only)")
        cluster.settle()
        run.load.busy()
    check_service(outage)


def test_a_killed_patroni_is_replaced_with_its_primary(cluster: Machines, tmp_path: Path, report: list[Outage]) -> None:
    """PostgreSQL goes on: until it is stopped, there are two primaries."""
    with trial(cluster, tmp_path, report) as run:
        run.begin()
        primary = cluster.primary
        primary.kill_patroni()
        run.promoted()
        outage = run.end("Patroni killed")
        primary.start_patroni()
        cluster.settle()
        run.load.busy()
    check_service(outage)


def test_a_frozen_primary_that_wakes_decides_nothing(cluster: Machines, tmp_path: Path, report: list[Outage]) -> None:
    """Patroni 3.0.2 may make it the leader again (docs/scaling.md warns of that): then the nodes refuse to use it."""
    with suppress(_LeadershipOverwritten), trial(cluster, tmp_path, report) as run:
        run.begin()
        primary = cluster.primary
        primary.send(signal.SIGSTOP)
        run.promoted()
        outage = run.end("primary frozen")
        run.begin()
        primary.send(signal.SIGCONT)
        woken_at = monotonic()

        def leads_again() -> bool:
            return monotonic() > woken_at + 2 * TTL and cluster.with_role("leader") == [primary]

        def follows() -> bool:
            return primary not in cluster.with_role("leader") and cluster.settled()

        until(lambda: follows() or leads_again(), "the former primary follows, or leads again", 90)
        if leads_again():
            for server in run.nodes.servers:
                with server.client() as client:
                    assert client.post("/api/token", json=LOGIN).status_code == 503
            assert not run.load.crowd.faults
            raise _LeadershipOverwritten
        run.served()
        woken = run.end("former primary woken")
        assert woken.without_writes < SERVICE, woken
    check_service(outage)


def test_a_primary_cut_off_from_etcd_steps_down(cluster: Machines, tmp_path: Path, report: list[Outage]) -> None:
    with trial(cluster, tmp_path, report) as run:
        run.begin()
        primary = cluster.primary
        primary.cut()
        run.promoted()
        outage = run.end("primary cut off from etcd")
        primary.heal()
        cluster.settle()
        run.load.busy()
    check_service(outage)


def test_a_switchover_costs_seconds(cluster: Machines, tmp_path: Path, report: list[Outage]) -> None:
    with trial(cluster, tmp_path, report) as run:
        run.begin()
        primary, standby = cluster.primary, cluster.standby
        cluster.control("switchover", "--master", primary.name, "--candidate", standby.name, "--force")
        run.promoted()
        outage = run.end("planned switchover")
        cluster.settle()
    check_service(outage)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_standby_stops_writes_for_seconds(
    cluster: Machines, tmp_path: Path, report: list[Outage], how: signal.Signals
) -> None:
    """The synchronous one: the other takes its place."""
    with trial(cluster, tmp_path, report) as run:
        run.begin()
        standby = cluster.standby
        standby.kill() if how is signal.SIGKILL else standby.send(how)
        until(lambda: standby not in cluster.with_role("sync_standby") and cluster.settled(2), "it is replaced", 60)
        run.served()
        outage = run.end(f"standby lost ({how.name})")
        standby.start_patroni() if how is signal.SIGKILL else standby.send(signal.SIGCONT)
        cluster.settle()
    assert run.promotions() == []
    assert outage.without_writes < 10, outage
    assert outage.without_probes < SERVICE, outage


def test_a_rolling_restart_of_everything_is_hardly_felt(
    cluster: Machines, tmp_path: Path, report: list[Outage]
) -> None:
    """The nodes, then the standbys, then a switchover and the former primary."""
    with trial(cluster, tmp_path, report) as run:
        run.begin()
        for number in range(2):
            run.nodes.restart(number)
            run.load.busy()
        outages = [run.end("nodes restarted")]
        run.begin()
        primary, standby = cluster.primary, cluster.standby
        for machine in cluster:
            if machine is not primary:
                machine.stop_patroni()
                until(lambda: cluster.settled(2), "two machines replicate")
                machine.start_patroni()
                cluster.settle()
        run.served()
        outages.append(run.end("standbys restarted"))
        run.begin()
        standby = cluster.standby
        cluster.control("switchover", "--master", primary.name, "--candidate", standby.name, "--force")
        run.promoted()
        cluster.settle()
        primary.stop_patroni()
        until(lambda: cluster.settled(2), "two machines replicate")
        primary.start_patroni()
        cluster.settle()
        run.served()
        outages.append(run.end("switchover, and the former primary restarted"))
    assert 503 not in outages[0].statuses, outages[0]
