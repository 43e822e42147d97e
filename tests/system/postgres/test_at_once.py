"""Concurrent changes of several nodes in conflicting orders: there is no deadlock, and all answers are correct."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

import asyncpg
import pytest
from sqlalchemy import text

from tests.support.patience import be_patient
from tests.support.postgres import Cluster
from tests.support.servers import START
from tests.support.suspended import suspended
from tests.system.postgres.nodes import Nodes, busy, connected, fetch, fresh, nodes
from tokenauth.errors import StoreUnavailable
from tokenauth.models import CountUpdate, LeaseCheck, Pool, Token, Use
from tokenauth.stores import circuit_breaker
from tokenauth.stores.changes.pools import pool_lock
from tokenauth.stores.postgres.transaction import SERVER_CLOCK, advisory_key
from tokenauth.stores.store import Store

POOLS = [Pool("p", 60, 240, capacity=40), Pool("q", 60, 240)]
_FILL = "INSERT INTO revocations (digest, at) SELECT sha256(n::text::bytea), $1 FROM generate_series(1, 3000) AS n"
_WAITING = "SELECT locktype FROM pg_locks WHERE NOT granted"
USERS = [f"user{number}" for number in range(6)]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


@pytest.fixture
def url(postgres: Cluster) -> Iterator[str]:
    """Create a database, and check afterwards that there was no deadlock in it."""
    with fresh(postgres) as made, no_deadlock(postgres):
        yield made


@contextmanager
def no_deadlock(cluster: Cluster) -> Iterator[None]:
    """Check that PostgreSQL did not detect a deadlock."""
    before = cluster.log.read_text().count("deadlock detected")
    yield
    assert cluster.log.read_text().count("deadlock detected") == before


def token(number: int, life: int = 100) -> Token:
    """Return a token of one of the users."""
    return Token.new(sha256(b"%d" % number).digest(), USERS[number % len(USERS)], "c", START, int(START) + life)


async def at_once(chance: random.Random, work: Sequence[Awaitable[object]]) -> None:
    """Run everything concurrently, started in random order."""
    shuffled = list(work)
    chance.shuffle(shuffled)
    await asyncio.gather(*shuffled)


@pytest.mark.parametrize("seed", [1])
async def test_leases_locked_in_opposite_orders_end_once(three: Nodes, seed: int) -> None:
    chance = random.Random(seed)
    for pool in POOLS:
        await three[0].pools.generate(pool, [f"t{number}" for number in range(30)], START)
    ended: Counter[tuple[str, str, int]] = Counter()
    expected: Counter[tuple[str, str, int]] = Counter()

    async def release(node: Store, pool: Pool, value: str, fence: int) -> None:
        touched = await node.pools.release(pool, value, START, LeaseCheck("h", fence))
        assert touched is not None
        ended[pool.name, value, fence] += touched.granted

    async def keep_alive(node: Store, pool: Pool, value: str, fence: int) -> None:
        touched = await node.pools.keep_alive(
            pool, value, START, LeaseCheck("h", fence), include_free=chance.random() < 0.5
        )
        assert touched is not None

    for _ in range(3):
        leased = [
            (pool, granted.token.value, granted.token.fence)
            for pool in POOLS
            for granted in await asyncio.gather(
                *(node.pools.assign(pool, "h", START) for node in (*three, three[0]) * 5)
            )
            if granted.token
        ]
        assert len(leased) == 40
        expected.update((pool.name, value, fence) for pool, value, fence in leased)
        work: list[Awaitable[object]] = []
        for node in three:
            order = chance.sample(leased, len(leased))
            work += [release(node, *lease) for lease in order] + [keep_alive(node, *lease) for lease in order[::-1]]
            work += [node.pools.keep_alive_free(pool, START, START, 99) for pool in POOLS]
            work += [node.pools.purge(pool, START, 9) for pool in POOLS]
        await at_once(chance, work)
    assert ended == expected, "each lease must be ended by exactly one of three releases"
    for pool in POOLS:
        assert await three[1].pools.count(pool, START) == (30, 0)


@pytest.mark.parametrize("seed", range(2))
async def test_tokens_ended_in_several_ways_are_logged_once(url: str, three: Nodes, seed: int) -> None:
    """Expired tokens may be removed without an entry in the log. All others need one, and logged tokens are gone."""
    chance = random.Random(seed)
    lasting, expired = [token(number) for number in range(90)], [token(number, -1) for number in range(90, 120)]
    await asyncio.gather(*(three[0].tokens.issue(one, 0, START) for one in lasting + expired))
    later = [token(number) for number in range(200, 290)]
    ended: Counter[bytes] = Counter()

    async def remove(node: Store, one: Token) -> None:
        was = await node.tokens.revoke(one.digest, START)
        ended[one.digest] += was

    async def purge(node: Store, limit: int) -> None:
        assert await node.tokens.purge(START, limit) <= limit

    work: list[Awaitable[object]] = []
    for number, node in enumerate(three):
        work += [remove(node, one) for one in chance.sample(lasting[:60] + expired, 90)]
        work += [node.tokens.issue(one, 4, START) for one in chance.sample(later[number::3], 30)]
        work += [node.tokens.revoke_all(user, START) for user in chance.sample(USERS, 3)]
        work += [purge(node, 7), purge(node, 99), node.purge_revocations(0, 99)]
        keys = [sha256(b"%d" % key).digest()[:16] for key in range(20)]
        work += [
            node.failures.update([CountUpdate(key, 1, at=START) for key in chance.sample(keys, 2)], START)
            for _ in range(30)
        ]
        work += [node.failures.update([CountUpdate(key, -1)], START) for key in chance.sample(keys, 20)]
        work += [node.failures.purge(START + 1, 9)]
    await at_once(chance, work)
    assert max(ended.values()) == 1, "only one revocation of a token may succeed"
    alive = {digest for (digest,) in await fetch(url, "SELECT digest FROM tokens")}
    logged = Counter(digest for (digest,) in await fetch(url, "SELECT digest FROM revocations"))
    assert set(logged.values()) == {1}
    assert not alive & set(logged)
    assert {one.digest for one in lasting + later} <= alive | set(logged), "ended without an entry in the log"
    for user in USERS:
        listed = await three[1].tokens.list(user, START, 999)
        assert sum(one in later for one in listed) <= 4


async def test_a_token_issued_in_remove_all_lives_or_is_logged(url: str, three: Nodes) -> None:
    issued: list[Token] = []

    async def issue(node: Store, first: int, per_user: int) -> None:
        one = token(first + len(issued))
        issued.append(one)
        await node.tokens.issue(one, per_user, START)
        await node.tokens.get(one.digest)

    ended = rounds = 0
    async with busy(
        lambda: issue(three[0], 0, 0),
        lambda: issue(three[0], 10**6, 9),
        lambda: issue(three[1], 2 * 10**6, 0),
        lambda: issue(three[1], 3 * 10**6, 9),
        lambda: three[1].tokens.revoke_all(USERS[0], START),
    ):
        while rounds < 15 or not ended:
            rounds += 1
            ended += await three[2].tokens.revoke_all(None, START)
    alive = {digest for (digest,) in await fetch(url, "SELECT digest FROM tokens")}
    logged = Counter(digest for (digest,) in await fetch(url, "SELECT digest FROM revocations"))
    assert set(logged.values()) == {1}
    assert alive | set(logged) == {one.digest for one in issued}
    assert not alive & set(logged)
    for one in issued:
        expected = one if one.digest in alive else None
        assert await three[0].engine.token(one.digest) == expected


async def test_failures_counted_in_opposite_orders_all_count(three: Nodes) -> None:
    chance = random.Random(1)
    keys = [sha256(b"%d" % key).digest()[:16] for key in range(60)]
    for number in range(1, 16):
        notes = [CountUpdate(key, 1, at=START) for key in keys]
        await asyncio.gather(*(node.failures.update(chance.sample(notes, 60), START) for node in three))
        assert {one.count for one in (await three[0].failures.get(keys)).values()} == {3 * number}


async def test_of_two_log_trims_at_most_one_waits_for_rows(url: str, three: Nodes) -> None:
    """If both locked some rows and waited for others, they could deadlock, depending on the order of the rows.

    Only one node at a time has the duty to trim, but a slow one may still be busy when the next begins.
    """
    await fetch(url, _FILL, START - 10)
    async with connected(url) as other:
        async with other.transaction():
            await other.execute("SELECT FROM revocations WHERE seq = 5 FOR UPDATE")
            trimming = [asyncio.create_task(node.purge_revocations(START, 1000)) for node in three[:2]]
            waiting = await other.fetch(_WAITING)
            while len(waiting) < sum(not one.done() for one in trimming):
                waiting = await other.fetch(_WAITING)
        assert sum(kind != "advisory" for (kind,) in waiting) <= 1
        assert sum(await asyncio.gather(*trimming)) >= 1000
    assert await fetch(url, "SELECT max(seq) FROM revocations") == [(3000,)], "must keep the last entry"


async def test_capacity_holds_at_every_default_isolation_level(postgres: Cluster, url: str) -> None:
    """A transaction sees tokens that were added while it waited for the pool's lock."""
    name = url.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'repeatable read'")
    pool = Pool("p", 60, capacity=10)
    async with nodes(url, 4) as opened:
        adding = [opened[number % 4].pools.generate(pool, [f"t{number}"], START) for number in range(60)]
        assert sum(await asyncio.gather(*adding)) == 10


async def test_a_purge_keeps_to_its_limit_in_every_plan(postgres: Cluster, url: str) -> None:
    """PostgreSQL runs a subquery once for each row of a nested loop."""
    name = url.rpartition("/")[2]
    for setting in ("enable_hashjoin", "enable_mergejoin", "enable_hashagg", "enable_sort", "enable_material"):
        postgres.execute(f'ALTER DATABASE "{name}" SET {setting} = off')
    async with nodes(url) as (node,):
        for number in range(9):
            await node.tokens.issue(token(number, life=number + 1), 0, START)
        assert [await node.tokens.purge(START + 100, 2) for _ in range(5)] == [2, 2, 2, 2, 1]


async def test_uses_wait_for_no_row_that_others_have_locked(three: Nodes, url: str) -> None:
    """They are written later, so no revocation can wait for them while they wait for it."""
    slides = [token(number)._replace(max_expires_at=int(START) + 1000) for number in range(2)]
    for one in slides:
        await three[0].tokens.issue(one, 0, START)
    uses = [Use(one.digest, START + 50, int(START) + 150, START - 3550, START + 110) for one in slides]
    async with connected(url) as other, other.transaction():
        await other.execute("SELECT FROM tokens WHERE digest = $1 FOR UPDATE", slides[0].digest)
        found = await three[1].tokens.note_uses(uses, START)  # or it would wait until it fails
        assert [found[one.digest].expires_at - int(START) for one in slides] == [100, 150]
    found = await three[1].tokens.note_uses(uses, START)
    assert [found[one.digest].expires_at - int(START) for one in slides] == [150, 150]


async def test_nothing_is_made_after_the_503(three: Nodes, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends are frozen before they read the statements, and go on when the clients have been answered."""
    pool, other_pool = Pool("p", 60), Pool("q", 60)
    first, second, revoked, other = token(0), token(len(USERS)), token(1), token(2)
    await three[0].tokens.issue(revoked, 0, START)
    for each in (pool, other_pool):
        await three[0].pools.generate(each, ["t"], START)
    async with nodes(url, 3, connections=1) as (issuing, assigning, revoking):
        await issuing.tokens.issue(other, 1, START)  # now its statement is prepared
        await assigning.pools.assign(other_pool, "h", START)
        await revoking.tokens.revoke(other.digest, START)
        backends = [await backend(node) for node in (issuing, assigning, revoking)]
        with suspended(backends):
            with monkeypatch.context() as impatient:
                impatient.setattr(circuit_breaker, "TIMEOUT", 0.3)
                answers = await asyncio.gather(
                    issuing.tokens.issue(first, 1, START),
                    assigning.pools.assign(pool, "h", START),
                    revoking.tokens.revoke(revoked.digest, START),
                    return_exceptions=True,
                )
            assert [type(answer) for answer in answers] == [StoreUnavailable] * 3
            await three[0].tokens.issue(second, 1, START)
        async with asyncio.timeout(30), connected(url) as db:
            while await db.fetch("SELECT FROM pg_stat_activity WHERE pid = ANY($1)", backends):
                pass
    alive = {digest for (digest,) in await fetch(url, "SELECT digest FROM tokens")}
    assert alive == {second.digest, revoked.digest}
    assert await fetch(url, "SELECT pool FROM pool_tokens WHERE holder IS NOT NULL") == [("q",)]


async def backend(node: Store) -> int:
    """Return the process that serves the only connection of a node."""
    pid: int = await node.engine.connections.read_once(  # type: ignore[attr-defined]
        lambda db: db.execute(text("SELECT pg_backend_pid()")).scalar_one()
    )
    return pid


async def test_a_token_replaced_while_it_expires_is_not_revived(url: str) -> None:
    """It is live when it is to be kept alive, and another takes its place before the pool is locked for that."""
    pool = Pool("p", 60, token_ttl=60, capacity=1, prefill=True)
    async with nodes(url, 2, clock=None) as (here, there), connected(url) as other:
        now = here.engine.clock()
        await here.pools.keep_alive(pool, "?", now, LeaseCheck("h", None), include_free=True)
        await there.pools.fit(pool, ["old"], now)
        async with other.transaction():
            await other.execute("SELECT pg_advisory_xact_lock($1)", advisory_key(pool_lock(pool)))
            await fetch(url, f"UPDATE pool_tokens SET free_at = {SERVER_CLOCK} - 59.7")  # noqa: S608 - a constant
            filled = asyncio.create_task(there.pools.fit(pool, ["new"], now))
            await until_waiting(other, 1, filled)
            kept = asyncio.create_task(
                here.pools.keep_alive(pool, "old", now, LeaseCheck("h", None), include_free=True)
            )
            await until_waiting(other, 2, kept)
            while not await other.fetchval(f"SELECT bool_and(free_at < {SERVER_CLOCK} - 60) FROM pool_tokens"):  # noqa: S608
                pass
        await filled
        assert await kept is None
        assert await there.pools.count(pool, here.engine.clock()) == (1, 0)


async def until_waiting(db: asyncpg.Connection, number: int, task: asyncio.Task[object]) -> None:
    """Wait until some statements wait for locks, or the task has not had to wait."""
    while len(await db.fetch(_WAITING)) < number and not task.done():
        pass
