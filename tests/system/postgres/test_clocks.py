"""Leases and logins end by the database's clock, not by the clocks of the nodes. It may be set back."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.pool_users import PoolUser, refusal
from tests.support.postgres import Cluster
from tests.support.servers import Server, worker
from tests.system.postgres.clocks import PATIENT, ShiftedDatabase, skewed
from tests.system.postgres.nodes import fetch, fresh, nodes, write_config_for
from tokenauth.models import LeaseCheck, Pool
from tokenauth.stores.store import Store

HOUR = 3600
SKEWS = (HOUR, -HOUR)
LEASE_TTL, TOKEN_TTL = 1000, 5000
MARGIN = 300
"""Seconds that a test may take without affecting its result."""

POOL = Pool("p", lease_ttl=LEASE_TTL)
SETTINGS = f"""
[tokens]
ttl = {TOKEN_TTL}

[pools.p]
capacity = 1
prefill = true
lease_ttl = {LEASE_TTL}
"""


@pytest.fixture
def moved(postgres: Cluster) -> Iterator[ShiftedDatabase]:
    """Create a database whose clock can be moved."""
    with fresh(postgres) as url:
        yield ShiftedDatabase(postgres, url)


@pytest.fixture
def config(moved: ShiftedDatabase, tmp_path: Path) -> Path:
    return write_config_for(moved.url, tmp_path, SETTINGS)


@pytest.fixture
def wrong(config: Path) -> Iterator[list[Server]]:
    """Run two workers whose machines' clocks differ by two hours."""
    with skewed(config, SKEWS[0]) as fast, skewed(config, SKEWS[1]) as slow:
        yield [fast, slow]


@pytest.fixture
def connections(wrong: list[Server]) -> Iterator[list[Connection]]:
    with Connection(wrong[0].port) as fast, Connection(wrong[1].port) as slow:
        yield [fast, slow]


async def test_the_clock_of_the_database_can_be_moved(moved: ShiftedDatabase) -> None:
    """The other tests rely on this. It uses the expressions of the store's queries."""
    difference = "extract(epoch FROM clock_timestamp()) - extract(epoch FROM pg_catalog.clock_timestamp())"
    age = "extract(epoch FROM clock_timestamp() - transaction_timestamp())"
    for seconds, total in ((0, 0), (HOUR, HOUR), (-3 * HOUR, -2 * HOUR)):
        moved.move(seconds)
        ((ahead, passed),) = await fetch(moved.url, f"SELECT {difference}, {age}")
        assert abs(float(ahead) - total) < MARGIN
        assert 0 <= passed < MARGIN


def test_the_machines_clocks_are_two_hours_apart(connections: list[Connection]) -> None:
    dates = [parsedate_to_datetime(each.ask("GET", "/healthz").headers["date"]) for each in connections]
    assert abs((dates[0] - dates[1]).total_seconds() - 2 * HOUR) < MARGIN


def test_nodes_agree_after_the_database_clock_jumped_ahead(
    moved: ShiftedDatabase, connections: list[Connection]
) -> None:
    """Only one node made a request meanwhile. Both continue from the later time."""
    busy, idle = (PoolUser(each) for each in connections)
    moved.move(HOUR)
    until(lambda: busy.ask("GET", "/p").status == 200 and _latest(moved) > 0, "the busy node has noticed")
    moved.move(-HOUR)
    lease = idle.assign("p")
    for _ in range(3):
        assert busy.call("POST", "/p/leases") == refusal("no_free_token"), "the token must still be leased"
    assert busy.ask("PUT", f"/p/leases/{lease.token}", {"fence": lease.fence}).status == 200
    assert idle.ask("DELETE", f"/p/leases/{lease.token}", {"fence": lease.fence}).status == 204


def _latest(moved: ShiftedDatabase) -> float:
    """Return how far the stored time is ahead of the clock, in hours."""
    sql = "SELECT at - extract(epoch FROM pg_catalog.clock_timestamp()) FROM marks WHERE name = 'clock'"
    ((ahead,),) = asyncio.run(fetch(moved.url, sql))
    return round(float(ahead) / HOUR)


def test_after_a_clock_is_set_back_the_oldest_login_ends(moved: ShiftedDatabase, tmp_path: Path) -> None:
    """The new login must not evict itself, since its answer is a success."""
    config = write_config_for(moved.url, tmp_path, "[tokens]\nper_user = 2")
    with worker(config, env=PATIENT) as running, Connection(running.port) as connection:
        tokens = [connection.log_in() for _ in range(2)]
        moved.move(-HOUR)
        for _ in range(3):
            tokens.append(connection.log_in())
            assert [connection.valid(token) for token in tokens[-3:]] == [False, True, True]


def test_nodes_with_wrong_clocks_use_the_database_clock(moved: ShiftedDatabase, connections: list[Connection]) -> None:
    users = [PoolUser(each) for each in connections]
    for holder, other in (users, users[::-1]):
        first = holder.assign("p")
        assert LEASE_TTL - MARGIN < first.expires_in <= LEASE_TTL
        assert other.call("POST", "/p/leases") == refusal("no_free_token")
        moved.move(LEASE_TTL - MARGIN)
        assert other.call("POST", "/p/leases") == refusal("no_free_token"), (
            "the lease is live by the clock of the database"
        )
        moved.move(MARGIN + 1)
        second = other.assign("p")
        assert (second.token, second.fence) == (first.token, first.fence + 1), (
            "the lease has ended by the clock of the database"
        )
        assert holder.ask("DELETE", f"/p/leases/{first.token}", {"fence": first.fence}).status == 409
        assert other.ask("DELETE", f"/p/leases/{first.token}", {"fence": second.fence}).status == 204
    for each in connections:
        assert all(each.valid(user.token) for user in users)
    moved.move(TOKEN_TTL - 2 * (LEASE_TTL + 1) - MARGIN)
    for each in connections:
        assert all(each.valid(user.token) for user in users), "the tokens are live by the clock of the database"
    moved.move(MARGIN + 1)
    for each in connections:
        until(lambda: not any(each.valid(one.token) for one in users), "both nodes see the end")  # noqa: B023


def test_a_clock_set_back_revives_and_shortens_nothing(
    moved: ShiftedDatabase, config: Path, connections: list[Connection]
) -> None:
    early = PoolUser(connections[0])
    first = early.assign("p")
    moved.move(TOKEN_TTL + 1)
    for each in connections:
        until(lambda: not each.valid(early.token), "both nodes see the end")  # noqa: B023
    late = [PoolUser(each) for each in connections]
    moved.move(-2 * TOKEN_TTL)
    with worker(config, env=PATIENT) as started, Connection(started.port) as later:
        users = [*late, PoolUser(later)]
        for each in (*connections, later):
            assert not each.valid(early.token), "must stay expired"
            assert all(each.valid(one.token) for one in users)
        for one in users:
            assert one.keep_alive("p", first.token, fence=first.fence) == refusal("lease_lost"), "must stay lapsed"
        second = late[0].assign("p")
        assert (second.token, second.fence) == (first.token, first.fence + 1)
        for one in users:
            assert one.call("POST", "/p/leases") == refusal("no_free_token")
            assert one.release("p", first.token, fence=first.fence) == refusal("lease_lost")
        moved.move(2 * TOKEN_TTL + LEASE_TTL - MARGIN)
        for one in users:
            assert one.call("POST", "/p/leases") == refusal("no_free_token")
        moved.move(MARGIN + 1)
        third = users[-1].assign("p")
        assert (third.token, third.fence) == (first.token, second.fence + 1)


async def test_a_clock_set_back_does_not_cost_a_holder_its_lease(moved: ShiftedDatabase) -> None:
    """Tests the store without the service's monotonic clock."""
    async with nodes(moved.url, 2, clock=None) as (one, other):
        now = one.clock()
        await one.pools.generate(POOL, ["t1"], now)
        leased = (await one.pools.assign(POOL, "ann", now)).token
        assert leased is not None
        moved.move(-HOUR)
        assert (await other.pools.assign(POOL, "bob", 0)).token is None
        extended = await other.pools.keep_alive(POOL, "t1", 0, LeaseCheck("ann", 1))
        assert extended is not None
        assert extended.granted
        assert extended.token.free_at == leased.free_at, "an extension must not shorten a lease"


LONG = replace(POOL, lease_ttl=2 * HOUR)


async def _lease(node: Store, pool: Pool, now: float) -> bool:
    return (await node.pools.assign(pool, "bob", now)).token is not None


async def _keep_alive(node: Store, pool: Pool, now: float) -> bool:
    kept = await node.pools.keep_alive(pool, "t1", now, LeaseCheck("ann", 1))
    return kept is not None and kept.granted


@pytest.mark.parametrize(
    ("pool", "lease"),
    [(LONG, _lease), (LONG, _keep_alive), (replace(LONG, per_user=2), _lease)],
    ids=["lease-at-once", "keep-alive-at-once", "lease-in-a-transaction"],
)
async def test_a_lease_by_a_clock_ahead_records_its_time(
    moved: ShiftedDatabase, pool: Pool, lease: Callable[[Store, Pool, float], Awaitable[bool]]
) -> None:
    """Else it would last until that time comes again, if the clock is set back before the node notices the jump."""
    async with nodes(moved.url, clock=None) as (one,):
        now = one.clock()
        await one.pools.generate(pool, ["t1", "t2"], now)
        assert (await one.pools.assign(pool, "ann", now)).token is not None
        moved.move(HOUR)
        assert await lease(one, pool, now)
        assert await asyncio.to_thread(_latest, moved) == 1
