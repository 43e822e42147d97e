"""The revocation feed on PostgreSQL, at length: every kind of network failure, suspended processes, a failover."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.contract.conftest import token
from tests.support.connections import Connection
from tests.support.journal import background
from tests.support.postgres import Cluster, cluster
from tests.support.servers import START
from tests.support.tcp_proxy import Only, Proxy, every, listener
from tests.system.postgres.feeds import (  # noqa: F401 - some are fixtures
    LOGS,
    Node,
    be_patient,
    change_the_log,
    database_of,
    make_database,
    open_nodes,
    opened,
    run_network,
)
from tests.system.postgres.watched import Pair, Watch, check_promise, pair, sleep_through
from tokenauth.stores.postgres.listener import BOUND


@pytest.fixture(scope="module")
def two(postgres: Cluster, directory: Path) -> Iterator[Pair]:
    """Run two workers. The second connects to the database through a proxy."""
    with pair(postgres, database_of(postgres).rpartition("/")[2], directory) as running:
        yield running


Break = Callable[[Proxy, Only], None]

BROKEN: dict[str, Break] = {
    "healthy": lambda network, only: None,
    "late": lambda network, only: network.delay(0.1, only),
    "slow": lambda network, only: network.delay(0.3, only),
    "slower-than-the-bound": lambda network, only: network.delay(0.6, only),
    "very-slow": lambda network, only: network.delay(3, only),
    "cut": Proxy.cut,
    "half-open": Proxy.freeze,
}


@pytest.mark.parametrize("only", [listener, every], ids=["listener", "all"])
@pytest.mark.parametrize("what", BROKEN)
def test_the_other_node_refuses_within_the_bound(two: Pair, what: str, only: Only) -> None:
    """Ten tokens are revoked at random times. The other node is probed about each before, during and after that."""
    chance = random.Random(what)
    with Connection(two.here.port) as here, Connection(two.there.port) as there:
        tokens = [here.log_in() for _ in range(12)]
        good = tokens[:2]
        assert all(map(there.valid, tokens))
        ended: dict[str, float] = {}
        with Watch(two.there, tokens, 1) as watch:
            BROKEN[what](two.network, only)
            for value in tokens[2:]:
                time.sleep(chance.uniform(0, 0.3))
                here.log_out(value)
                ended[value] = time.monotonic()
            time.sleep(BOUND)
            two.network.heal()
            watch.until_asked_after(time.monotonic())
        check_promise(two, watch, ended, good)
        if only is listener:
            assert all(None not in watch.seen[value].valid for value in tokens), "the database was reachable"
        watch.until_valid(good[0])
        two.until_quiet()


@pytest.mark.parametrize("seconds", [0.3, 0.35, 0.4])
def test_an_unsteady_feed_revives_no_refused_token(two: Pair, seconds: float) -> None:
    """The answers are so late that the feed is current only for short times, repeatedly."""
    chance = random.Random(seconds)
    with Connection(two.here.port) as here, Connection(two.there.port) as there:
        for _ in range(5):
            tokens = [here.log_in() for _ in range(10)]
            assert all(map(there.valid, tokens))
            with Watch(two.there, tokens, 1) as watch:
                two.network.delay(seconds, listener)
                time.sleep(chance.uniform(1, 2))
                for value in tokens:
                    time.sleep(chance.uniform(0, 0.1))
                    here.log_out(value)
                watch.until_asked_after(time.monotonic() + BOUND)
                two.network.heal()
            for seen in watch.seen.values():
                assert seen.last(answer=True) <= seen.first(answer=False), "accepted after it was refused"


def test_a_lost_feed_and_its_return_are_logged_once_each(two: Pair) -> None:
    before = len(two.there.events("revocation_feed_restored"))
    two.network.freeze(listener)
    time.sleep(12)  # longer than each reconnection attempt
    two.network.heal()
    two.until_quiet()
    events = [event["event"] for event in two.there.events() if event["event"].startswith("revocation_feed_")]
    assert events[-2:] == ["revocation_feed_lost", "revocation_feed_restored"]
    assert events.count("revocation_feed_lost") == events.count("revocation_feed_restored") == before + 1
    assert "revocation_feed_polls" not in events


def test_a_resumed_node_does_not_trust_its_old_cache(two: Pair) -> None:
    """Twenty times, at random points of its work, since it is kept busy."""
    chance = random.Random(5)
    with Connection(two.here.port) as here, Connection(two.there.port) as busy:
        bystander = here.log_in()
        for _ in range(20):
            ended, good = here.log_in(), here.log_in()
            with background(lambda: busy.valid(bystander)):
                time.sleep(chance.uniform(0, 0.3))
                changes = [(ended, lambda: here.log_out(ended)), (good, lambda: None)]  # noqa: B023
                assert sleep_through(two, changes, 30) == [False, True]


@pytest.mark.parametrize("more", [1, 3, 5, 8])
@pytest.mark.parametrize("change", LOGS)
@pytest.mark.usefixtures("patient")
async def test_no_damage_to_the_log_hides_a_removal(
    nodes: Sequence[Node], network: Proxy, url: str, change: str, more: int
) -> None:
    await change_the_log(nodes, network, url, change, more)


@pytest.mark.parametrize("lost", ["removals", "tokens", "both"])
def test_after_a_lossy_failover_a_node_follows_the_database(lost: str) -> None:
    """A lagging standby replaces the primary. The node must drop what it cached from the primary."""
    with cluster(fsync=False) as primary:
        url = database_of(primary)
        with primary.standby() as spare:
            asyncio.run(_fail_over(primary, spare, url, lost))


async def _fail_over(primary: Cluster, spare: Cluster, url: str, lost: str) -> None:
    kept, ended, added = token(1), token(2, age=-1), token(3, age=-2)
    async with opened(url) as node:
        await node.tokens.issue(kept, 0, START)
        await node.tokens.issue(ended, 0, START)
        await node.tokens.issue(token(4, age=-3), 0, START)
        await node.remove(token(4))  # the log is not empty
        await node.reread()
        spare.follow(primary)
        spare.stop()
        if lost != "tokens":
            await node.remove(ended)
        if lost != "removals":
            await node.tokens.issue(added, 0, START)
        await node.reread()
        assert await node.valid([kept, ended, added]) == [True, lost == "tokens", lost != "removals"]
        assert await node.looks_up([kept]) == [False]
        primary.stop("immediate")
        spare.port = primary.port
        spare.start()
        spare.execute("SELECT pg_promote()")
        await node.reread()
        assert await node.valid([kept, ended, added]) == [True, True, False]
