"""Who waits in a process: two services on one database are two workers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.support.servers import write_config
from tokenauth.errors import (
    ClientGone,
    InsufficientScope,
    InvalidRequest,
    LeaseLost,
    NoFreeToken,
    PlaceLost,
    StoreUnavailable,
    UnknownRequest,
)
from tokenauth.models import Grant, Identity, LeaseTerms, Place, Pool, PoolToken
from tokenauth.pools import Pools, Waits
from tokenauth.service import Service, create_service
from tokenauth.settings import loader
from tokenauth.stores.sqlite.engine import SqliteEngine
from tokenauth.waiting import Waiter

ANN, BOB, OPS = Identity("ann"), Identity("bob"), Identity("ops", ("admin",))
AT_ONCE = 20.0
"""Seconds in which something happens that happens at once, on a slow machine."""


class Workers:
    """Two workers, and a pool of one token, which is leased."""

    def __init__(self, one: Service, other: Service) -> None:
        self.services = one, other
        self.pools, self.other = one.pools, other.pools
        self.pool: Pool = one.pools.find("p")
        self.tasks: list[asyncio.Task[Any]] = []

    async def lease_all(self) -> PoolToken:
        await self.pools.generate(self.pool, 1)
        return await self.pools.assign(self.pool, "first", "bob")

    async def ask(
        self, id: str | None = None, pools: Pools | None = None, gone: Callable[[], bool] | None = None, **terms: Any
    ) -> asyncio.Task[Grant | Waits]:
        """Begin to wait, and return when the process holds the request."""
        pools = pools or self.pools
        wanted = LeaseTerms("job", id, **{"wait": 30, **terms})
        before = self._waiters(pools)
        more = () if gone is None else (gone,)
        task = self._start(pools.lease(self.pool, ANN, wanted, *more))
        while not task.done() and self._waiters(pools) <= before:  # noqa: ASYNC110 - a waiter has no event for this
            await asyncio.sleep(0.001)
        return task

    def _waiters(self, pools: Pools) -> set[Waiter]:
        return {waiter for line in pools.waiting._lines.values() for waiter in line.waiters.values()}

    def _start(self, work: Coroutine[Any, Any, Grant | Waits]) -> asyncio.Task[Grant | Waits]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.append(task)
        return task


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    settings = loader.load(write_config(tmp_path, '[pools.p]\ncapacity = 5\nlease_ttl = "60s"'))
    async with AsyncExitStack() as stack:
        one, other = create_service(settings), create_service(settings)
        for service in (one, other):
            await stack.enter_async_context(service.running())
        workers = Workers(one, other)
        yield workers
        for task in workers.tasks:
            task.cancel()
        await asyncio.gather(*workers.tasks, return_exceptions=True)


async def granted(task: asyncio.Task[Grant | Waits]) -> PoolToken:
    """Wait for the one token of a request."""
    async with asyncio.timeout(AT_ONCE):
        answer = await task
    assert isinstance(answer, Grant), answer
    [token] = answer.tokens
    return token


@pytest.mark.parametrize("where", ["the same worker", "another worker"])
async def test_a_released_token_goes_to_who_waits(workers: Workers, where: str) -> None:
    first = await workers.lease_all()
    waiting = await workers.ask()
    releasing = workers.pools if where == "the same worker" else workers.other
    await releasing.release(workers.pool, first.value)
    token = await granted(waiting)
    assert (token.value, token.username, token.fence) == (first.value, "ann", 2)
    counters = workers.pools.counters["p"]
    assert (counters.granted, counters.waited) == (2, 1)


async def test_releases_at_once_go_to_all_who_wait(workers: Workers) -> None:
    """Each process has some of them, and releases some tokens."""
    await workers.pools.generate(workers.pool, 5)
    held = [await workers.pools.assign(workers.pool, "first", "bob") for _ in range(5)]
    waiting = [await workers.ask(pools=(workers.pools, workers.other)[n % 2]) for n in range(5)]
    both = [workers.pools, workers.pools, workers.other, workers.pools, workers.other]
    await asyncio.gather(*(pools.release(workers.pool, token.value) for pools, token in zip(both, held, strict=True)))
    got = [await granted(task) for task in waiting]
    assert {token.value for token in got} == {token.value for token in held}
    assert await workers.pools.count(workers.pool) == (0, 5)


async def test_a_wait_that_ends_with_a_release_is_served(workers: Workers) -> None:
    """The release has begun, so it may have been served, and its client must not be told to ask again."""
    first = await workers.lease_all()
    waiting = await workers.ask()
    releasing = asyncio.get_running_loop().create_task(workers.pools.release(workers.pool, first.value))
    while not workers.pools.waiting._lines["p"]._serving:  # noqa: ASYNC110 - a release has no event for this
        await asyncio.sleep(0)
    workers.pools.waiting.stop()
    await releasing
    assert (await granted(waiting)).fence == 2


async def test_clients_are_served_in_their_order(workers: Workers) -> None:
    token = await workers.lease_all()
    waiting = [await workers.ask(pools=(workers.pools, workers.other)[n % 2]) for n in range(6)]
    for task in waiting:
        await workers.pools.release(workers.pool, token.value)
        token = await granted(task)
    assert token.fence == 7


async def test_who_waits_too_long_is_told_its_place(workers: Workers) -> None:
    await workers.lease_all()
    await workers.ask()
    answer = await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=0.01))
    assert answer == Waits("mine", Place(2, 2))
    again = await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=0))
    assert again == answer


async def test_the_same_request_waits_in_one_place_only(workers: Workers) -> None:
    first = await workers.lease_all()
    older = await workers.ask("mine")
    newer = await workers.ask("mine")
    assert await older == Waits("mine", Place(1, 1))
    elsewhere = await workers.ask("mine", workers.other)
    await workers.pools.release(workers.pool, first.value)
    token = await granted(elsewhere)
    answer = await newer
    if isinstance(answer, Waits):  # it was told before the release that another process was asked last
        answer = await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=30))
    assert isinstance(answer, Grant)
    assert [*answer.tokens] == [token]
    late = await workers.other.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=30))
    assert isinstance(late, Grant)
    assert [*late.tokens] == [token]


async def test_a_request_served_elsewhere_is_found_at_its_end(workers: Workers) -> None:
    first = await workers.lease_all()
    here = await workers.ask("mine", wait=0.4)
    there = await workers.ask("mine", workers.other)
    await workers.other.release(workers.pool, first.value)
    answer = await here
    if isinstance(answer, Waits):  # its wait was over before the release: the client asks again
        answer = await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=30))
    assert isinstance(answer, Grant)
    assert [*answer.tokens] == [await granted(there)]


@pytest.mark.parametrize("id", [None, "mine"])
async def test_a_client_that_disconnects_leaves_the_line(workers: Workers, id: str | None) -> None:
    await workers.lease_all()
    gone: list[bool] = []
    waiting = await workers.ask(id, gone=lambda: bool(gone))
    gone.append(True)
    with structlog.testing.capture_logs() as logs:
        with pytest.raises(ClientGone):
            async with asyncio.timeout(AT_ONCE):
                await waiting
        async with asyncio.timeout(AT_ONCE):
            while True:
                count, found = await workers.pools.list_requests(workers.pool, 9)
                if id is None and count == 0 and logs:
                    break
                if id is not None and found[0].kept_until < workers.pools.now() + 11:
                    break
                await asyncio.sleep(0.01)
    left = [event["holder"] for event in logs if event["event"] == "request_left"]
    assert left == (["job"] if id is None else []), "who can ask again keeps the place for a while"


@pytest.mark.parametrize("id", [None, "mine"])
async def test_a_lease_of_a_gone_client_is_taken_back(workers: Workers, id: str | None) -> None:
    """The client is found to be gone only when the lease has been granted."""
    first = await workers.lease_all()
    looks: list[bool] = []
    released = False

    def gone() -> bool:
        if released:
            looks.append(len(looks) > 0)
        return any(looks)

    waiting = await workers.ask(id, gone=gone)
    after = await workers.ask()
    released = True
    await workers.pools.release(workers.pool, first.value)
    with pytest.raises(ClientGone):
        async with asyncio.timeout(AT_ONCE):
            await waiting
    if id is not None:
        again = await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", id, wait=30))
        assert isinstance(again, Grant)
        await workers.pools.release(workers.pool, again.tokens[0].value)
    assert (await granted(after)).value == first.value


async def test_a_process_that_stops_lets_clients_ask_again(workers: Workers) -> None:
    first = await workers.lease_all()
    waiting = await workers.ask("mine")
    workers.pools.waiting.stop()
    assert await waiting == Waits("mine", Place(1, 1))
    assert await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=30)) == Waits(
        "mine", Place(1, 1)
    )
    moved = await workers.ask("mine", workers.other)
    await workers.pools.release(workers.pool, first.value)
    assert (await granted(moved)).fence == 2


@pytest.mark.parametrize("where", ["the same worker", "another worker"])
async def test_a_request_that_is_taken_out_is_refused(workers: Workers, where: str) -> None:
    """Also if a token is free when its process notices."""
    first = await workers.lease_all()
    waiting = await workers.ask("mine", wait=2)
    deleting = workers.pools if where == "the same worker" else workers.other
    with structlog.testing.capture_logs() as logs:
        await deleting.leave_line(workers.pool, "ann", "mine")
    assert [(event["event"], event["user"], event["holder"]) for event in logs] == [("request_left", "ann", "job")]
    assert 0 <= logs[0]["waited"] < AT_ONCE
    await deleting.release(workers.pool, first.value)
    with pytest.raises(PlaceLost):
        await waiting
    assert await deleting.count(workers.pool) == (1, 0)
    with pytest.raises(UnknownRequest):
        await deleting.leave_line(workers.pool, "ann", "mine")


async def test_an_outage_ends_the_wait_and_not_the_place(workers: Workers) -> None:
    first = await workers.lease_all()
    waiting = await workers.ask("mine", workers.other)
    engine = workers.services[1].store.engine
    assert isinstance(engine, SqliteEngine)
    engine.reader.close()
    with pytest.raises(StoreUnavailable):
        async with asyncio.timeout(AT_ONCE):
            await waiting
    assert (await workers.pools.list_requests(workers.pool, 9))[0] == 1
    await workers.pools.release(workers.pool, first.value)
    again = await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=30))
    assert isinstance(again, Grant)


async def test_a_cancelled_wait_holds_no_lease(workers: Workers) -> None:
    first = await workers.lease_all()
    waiting = await workers.ask()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    after = await workers.ask(pools=workers.other)
    await workers.pools.release(workers.pool, first.value)
    place = await workers.pools.list_requests(workers.pool, 9)
    assert place[0] >= 1
    assert not after.done(), "its place is kept for as long as it was asked for"


async def test_without_wait_it_never_waits(workers: Workers) -> None:
    await workers.lease_all()
    with pytest.raises(NoFreeToken) as refusal:
        await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine"))
    assert refusal.value.retry_after == 60
    assert (await workers.pools.list_requests(workers.pool, 9))[0] == 0
    assert workers.pools.counters["p"].denied == 1


async def test_a_lost_lease_is_told(workers: Workers) -> None:
    await workers.pools.generate(workers.pool, 1)
    answer = await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=1))
    assert isinstance(answer, Grant)
    await workers.pools.release(workers.pool, answer.tokens[0].value)
    with pytest.raises(LeaseLost):
        await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", "mine", wait=1))


@pytest.mark.parametrize(
    "terms",
    [
        {"count": 0},
        {"count": 6},
        {"priority": -101},
        {"wait": 60.1},
        {"wait": -1},
        {"ttl": 0},
        {"ttl": 61},
        {"labels": ("arm",)},
    ],
    ids=str,
)
async def test_terms_that_cannot_be_met_are_refused(workers: Workers, terms: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        await workers.pools.lease(workers.pool, OPS, LeaseTerms("job", **terms))


async def test_only_managers_raise_a_priority(workers: Workers) -> None:
    await workers.pools.generate(workers.pool, 2)
    with pytest.raises(InsufficientScope):
        await workers.pools.lease(workers.pool, ANN, LeaseTerms("job", priority=1))
    for user, priority in ((ANN, -100), (OPS, 100)):
        assert isinstance(await workers.pools.lease(workers.pool, user, LeaseTerms("job", priority=priority)), Grant)


async def test_leases_and_waits_are_logged(workers: Workers) -> None:
    with structlog.testing.capture_logs() as logs:
        first = await workers.lease_all()
        waiting = await workers.ask()
        await workers.pools.release(workers.pool, first.value)
        await granted(waiting)
    assert [event["event"] for event in logs] == ["request_waits"]
    assert first.value not in str(logs)


async def test_a_release_is_logged_before_the_next_lease(workers: Workers) -> None:
    workers.pool = replace(workers.pool, log_leases=True)
    with structlog.testing.capture_logs() as logs:
        first = await workers.lease_all()
        waiting = await workers.ask()
        await workers.pools.release(workers.pool, first.value)
        await granted(waiting)
    assert [(event["event"], event["holder"]) for event in logs] == [
        ("lease_granted", "first"),
        ("request_waits", "job"),
        ("lease_released", "first"),
        ("lease_granted", "job"),
    ]
