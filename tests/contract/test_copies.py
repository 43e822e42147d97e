"""Copies of one request, whose clients go before they are answered: no lease is taken from one that was answered."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.conftest import SCRIPTS, STORES, Place, Places, Templates
from tests.support.servers import START
from tokenauth.models import Grant, LeaseRequest, Pool
from tokenauth.stores.store import PoolStore
from tokenauth.waiting_line import KEPT

POOL = Pool("p", lease_ttl=60, capacity=1)
KEY = ("ann", "a")


async def ask(pools: PoolStore, copies: int = 1) -> list[Grant]:
    """Send copies of the same request, in one batch; return what was granted."""
    asked = (pools.ask(POOL, *KEY, "x", START, keep=40.0) for _ in range(copies))
    return [answer for answer in await asyncio.gather(*asked) if isinstance(answer, Grant)]


async def busy(pools: PoolStore) -> list[str]:
    """Fill the pool, and lease its token to someone else."""
    await pools.generate(POOL, ["t1"], START)
    token = (await pools.assign(POOL, "busy", START)).token
    assert token is not None
    return [token.value]


async def asks(pools: PoolStore) -> dict[tuple[str, str], int]:
    """Return how often each waiting request was asked for: only a process that knows this can serve it."""
    return {request.key: request.asks for request in await pools.list_requests(POOL, START, 10)}


async def is_leased(pools: PoolStore, grant: Grant) -> bool:
    """Return whether the lease that was granted runs."""
    [token] = grant.tokens
    found = await pools.get(POOL, token.value, START)
    return found is not None and found.is_leased(START) and found.fence == token.fence


@pytest.mark.parametrize("keep", [None, 10.0])
async def test_copies_of_a_batch_lose_no_lease(pools: PoolStore, other: Place, keep: float | None) -> None:
    await pools.generate(POOL, ["t1"], START)
    copies = await ask(pools, 4)
    assert [len(grant.before) for grant in copies] == [0, 0, 0, 1], "they came in one batch, and one is counted"
    later = await ask(other.pools)
    for grant in (*copies[:2], copies[3], *later):
        assert not await pools.put_back(POOL, grant.request, keep, START)
        assert await is_leased(pools, copies[2]), "its client was answered"
    assert await other.pools.put_back(POOL, copies[2].request, keep, START)
    assert not await is_leased(pools, copies[2]), "all have gone"


@pytest.mark.parametrize("keep", [KEPT, 20.0], ids=["does not wait", "waits less"])
async def test_a_copy_shortens_no_wait(pools: PoolStore, other: Place, keep: float) -> None:
    await busy(pools)
    await ask(pools)
    await other.pools.ask(POOL, *KEY, "x", START, keep=keep)
    [place] = await pools.list_requests(POOL, START + 39, 10)
    assert place.kept_until == START + 40


async def test_a_request_without_an_id_is_taken_back(pools: PoolStore) -> None:
    await pools.generate(POOL, ["t1"], START)
    grant = await pools.ask(POOL, "ann", None, "x", START)
    assert isinstance(grant, Grant)
    assert await pools.put_back(POOL, grant.request, None, START)
    assert not await is_leased(pools, grant)


async def test_the_process_that_was_asked_last_serves(pools: PoolStore, other: Place) -> None:
    [held], first, last = await busy(pools), {KEY: 1}, {KEY: 2}
    await ask(pools)
    assert await pools.lost_places(POOL, first, START) == []
    await ask(other.pools)
    assert isinstance(await pools.ask(POOL, *KEY, "x", START, keep=KEPT), LeaseRequest), "that one does not wait"
    assert await pools.lost_places(POOL, first, START) == [KEY]
    assert await other.pools.lost_places(POOL, last, START) == []
    await pools.release(POOL, held, START)
    assert not await pools.may_have_turn(POOL, first, START)
    assert await pools.take_turns(POOL, first, START) == []
    assert await other.pools.may_have_turn(POOL, last, START)
    [grant] = await other.pools.take_turns(POOL, last, START)
    assert await other.pools.lost_places(POOL, last, START) == [KEY]
    assert await other.pools.put_back(POOL, grant.request, 10, START)
    assert await pools.take_turns(POOL, first, START) == []
    assert len(await other.pools.take_turns(POOL, last, START)) == 1


class Step(NamedTuple):
    """What clients and their processes do next. `pick` chooses among the answers that are under way."""

    what: str
    process: int
    copies: int
    pick: int
    keep: float | None


@dataclass
class Clients:
    """The answers that are under way, those that reached their clients, and those whose clients had gone."""

    under_way: list[Grant] = field(default_factory=list)
    reached: list[Grant] = field(default_factory=list)
    gone: list[Grant] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    """The fences of leases that a client has ended itself."""

    async def lose(self, store: PoolStore, step: Step) -> None:
        if self.under_way:
            lost = self.under_way.pop(step.pick % len(self.under_way))
            self.gone.append(lost)
            await store.put_back(POOL, lost.request, step.keep, START)

    async def check(self, store: PoolStore) -> None:
        for grant in self.reached:
            assert await is_leased(store, grant) or grant.tokens[0].fence in self.ended
        kept = {grant.tokens[0].fence for grant in (*self.under_way, *self.reached)}
        for grant in self.gone:
            assert grant.tokens[0].fence in kept or not await is_leased(store, grant)


async def make(step: Step, stores: Sequence[PoolStore], clients: Clients) -> None:
    store, second = stores[step.process], stores[1 - step.process]
    if step.what == "ask":
        clients.under_way += await ask(store, step.copies)
    elif step.what == "lose":
        await clients.lose(store, step)
    elif step.what == "ask and lose":
        granted, _, _ = await asyncio.gather(
            ask(store, step.copies), clients.lose(store, step), clients.lose(second, step)
        )
        clients.under_way += granted
    elif step.what == "grant":
        clients.under_way += await store.take_turns(POOL, await asks(store), START)
    elif step.what == "reach" and clients.under_way:
        clients.reached.append(clients.under_way.pop(step.pick % len(clients.under_way)))
    elif step.what == "release" and clients.reached:
        [token] = clients.reached[-1].tokens
        clients.ended.add(token.fence)
        await store.release(POOL, token.value, START)
        await store.purge(POOL, START, 100)


steps = st.builds(
    Step,
    st.sampled_from(["ask", "ask", "lose", "lose", "lose", "ask and lose", "grant", "reach", "release"]),
    st.integers(0, 1),
    st.integers(1, 3),
    st.integers(0, 9),
    st.sampled_from([None, 10.0, 10.0]),
)


async def live_through(name: str, directory: Path, script: Sequence[Step]) -> None:
    places, clients = Places(STORES[name], directory), Clients()
    try:
        stores = [(await places.open()).pools, (await places.open()).pools]
        await stores[0].generate(POOL, ["t1"], START)
        for step in script:
            await make(step, stores, clients)
            await clients.check(stores[0])
    finally:
        await places.close_all()


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", STORES)
def test_no_order_of_events_takes_an_answered_lease(templates: Templates, name: str, examples: int) -> None:
    @settings(SCRIPTS, max_examples=examples)
    @given(st.lists(steps, min_size=10, max_size=40))
    def holds(script: list[Step]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            asyncio.run(live_through(name, templates.fresh(name, Path(scratch) / "store"), script))

    holds()
