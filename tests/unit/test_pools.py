"""Pools over a real SQLite file."""

import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from tests.support.servers import START
from tokenauth.errors import (
    InsufficientScope,
    InvalidRequest,
    LeaseLost,
    NoFreeToken,
    PoolFull,
    UnknownPool,
    UnknownToken,
)
from tokenauth.models import ANY_LEASE, Grant, Identity, LeaseCheck, LeaseTerms, Pool, PoolCounts, PoolToken
from tokenauth.pools import MAX_COUNT, Pools, Waits, check_name
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.store import Store
from tokenauth.web.routes.pools import _format_list_cursor, _parse_list_cursor

POOL = Pool("p", lease_ttl=60, token_ttl=240, capacity=5)
ROOMY = Pool("roomy", lease_ttl=60, token_ttl=240)
PERMITS = Pool("permits", lease_ttl=60, capacity=3, prefill=True)
SECRET = Pool("secret", lease_ttl=60, scope="ops")
POOLS = {pool.name: pool for pool in (POOL, ROOMY, PERMITS, SECRET)}
ANN, OPS = Identity("ann"), Identity("ops", ("ops",))
IMPOSSIBLE = ["x" * 257, "a\x00b", "a\nb", "\ud800", "a\u200bb", "\x7f", "a\u3164", "\u2800"]


class ManualClock:
    """A clock that is set by hand and counts how often it is read."""

    def __init__(self) -> None:
        self.now = START
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path}/tokens.db"), 10)
    await opened.start()
    yield opened
    await opened.stop(START)


@pytest.fixture
def pools(store: Store, clock: ManualClock) -> Pools:
    return Pools(POOLS, store, clock, {"roomy": lambda: str(uuid.uuid4())})


async def test_a_pool_is_found_by_name_if_its_scope_allows(pools: Pools) -> None:
    assert pools.find("p") is pools.find("p", ANN) is POOL
    assert pools.find("secret") is pools.find("secret", OPS) is SECRET
    with pytest.raises(InsufficientScope, match="ops"):
        pools.find("secret", ANN)
    for name in ("P", "", "other"):
        with pytest.raises(UnknownPool):
            pools.find(name, OPS)


async def test_the_list_has_the_pools_that_a_user_may_use(pools: Pools) -> None:
    assert pools.usable_by() == pools.usable_by(OPS) == [POOL, ROOMY, PERMITS, SECRET]
    assert pools.usable_by(ANN) == [POOL, ROOMY, PERMITS]


async def test_new_tokens_are_random_in_the_form_of_their_pool(pools: Pools) -> None:
    values = await pools.generate(SECRET, MAX_COUNT)
    assert len(set(values)) == MAX_COUNT
    assert all(len(value) == 64 and value.isalnum() and value.isascii() for value in values)
    assert [token.value for token in await pools.list_tokens(SECRET)] == sorted(values)
    (value,) = await pools.generate(ROOMY, 1)
    assert str(uuid.UUID(value)) == value


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1, 10**30])
async def test_1_to_1000_tokens_are_generated_at_once(pools: Pools, count: int) -> None:
    with pytest.raises(InvalidRequest, match="count: must be from 1 to 1000"):
        await pools.generate(ROOMY, count)
    assert await pools.count(ROOMY) == PoolCounts(0, 0)


async def test_generating_more_than_fit_generates_none(pools: Pools) -> None:
    for count in (6, MAX_COUNT + 1, 10**30):
        with pytest.raises(PoolFull):
            await pools.generate(POOL, count)
    await pools.generate(POOL, 3)
    with pytest.raises(PoolFull):
        await pools.generate(POOL, 3)
    assert await pools.count(POOL) == PoolCounts(3, 0)
    assert len(await pools.generate(POOL, 2)) == 2


@pytest.mark.parametrize(("wait", "shown"), [(0, 60), (0.001, 60), (0.5, 60), (1, 59), (58.75, 2), (59, 1), (59.75, 1)])
async def test_an_empty_pool_names_the_wait_in_whole_seconds(
    pools: Pools, clock: ManualClock, wait: float, shown: int
) -> None:
    await pools.generate(POOL, 1)
    await pools.assign(POOL, "ann")
    clock.now += wait
    with pytest.raises(NoFreeToken) as refusal:
        await pools.assign(POOL, "bob")
    assert refusal.value.retry_after == shown
    clock.now += shown
    assert (await pools.assign(POOL, "bob")).fence == 2


async def test_a_pool_without_leases_names_no_wait(pools: Pools) -> None:
    with pytest.raises(NoFreeToken) as refusal:
        await pools.assign(POOL, "ann")
    assert refusal.value.retry_after is None


async def test_the_holder_keeps_a_lease_alive_and_releases_it(pools: Pools, clock: ManualClock) -> None:
    (value,) = await pools.generate(POOL, 1)
    leased = await pools.assign(POOL, "ann")
    assert leased == PoolToken("p", value, START + 60, "ann", 1, leased_at=START)
    clock.now += 30
    for check in (LeaseCheck("bob"), LeaseCheck("ann", 2)):
        with pytest.raises(LeaseLost):
            await pools.keep_alive(POOL, value, check)
        with pytest.raises(LeaseLost):
            await pools.release(POOL, value, check)
    assert await pools.keep_alive(POOL, value, LeaseCheck("ann", 1)) == leased._replace(free_at=START + 90)
    await pools.release(POOL, value, LeaseCheck("ann", 1))
    assert await pools.get(POOL, value) == PoolToken("p", value, START + 30, None, 1)
    for lost in (pools.keep_alive, pools.release):
        with pytest.raises(LeaseLost):
            await lost(POOL, value)


NAMED: dict[str, Callable[[Pools, str], Awaitable[object]]] = {
    "keep_alive": lambda pools, value: pools.keep_alive(ROOMY, value),
    "keep_alive_any": lambda pools, value: pools.keep_alive_any(ROOMY, value),
    "release": lambda pools, value: pools.release(ROOMY, value),
    "force_release": lambda pools, value: pools.force_release(ROOMY, value, ANY_LEASE, "ops", None),
    "take_over": lambda pools, value: pools.take_over(ROOMY, value, "ops", "ops", ANY_LEASE, None),
    "delete": lambda pools, value: pools.delete(ROOMY, value),
    "get": lambda pools, value: pools.get(ROOMY, value),
}


@pytest.mark.parametrize("operation", NAMED)
async def test_a_missing_token_is_unknown_to_all_operations(pools: Pools, clock: ManualClock, operation: str) -> None:
    (gone,) = await pools.generate(ROOMY, 1)
    (elsewhere,) = await pools.generate(POOL, 1)
    clock.now += 240
    for value in (gone, elsewhere, "", "x", *IMPOSSIBLE):
        with pytest.raises(UnknownToken):
            await NAMED[operation](pools, value)


async def test_a_leased_or_free_token_is_kept_alive(pools: Pools, clock: ManualClock) -> None:
    await pools.generate(POOL, 2)
    leased = await pools.assign(POOL, "ann")
    (free,) = [token for token in await pools.list_tokens(POOL) if token.holder is None]
    clock.now += 30
    assert await pools.keep_alive_any(POOL, leased.value)
    assert await pools.get(POOL, leased.value) == leased._replace(free_at=START + 90)
    assert not await pools.keep_alive_any(POOL, free.value)
    assert await pools.get(POOL, free.value) == free._replace(free_at=START + 30)
    clock.now += 60
    assert not await pools.keep_alive_any(POOL, leased.value)
    assert await pools.get(POOL, leased.value) == PoolToken("p", leased.value, START + 90, None, 1)


@pytest.mark.parametrize("operation", ["delete", "generate"])
async def test_a_lapse_is_logged_where_its_token_is_deleted(pools: Pools, clock: ManualClock, operation: str) -> None:
    """To generate tokens deletes those that have expired."""
    (value,) = await pools.generate(POOL, 1)
    await pools.assign(POOL, "job", "ann")
    granted_at = clock.now
    clock.now += 60 if operation == "delete" else 300
    with structlog.testing.capture_logs() as logs:
        if operation == "delete":
            await pools.delete(POOL, value)
        else:
            await pools.generate(POOL, 5)
        while await pools.note_lapsed(POOL, clock.now, 10):
            pass
    shown = [(event["event"], event["user"], event["fence"], event["held"], event["ended_at"]) for event in logs]
    assert shown == [("lease_lapsed", "ann", 1, 60.0, granted_at + 60)]
    assert pools.counters[POOL.name].lapsed == 1


async def test_no_lapse_is_logged_of_a_deleted_lease(pools: Pools) -> None:
    (value,) = await pools.generate(POOL, 1)
    await pools.assign(POOL, "job", "ann")
    with structlog.testing.capture_logs() as logs:
        await pools.delete(POOL, value)
    assert logs == []


@pytest.mark.parametrize("operation", ["keep_alive_any", "keep_alive_free"])
async def test_a_lapse_is_logged_where_a_token_is_kept(pools: Pools, clock: ManualClock, operation: str) -> None:
    (value,) = await pools.generate(ROOMY, 1)
    await pools.assign(ROOMY, "job", "ann")
    clock.now += 60
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            if operation == "keep_alive_any":
                await pools.keep_alive_any(ROOMY, value)
            else:
                await pools.keep_alive_free(ROOMY)
        assert (await pools.assign(ROOMY, "job")).fence == 2
    shown = [(event["event"], event["user"], event["holder"], event["fence"], event["held"]) for event in logs]
    assert shown == [("lease_lapsed", "ann", "job", 1, 60.0)]
    assert pools.counters[ROOMY.name].lapsed == 1
    assert value not in str(logs)


async def test_all_free_tokens_are_kept_alive_in_batches(pools: Pools, clock: ManualClock) -> None:
    assert await pools.keep_alive_free(ROOMY) == 0
    for _ in range(3):
        await pools.generate(ROOMY, 800)
    clock.now += 200
    leased = await pools.assign(ROOMY, "ann")
    assert await pools.keep_alive_free(ROOMY) == 2399
    clock.now += 239
    assert await pools.count(ROOMY) == PoolCounts(2400, 0)
    assert await pools.get(ROOMY, leased.value) == leased
    clock.now += 1
    assert await pools.count(ROOMY) == PoolCounts(1, 0), "must not extend a leased token"


async def test_prefill_replaces_a_deleted_token(pools: Pools) -> None:
    await pools.prefill()
    await pools.generate(POOL, 3)
    for pool, left in ((PERMITS, 3), (POOL, 2)):
        value = (await pools.assign(pool, "ann")).value
        await pools.delete(pool, value)
        assert await pools.count(pool) == PoolCounts(left, 0)
        with pytest.raises(UnknownToken):
            await pools.get(pool, value)


async def test_only_pools_with_prefill_are_filled_once(pools: Pools) -> None:
    await pools.prefill()
    before = [await pools.list_tokens(pool) for pool in POOLS.values()]
    assert list(map(len, before)) == [0, 0, 3, 0]
    await pools.prefill()
    assert [await pools.list_tokens(pool) for pool in POOLS.values()] == before


async def test_a_large_pool_is_filled_completely(store: Store, clock: ManualClock) -> None:
    pool = Pool("large", lease_ttl=60, capacity=10_001, prefill=True)
    await Pools({"large": pool}, store, clock).prefill()
    assert await store.pools.count(pool, START) == PoolCounts(10_001, 0)


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 7])
async def test_a_changed_capacity_ends_no_lease(pools: Pools, store: Store, clock: ManualClock, capacity: int) -> None:
    await pools.prefill()
    leased = [await pools.assign(PERMITS, "ann") for _ in range(2)]
    pool = Pool("permits", lease_ttl=60, capacity=capacity, prefill=True)
    resized = Pools({"permits": pool}, store, clock)
    await resized.prefill()
    assert await resized.count(pool) == PoolCounts(max(0, capacity - 2), 2)
    for token in leased:
        assert (await resized.keep_alive(pool, token.value, LeaseCheck("ann", 1))).free_at == START + 60
    clock.now += 60
    assert await resized.count(pool) == PoolCounts(capacity, 0)


async def test_permits_are_acquired_and_released_by_count(pools: Pools) -> None:
    await pools.prefill()
    assert await pools.release_next(PERMITS) == (False, 3)
    assert [await pools.acquire(PERMITS, "ann") for _ in range(4)] == [(True, 2), (True, 1), (True, 0), (False, 0)]
    assert [await pools.release_next(PERMITS) for _ in range(4)] == [(True, 1), (True, 2), (True, 3), (False, 3)]


@pytest.mark.parametrize("name", ["a", "ci-7", "Ann O'Neill", "жанна", "\U0001f511", "x" * 256])
def test_a_holder_has_a_name_that_can_be_shown(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", *IMPOSSIBLE], ids=ascii)
def test_an_invisible_holder_is_refused_and_not_echoed(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^holder: ") as refusal:
        check_name(name)
    assert not name or name not in str(refusal.value)


ONCE: dict[str, Callable[[Pools, str], Awaitable[object]]] = {
    **NAMED,
    "generate": lambda pools, _: pools.generate(ROOMY, 2),
    "assign": lambda pools, _: pools.assign(ROOMY, "bob"),
    "acquire": lambda pools, _: pools.acquire(ROOMY, "bob"),
    "release_next": lambda pools, _: pools.release_next(ROOMY),
    "count": lambda pools, _: pools.count(ROOMY),
    "list_tokens": lambda pools, _: pools.list_tokens(ROOMY),
}


async def test_every_operation_reads_the_clock_once(pools: Pools, clock: ManualClock) -> None:
    """A decision uses one instant."""
    for name, operation in ONCE.items():
        await pools.generate(ROOMY, 1)
        value = (await pools.assign(ROOMY, "ann")).value
        await pools.generate(ROOMY, 1)
        before = clock.reads
        await operation(pools, value)
        assert clock.reads == before + 1, name


@pytest.mark.parametrize("look", [1, 2, 3, 100])
async def test_pages_have_each_lease_and_place_once(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    """Wherever a page ends, also where a list does, the next one can be asked for and begins there."""
    mine = [Pool(name, lease_ttl=60, capacity=3, prefill=True) for name in ("lab", "1.5-7-lab", "leases--lab", "-")]
    pools = Pools({pool.name: pool for pool in mine}, store, clock)
    await pools.prefill()
    for pool in mine:
        for user in (ANN, OPS, ANN):
            await pools.assign(pool, "h", user.username)
        for number, user in enumerate((OPS, ANN, ANN)):
            assert isinstance(await pools.lease(pool, user, LeaseTerms("h", f"r{number}", 0)), Waits)
    wanted = await pools.list_leases_and_places(ANN)
    assert (len(wanted.leases), len(wanted.places), wanted.following) == (8, 8, None)
    monkeypatch.setattr("tokenauth.stores.store.LOOK", look)
    for limit, most in (("MAX_COUNT", 17), ("MAX_LOOKED", 25)):
        for size in range(1, most):
            with monkeypatch.context() as patch:
                patch.setattr(f"tokenauth.pools.{limit}", size)
                leases, places, following = await pools.list_leases_and_places(ANN)
                while following is not None:
                    cursor = _parse_list_cursor(_format_list_cursor(following))
                    assert cursor == following
                    page = await pools.list_leases_and_places(ANN, cursor)
                    leases, places, following = [*leases, *page.leases], [*places, *page.places], page.following
            assert (leases, places) == (wanted.leases, wanted.places), (limit, size)


async def test_tokens_without_a_token_ttl_never_expire(pools: Pools, clock: ManualClock) -> None:
    (value,) = await pools.generate(SECRET, 1)
    clock.now += 1e9
    assert SECRET.token_ttl == math.inf
    assert (await pools.assign(SECRET, "ops")).value == value


async def test_a_priority_that_is_no_longer_allowed_is_lost(store: Store, clock: ManualClock) -> None:
    boss = Identity("boss", ("admin",))
    pools, terms = Pools({"p": POOL}, store, clock), LeaseTerms("ci", "r", 0, priority=5)
    await pools.generate(POOL, 1)
    leased = await pools.assign(POOL, "job", "bob")
    assert isinstance(await pools.lease(POOL, boss, terms), Waits)
    await pools.release(POOL, leased.value)
    with pytest.raises(InsufficientScope):
        await pools.lease(POOL, Identity(boss.username, ()), terms)
    assert await pools.count_waiting(POOL) == 0
    assert await pools.count(POOL) == (1, 0)


@pytest.mark.parametrize("free", [False, True])
async def test_a_refused_request_leaves_the_line(store: Store, clock: ManualClock, free: bool) -> None:
    """It waited when the settings of the pool changed. It holds up nobody, and gets no lease."""
    pool = Pool("p", lease_ttl=60, capacity=2)
    pools, terms = Pools({"p": pool}, store, clock), LeaseTerms("ci", "r", 0, ttl=60)
    await pools.generate(pool, 1)
    leased = await pools.assign(pool, "job", "bob")
    assert isinstance(await pools.lease(pool, ANN, terms), Waits)
    if free:
        await pools.release(pool, leased.value)
    shorter = Pool("p", lease_ttl=30, capacity=2)
    later = Pools({"p": shorter}, store, clock)
    with pytest.raises(InvalidRequest, match="count"):
        await later.lease(shorter, ANN, replace(terms, count=3))
    assert await later.count_waiting(shorter) == 1, "those are other terms"
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="ttl"):
            await later.lease(shorter, ANN, terms)
        await later.waiting.close()
        assert await later.count_waiting(shorter) == 0
        assert await later.count(shorter) == (free, not free)


async def test_a_repetition_outlives_changed_settings(store: Store, clock: ManualClock) -> None:
    """The pool can no longer grant it: a client that has lost its answer still gets its leases, or hears they end."""
    pool = Pool("p", lease_ttl=60, capacity=2)
    pools, terms = Pools({"p": pool}, store, clock), LeaseTerms("ci", "r", 0, 2, ttl=60)
    await pools.generate(pool, 2)
    granted = await pools.lease(pool, ANN, terms)
    assert isinstance(granted, Grant)
    smaller = Pool("p", lease_ttl=30, capacity=1)
    later = Pools({"p": smaller}, store, clock)
    again = await later.lease(smaller, ANN, terms)
    assert isinstance(again, Grant)
    assert again.tokens == granted.tokens
    for user, id in ((ANN, "another"), (OPS, "r"), (ANN, None)):
        with pytest.raises(InvalidRequest, match="count: must be from 1 to 1"):
            await later.lease(smaller, user, replace(terms, id=id))
    clock.now += 60
    with pytest.raises(LeaseLost):
        await later.lease(smaller, ANN, terms)
