"""The feed of revocations: a cache is never wrong, whatever happens to its connection and to the log."""

from collections.abc import Sequence

import pytest
import structlog

from tests.contract.conftest import token
from tests.support.servers import START
from tests.support.tcp_proxy import Proxy, listener
from tests.system.postgres.feeds import (  # noqa: F401 - some are fixtures
    HOUR,
    LOGS,
    TOKENS,
    Node,
    be_patient,
    change_the_log,
    find,
    left,
    lose,
    make_database,
    open_nodes,
    opened,
    run_network,
    until,
)
from tests.system.postgres.nodes import connected
from tokenauth.stores.postgres import listener as feed

# How revocations arrive.


async def test_removals_arrive_by_notification_at_once(monkeypatch: pytest.MonkeyPatch, nodes: Sequence[Node]) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT", HOUR)
    here, there = nodes
    await there.reread()  # from now on it waits for an hour
    there.listener.drain()
    for one in TOKENS:
        await here.remove(one)
        await until(lambda: one.digest in (there.listener.drain() or ()))  # noqa: B023


@pytest.mark.parametrize(("channel", "polls"), [("elsewhere", 0), ("", 1)], ids=["unnotified", "refused"])
async def test_without_notifications_heartbeats_bring_removals(
    monkeypatch: pytest.MonkeyPatch, nodes: Sequence[Node], url: str, channel: str, polls: int
) -> None:
    """To listen to nothing is an error in PostgreSQL, as all of LISTEN is in some that resemble it."""
    monkeypatch.setattr(feed, "CHANNEL", channel)
    with structlog.testing.capture_logs() as logs:
        async with opened(url) as third:
            assert await third.valid(TOKENS) == left()
            await nodes[0].remove(TOKENS[0])
            await until(lambda: TOKENS[0].digest in (third.listener.drain() or ()))
    assert [entry["event"] for entry in logs] == ["revocation_feed_polls"] * polls


# The feed is lost, and comes back.


@pytest.mark.usefixtures("patient")
async def test_while_the_feed_is_lost_every_token_is_looked_up(nodes: Sequence[Node], network: Proxy) -> None:
    here, there = nodes
    assert await there.looks_up(TOKENS) == [False] * len(TOKENS)
    await lose(there, network)
    for _ in range(3):
        assert await there.looks_up(TOKENS) == [True] * len(TOKENS)
    await here.remove(TOKENS[0])
    assert await there.valid(TOKENS) == left(TOKENS[0])


@pytest.mark.usefixtures("patient")
async def test_a_returning_feed_drops_only_removed_tokens(nodes: Sequence[Node], network: Proxy) -> None:
    here, there = nodes
    await here.remove(TOKENS[0])
    await there.reread()
    await lose(there, network)
    await here.remove(*TOKENS[1:4])
    await find(there, network)
    assert await there.looks_up(TOKENS) == [True] * 4 + [False] * 8
    assert await there.valid(TOKENS) == left(*TOKENS[:4])


async def test_a_lost_feed_is_logged_once_and_so_is_its_return(nodes: Sequence[Node], network: Proxy) -> None:
    there = nodes[1]
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            before = len(network.connections)
            await lose(there, network)
            await until(lambda: len(network.connections) < before)  # noqa: B023
            for _ in range(3):  # tries to come back, and is broken each time
                await until(lambda: len(network.connections) == before)  # noqa: B023
                await until(lambda: len(network.connections) < before)  # noqa: B023
            await find(there, network)
    assert [entry["event"] for entry in logs] == ["revocation_feed_lost", "revocation_feed_restored"] * 2


# The log is not what it was.


@pytest.mark.parametrize("change", LOGS)
@pytest.mark.usefixtures("patient")
async def test_no_damage_to_the_log_hides_a_removal(
    nodes: Sequence[Node], network: Proxy, url: str, change: str
) -> None:
    await change_the_log(nodes, network, url, change, 2)


@pytest.mark.usefixtures("patient")
async def test_a_log_that_begins_with_a_gap_is_incomplete(nodes: Sequence[Node], network: Proxy, url: str) -> None:
    """A node that started with an empty log may have missed what was removed and trimmed since."""
    here, there = nodes
    await lose(there, network)
    await here.remove(*TOKENS[:3])
    async with connected(url) as db:
        await LOGS["trimmed-to-the-last"](db)
    await find(there, network)
    assert await there.valid(TOKENS) == left(*TOKENS[:3])


@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.usefixtures("patient")
async def test_more_removals_than_are_read_at_once_are_not_missed(
    monkeypatch: pytest.MonkeyPatch, nodes: Sequence[Node], network: Proxy, count: int
) -> None:
    monkeypatch.setattr(feed, "_MAX_READ", 4)
    here, there = nodes
    await lose(there, network)
    await here.remove(*TOKENS[:count])
    await find(there, network)
    assert await there.valid(TOKENS) == left(*TOKENS[:count])
    await here.remove(TOKENS[11])
    await there.reread()
    assert await there.valid(TOKENS) == left(*TOKENS[:count], TOKENS[11])


@pytest.mark.usefixtures("patient")
async def test_an_idle_node_does_not_queue_removals_without_end(
    monkeypatch: pytest.MonkeyPatch, nodes: Sequence[Node]
) -> None:
    """A process that only leases pool tokens, or is a spare, still reads the log."""
    monkeypatch.setattr(feed, "_MAX_READ", 4)
    here, there = nodes
    for one in TOKENS[:5]:
        await here.remove(one)
        await there.reread()
    assert await there.valid(TOKENS) == left(*TOKENS[:5])
    for one in TOKENS[5:]:
        await here.remove(one)
        await there.reread()
    assert len(there.listener.drain() or ()) <= 4


# What a node does itself it knows at once.


@pytest.mark.parametrize("how", ["one", "one-that-was-gone", "all", "all-of-a-user", "too-many"])
@pytest.mark.usefixtures("patient")
async def test_a_node_refuses_at_once_what_it_has_ended_itself(nodes: Sequence[Node], network: Proxy, how: str) -> None:
    """Its feed is half-open, and it does not know yet."""
    here, there = nodes
    network.freeze(listener)
    assert there.listener.is_current()
    if how == "one":
        await there.remove(TOKENS[0])
    elif how == "one-that-was-gone":
        await here.remove(TOKENS[0])
        assert not await there.tokens.revoke(TOKENS[0].digest, START)
    elif how == "too-many":
        await there.tokens.issue(token(99, age=-99), 12, START)
    else:
        await there.tokens.revoke_all("ann" if how == "all-of-a-user" else None, START, TOKENS[1].digest)
    assert await there.valid([TOKENS[0]]) == [False]
    assert await there.valid([TOKENS[1]]) == [True]
