"""The waiting line against a model of it, kept in lists by rules of its own. Two processes take turns on each store."""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.conftest import SCRIPTS, STORES, Places, Templates
from tests.support.servers import START
from tokenauth.errors import LeaseLost, NoFreeToken, RequestDiffers
from tokenauth.models import Grant, LeaseRequest, Pool, RequestKey
from tokenauth.stores.store import PoolStore

POOL = Pool("p", lease_ttl=60, capacity=3)
KEEP = 45.0
IDS = "abcdefgh"


class Step(NamedTuple):
    """One operation. What its numbers mean depends on it."""

    what: str
    id: str
    number: int
    process: int
    seconds: float


@dataclass
class Waits:
    """A request in the line of the model."""

    id: str
    count: int
    priority: int
    since: float
    joined: int
    kept_until: float

    @property
    def order(self) -> tuple[float, int]:
        return self.since - 60 * self.priority, self.joined


@dataclass
class Model:
    """What waits, what is leased, and what was granted."""

    now: float = START
    joined: int = 0
    waiting: dict[str, Waits] = field(default_factory=dict)
    leases: dict[str, tuple[float, int]] = field(default_factory=dict)
    """The end and the fence of each token's lease."""
    fences: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("t0", "t1", "t2"), 0))
    granted: dict[str, dict[str, int]] = field(default_factory=dict)
    """The fences of the tokens that each request was granted."""

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.waiting = {id: each for id, each in self.waiting.items() if self.now < each.kept_until}
        self.leases = {token: lease for token, lease in self.leases.items() if self.now < lease[0]}

    def join(self, id: str, count: int, priority: int, keep: float) -> Waits:
        self.joined += 1
        return Waits(id, count, priority, self.now, self.joined, self.now + keep)

    def turns(self, own: Sequence[str], *more: Waits) -> list[str]:
        """Return which of some requests are served now."""
        free, served = 3 - len(self.leases), []
        for each in sorted([*self.waiting.values(), *more], key=lambda each: each.order):
            if each.count > free:
                break
            free -= each.count
            if each.id in own:
                served.append(each.id)
        return served

    def grant(self, grant: Grant, count: int) -> None:
        """Take over what was granted, and check that it was free."""
        assert len(grant.tokens) == count
        for token in grant.tokens:
            assert token.value not in self.leases
            assert token.fence == self.fences[token.value] + 1
            self.fences[token.value] = token.fence
            self.leases[token.value] = (self.now + 60, token.fence)
        self.granted[grant.request.id] = {token.value: token.fence for token in grant.tokens}
        self.waiting.pop(grant.request.id, None)

    def runs(self, id: str) -> bool:
        return all(self.leases.get(token, (0, 0))[1] == fence for token, fence in self.granted[id].items())


async def ask(store: PoolStore, model: Model, step: Step) -> None:
    """Ask with terms that depend on the id, or once in a while with others."""
    index = IDS.index(step.id)
    differs = step.number == 9
    count, priority = 1 + index % 3, (0, 0, 1, -1)[index % 4]
    keep = None if step.number == 8 else KEEP
    ttl = 30.0 if differs else None
    known, granted = model.waiting.get(step.id), step.id in model.granted
    answer = await store.ask(POOL, "ann", step.id, "x", model.now, count, priority, ttl, keep=keep)
    if (known or granted) and differs:
        assert isinstance(answer, RequestDiffers)
    elif granted:
        if model.runs(step.id):
            assert isinstance(answer, Grant)
            assert {token.value: token.fence for token in answer.tokens} == model.granted[step.id]
        else:
            assert isinstance(answer, LeaseLost)
    elif differs:
        await store.leave(POOL, ("ann", step.id), model.now)
        if isinstance(answer, Grant):
            assert await store.put_back(POOL, answer.request, None, model.now)
            for token in answer.tokens:
                model.fences[token.value] += 1
    else:
        mine = known or model.join(step.id, count, priority, KEEP)
        if step.id in model.turns([step.id], *(() if known else (mine,))):
            assert isinstance(answer, Grant)
            model.grant(answer, count)
        elif keep is None:
            assert isinstance(answer, NoFreeToken)
        else:
            assert isinstance(answer, LeaseRequest)
            mine.kept_until = model.now + KEEP
            model.waiting[step.id] = mine


async def take_turns(store: PoolStore, model: Model, step: Step) -> None:
    """Serve the requests of a process that has some of them."""
    own, keys = await some(store, model, step)
    wanted = model.turns(own)
    assert await store.may_have_turn(POOL, keys, model.now) is bool(wanted)
    serve(model, wanted, await store.take_turns(POOL, keys, model.now))


async def hand_over(store: PoolStore, model: Model, step: Step) -> None:
    """Release a token, and serve the requests of a process that has some of them."""
    own, keys = await some(store, model, step)
    token = f"t{step.number % 3}"
    ended = model.leases.pop(token, None) is not None
    released, found = await store.hand_over(POOL, token, keys, model.now)
    assert released is not None
    assert released.granted is ended
    serve(model, model.turns(own) if ended else [], found)


async def some(store: PoolStore, model: Model, step: Step) -> tuple[Sequence[str], Mapping[RequestKey, int]]:
    """Return some ids, and those of them that wait as a process has them."""
    own = [id for number, id in enumerate(IDS) if (step.number + 1) * 37 >> number & 1]
    waiting = await store.list_requests(POOL, model.now, 100)
    return own, {request.key: request.asks for request in waiting if request.id in own}


def serve(model: Model, wanted: Sequence[str], found: Sequence[Grant]) -> None:
    counts = {id: model.waiting[id].count for id in wanted}
    assert [grant.request.id for grant in found] == wanted
    for grant in found:
        model.grant(grant, counts[grant.request.id])


async def assign(store: PoolStore, model: Model, _: Step) -> None:
    """Lease without a place in the line."""
    late = model.join("late", 1, 0, 0)
    answer = await store.assign(POOL, "late", model.now)
    assert (answer.token is not None) is bool(model.turns(["late"], late))
    if answer.token is not None:
        model.fences[answer.token.value] += 1
        model.leases[answer.token.value] = (model.now + 60, answer.token.fence)


async def release(store: PoolStore, model: Model, step: Step) -> None:
    token = f"t{step.number % 3}"
    answer = await store.release(POOL, token, model.now)
    assert answer is not None
    assert answer.granted is (model.leases.pop(token, None) is not None)


async def leave(store: PoolStore, model: Model, step: Step) -> None:
    left = await store.leave(POOL, ("ann", step.id), model.now)
    assert (left is not None) is (model.waiting.pop(step.id, None) is not None)


async def purge(store: PoolStore, model: Model, _: Step) -> None:
    await store.note_lapsed(POOL, START, model.now, 100)
    await store.purge(POOL, model.now, 100)


DO = {each.__name__: each for each in (ask, take_turns, hand_over, assign, release, leave, purge)}

steps = st.builds(
    Step,
    st.sampled_from(
        [
            *("ask", "ask", "ask", "take_turns", "take_turns", "hand_over", "hand_over"),
            *("release", "release", "assign", "leave", "purge"),
        ]
    ),
    st.sampled_from(IDS),
    st.integers(0, 9),
    st.integers(0, 1),
    st.sampled_from([0, 0, 0.5, 1, 15, 30, 61]),
)


async def live_through(name: str, directory: Path, script: Sequence[Step]) -> None:
    places, model = Places(STORES[name], directory), Model()
    try:
        both = [await places.open(), await places.open()]
        assert await both[0].pools.generate(POOL, [*model.fences], START)
        for step in script:
            model.pass_time(step.seconds)
            store = both[step.process].pools
            await DO[step.what](store, model, step)
            in_line = [request.id for request in await store.list_requests(POOL, model.now, 100)]
            assert in_line == [each.id for each in sorted(model.waiting.values(), key=lambda each: each.order)]
            for position, id in enumerate(in_line, 1):
                place = await store.find_place(POOL, ("ann", id), model.now)
                assert place == (position, len(in_line))
    finally:
        await places.close_all()


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", STORES)
def test_the_line_is_as_its_model_after_each_step(templates: Templates, name: str, examples: int) -> None:
    @settings(SCRIPTS, max_examples=examples)
    @given(st.lists(steps, min_size=20, max_size=50))
    def holds(script: list[Step]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            asyncio.run(live_through(name, templates.fresh(name, Path(scratch) / "store"), script))

    holds()
