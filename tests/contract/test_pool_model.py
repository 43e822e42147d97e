"""PoolStore against a model: in any order of operations, the promises of pools hold after each step.

Holders may crash at any time, and nothing purges lapsed or expired tokens.
"""

import asyncio
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.conftest import SCRIPTS, STORES, Opener, Place, Places, Templates
from tests.contract.pool_model import Model
from tokenauth.models import START_OF_LEASES, LeaseChange, LeaseCheck, Pool, PoolCounts, PoolToken
from tokenauth.stores.store import PoolStore

BOUNDED = Pool("bounded", lease_ttl=8, token_ttl=20, capacity=5)
UNBOUNDED = replace(BOUNDED, name="unbounded", capacity=None)
PREFILLED = Pool("prefilled", lease_ttl=30, capacity=5, prefill=True)
FOR_EVER = [replace(pool, token_ttl=math.inf) for pool in (BOUNDED, UNBOUNDED)]
AGEING = replace(BOUNDED, name="ageing", ages_while_leased=True)
RECLAIMED = [replace(pool, reclaim_delay=4) for pool in (BOUNDED, AGEING, PREFILLED)]
TERMS = [PREFILLED, BOUNDED, UNBOUNDED, *FOR_EVER, AGEING, PREFILLED, *RECLAIMED]

OFTEN = {"assign": 3, "release": 3, "keep_alive": 2, "fit": 2, "delete": 2}
FORCED = ["take_over", "force_end"]
ONCE = ["assign_at_once", *FORCED, "release_next", "generate", "refresh_free", "purge", "later", "edge", "restart"]
KINDS = ["nothing", *(kind for kind, weight in OFTEN.items() for _ in range(weight)), *ONCE]


class Step(NamedTuple):
    """What is done, through which of two processes, and what there is to choose by."""

    kind: str
    process: int
    pause: float
    """How many seconds have passed before it."""
    number: int
    amount: int
    holder: str
    user: str | None
    holder_and_fence: tuple[bool, int | None]
    """Whether the holder is named, and by how much the fence is wrong, if that is named."""


step = st.builds(
    Step,
    st.sampled_from(KINDS),
    st.integers(0, 1),
    st.sampled_from([0.25, 0, 0.5, 1]),
    st.integers(0, 9),
    st.integers(0, 7),
    st.sampled_from(["ann", "bob"]),
    st.sampled_from([None, "kim", "lee"]),
    st.tuples(st.booleans(), st.sampled_from([None, 0, 0, -1, 1])),
)


FILL = Step("fit", 0, 0, 5, 7, "", None, (False, None))


class PoolTest:
    """Two processes that use one pool, and the model of it."""

    def __init__(self, places: Places, both: list[Place], pool: Pool) -> None:
        self.model = Model(pool)
        self._places = places
        self._both = both
        self._written = self._asked = 0.0
        self._fences: dict[str, int] = {}

    @property
    def pool(self) -> Pool:
        """The current settings."""
        return self.model.pool

    async def act(self, step: Step) -> None:
        """Do one step in the store and in the model, and compare the answers."""
        self.model.now += step.pause
        before = {**self.model.there}
        await getattr(self, step.kind)(self._both[step.process].pools, step)
        if step.kind not in {"later", "edge", "restart"}:
            self._asked = self.model.now
            if self.model.there != before or not self._both[step.process].behind:
                self._written = self._asked

    async def members(self, store: PoolStore) -> dict[str, PoolToken]:
        """Return all tokens."""
        return {token.value: token for token in await store.list_tokens(self.pool, self.model.now, "", 1000)}

    async def leases(self, store: PoolStore, limit: int) -> list[PoolToken]:
        """Return all leased tokens, read page by page, by value."""
        found, place = [], START_OF_LEASES
        while page := await store.list_leases(self.pool, self.model.now, place, limit):
            assert all(place < here for here, _ in page)
            found += [token for _, token in page]
            place = page[-1][0]
        assert [token.free_at for token in found] == sorted(token.free_at for token in found)
        return sorted(found, key=lambda token: token.value)

    async def generate(self, store: PoolStore, step: Step) -> None:
        """Add tokens, all or none."""
        values, capacity = self.model.new_values(1 + step.amount // 2), self.pool.capacity
        room = capacity is None or len(self.model.there) - self.model.dead() + len(values) <= capacity
        assert await store.generate(self.pool, values, self.model.now) is room
        if room:
            self.model.add(values)

    async def assign(self, store: PoolStore, step: Step) -> None:
        """Lease the token that has been free longest."""
        ends, leasable, counted = (
            [self.model.free_again(token) for token in self.model.taken()],
            self.model.leasable(1),
            step.amount > 3,
        )
        leased = await store.assign(self.pool, step.holder, self.model.now, step.user, counted)
        if leased.token is None:
            assert not leasable
            assert leased.next_end == min(ends, default=None)
        else:
            self.model.lease(leased.token, step.holder, leasable, step.user)
        assert not counted or leased.left == self.model.available()

    async def assign_at_once(self, _: PoolStore, step: Step) -> None:
        """Lease to concurrent callers of both processes."""
        holders = [f"{step.holder}{number}" for number in range(1 + step.amount)]
        leasable = self.model.leasable(len(holders))
        stores = [self._both[number % 2].pools for number in range(len(holders))]
        answers = await asyncio.gather(
            *(each.assign(self.pool, name, self.model.now) for each, name in zip(stores, holders, strict=True))
        )
        leased = [(each.token, name) for each, name in zip(answers, holders, strict=True) if each.token is not None]
        assert sorted(self.model.there[token.value].free_at for token, _ in leased) == leasable
        for token, name in leased:
            self.model.lease(token, name, leasable)

    async def keep_alive(self, store: PoolStore, step: Step) -> None:
        """Let a lease, or a free token, run for its full time from now."""
        value, now, include_free = self.model.pick(step.number), self.model.now, step.amount > 3
        token, check = self._find_and_check(value, step)
        touched = await store.keep_alive(self.pool, value, now, check, include_free)
        after = None
        if token is not None and self.model.holds(token, check):
            after = token._replace(free_at=now + self.pool.lease_ttl)
        elif token is not None and include_free and token.free_at <= now:
            after = self.model.freed(token) if self.model.free_again(token) <= now else token
        self._compare(touched, token, after)

    async def release(self, store: PoolStore, step: Step) -> None:
        """End a lease."""
        value = self.model.pick(step.number)
        token, check = self._find_and_check(value, step)
        touched = await store.release(self.pool, value, self.model.now, check)
        held = token is not None and self.model.holds(token, check)
        self._compare(touched, token, self.model.freed(token) if token is not None and held else None)

    async def take_over(self, store: PoolStore, step: Step) -> None:
        """Give a leased token to another user."""
        value, now = self.model.pick(step.number), self.model.now
        token, check = self._find_and_check(value, step)
        self.model.forget_forced_ends()
        touched = await store.force_end(self.pool, value, now, "ops", "it is mine", check, step.holder)
        after = None
        if token is not None and self.model.holds(token, check):
            after = token._replace(
                free_at=now + self.pool.lease_ttl,
                holder=step.holder,
                fence=token.fence + 1,
                username="ops",
                leased_at=now,
            )
            self.model.end_by_force(token, "it is mine", taken=True)
        self._compare(touched, token, after)

    async def force_end(self, store: PoolStore, step: Step) -> None:
        """End a lease by force."""
        value = self.model.pick(step.number)
        token, check = self._find_and_check(value, step)
        self.model.forget_forced_ends()
        touched = await store.force_end(self.pool, value, self.model.now, "ops", None, check)
        held = token is not None and self.model.holds(token, check)
        if token is not None and held:
            self.model.end_by_force(token, None, taken=False)
        self._compare(touched, token, self.model.freed(token) if token is not None and held else None)

    def _find_and_check(self, value: str, step: Step) -> tuple[PoolToken | None, LeaseCheck]:
        token, (named, error) = self.model.find(value), step.holder_and_fence
        fence = None if error is None else (token.fence if token else 0) + error
        return token, LeaseCheck(step.holder if named else None, fence, step.user)

    def _compare(self, touched: LeaseChange | None, token: PoolToken | None, after: PoolToken | None) -> None:
        if token is None:
            assert touched is None
        else:
            assert touched == LeaseChange(token, after)
            self.model.put(after or token)

    async def release_next(self, store: PoolStore, step: Step) -> None:
        """End the lease that would end first: of one user or of all."""
        leased = [token for token in self.model.leased() if step.user in {None, token.username}]
        done, available = await store.release_next(self.pool, self.model.now, step.user)
        assert done is bool(leased)
        if leased:
            there = await self.members(store)
            (released,) = [token for token in leased if there.get(token.value) != token]
            assert released.free_at == leased[0].free_at
            self.model.put(self.model.freed(released))
        assert available == self.model.available()

    async def refresh_free(self, store: PoolStore, step: Step) -> None:
        """Let free tokens wait for their full time from now."""
        now, before = self.model.now, self.model.now - step.amount // 6
        waiting = [token for token in self.model.free() if token.free_at < before]
        count = await store.keep_alive_free(self.pool, before, now, step.number)
        assert count == min(step.number, len(waiting))
        there = await self.members(store)
        refreshed = [token for token in waiting if there.get(token.value) != token]
        assert len(refreshed) == count
        self.model.put(*map(self.model.freed, refreshed))

    async def delete(self, store: PoolStore, step: Step) -> None:
        """Delete a token; with `prefill` a new one replaces it."""
        value = self.model.pick(step.number)
        token = self.model.find(value)
        successor = self.model.new_values(1) if self.pool.prefill else []
        deleted = await store.delete(self.pool, value, self.model.now, *successor)
        assert (deleted is not None) is (token is not None)
        if token is not None:
            del self.model.there[value]
            self.model.add([] if token.retired else successor)

    async def purge(self, store: PoolStore, step: Step) -> None:
        """Delete expired tokens, which nothing but the row count shows."""
        dead = self.model.dead()
        count = await store.purge(self.pool, self.model.now, step.number)
        assert count <= min(step.number, dead), "a pool with a capacity gives up expired ones for new ones"
        if self.pool.capacity is None:
            assert count == min(step.number, dead)
            self.model.forget(count)

    async def fit(self, store: PoolStore, step: Step) -> None:
        """Bring a pool with `prefill` to another capacity, above or below the number of leases; no lease ends."""
        if not self.pool.prefill:
            await self.generate(store, step)
            return
        model, offered = self.model, step.number
        free, leased, retired = model.free(), model.taken(), len(model.retired())
        capacity = max(0, len(leased) + step.amount - 3)
        model.pool = replace(self.pool, capacity=capacity)
        surplus = len(free) + len(leased) - retired - capacity
        wanted, values = max(0, -surplus - retired), model.new_values(offered)
        assert await store.fit(self.pool, values, model.now) == max(0, wanted - offered)
        there = await self.members(store)
        after = [there.pop(token.value, token._replace(retired=True)) for token in leased]
        assert [token._replace(retired=False) for token in after] == [token._replace(retired=False) for token in leased]
        assert sum(token.retired for token in after) == max(0, retired + max(surplus - len(free), min(surplus, 0)))
        model.put(*after)
        model.add(values[:wanted])
        gone = [token for token in free if token.value not in there]
        assert len(gone) == min(max(surplus, 0), len(free))
        for token in gone:
            del model.there[token.value]

    async def later(self, _: PoolStore, step: Step) -> None:
        """Let time pass."""
        self.model.now += step.amount / 2

    async def edge(self, _: PoolStore, step: Step) -> None:
        """Let time pass until one of the next leases is over or tokens expire, or to just before that."""
        edges = self.model.edges()[: 1 + step.number // 4]
        early = 2**-10 if step.amount > 4 else 0
        self.model.now = max(self.model.now, max(edges, default=0) - early)

    async def restart(self, store: PoolStore, step: Step) -> None:
        """Close a process and start it again: it knows what time it has been.

        SQLite writes the time with whatever it is asked to change, PostgreSQL only with what has been changed.
        """
        await self._places.close(self._both[step.process])
        self._both[step.process] = await self._places.open()
        place = self._both[step.process]
        assert self._written - place.behind <= place.started <= self._asked

    async def check(self, step: Step) -> None:
        """Compare the other process with the model, and the model with the promises."""
        store, live = self._both[1 - step.process].pools, self.model.live()
        value = self.model.pick(step.number)
        members, leases, counts, found = await asyncio.gather(
            self.members(store),
            self.leases(store, 1 + step.amount),
            store.count(self.pool, self.model.now),
            store.get(self.pool, value, self.model.now),
        )
        assert list(members.values()) == live
        assert leases == sorted(self.model.leased(), key=lambda token: token.value)
        assert counts == PoolCounts(self.model.available(), len(self.model.taken()))
        assert found == self.model.find(value)
        if value in {token.value for token in live}:
            assert await store.find_forced_end(self.pool, value) == self.model.forced_end(value)
        if self.pool.capacity is not None:
            assert sum(not token.retired for token in live) <= self.pool.capacity
        for token in live:
            assert token.fence >= self._fences.get(token.value, 0), "a fence went back"
            self._fences[token.value] = token.fence


async def live_through(opener: Opener, directory: Path, pool: Pool, script: Sequence[Step]) -> None:
    """Do all steps, and check after each."""
    places = Places(opener, directory)
    try:
        pool_test = PoolTest(places, [await places.open() for _ in range(2)], pool)
        for step in (FILL, *script):
            if step.kind != "nothing":  # what Hypothesis makes of steps that do not matter
                await pool_test.act(step)
                await pool_test.check(step)
    finally:
        await places.close_all()


def hold_to_the_model(templates: Templates, name: str, examples: int, length: int) -> None:
    """Run this many scripts."""

    @settings(SCRIPTS, max_examples=examples)
    @given(st.sampled_from(TERMS), st.lists(step, min_size=length // 2, max_size=length))
    def holds(pool: Pool, script: list[Step]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            directory = templates.fresh(name, Path(scratch) / "store")
            asyncio.run(live_through(STORES[name], directory, pool, script))

    holds()


@pytest.mark.parametrize("name", STORES)
def test_every_pool_invariant_holds_after_each_step(templates: Templates, name: str) -> None:
    hold_to_the_model(templates, name, examples=5, length=50)
