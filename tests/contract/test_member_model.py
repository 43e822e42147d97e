"""Members, reservations, `per_user` and the line against a model, while the settings change as they do at SIGHUP.

Members are taken out while they are leased, put back, and get other labels. Two processes take turns on each store.
"""

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
from tokenauth.errors import NoFreeToken, TooManyLeases
from tokenauth.models import Grant, LeaseCheck, LeaseRequest, Member, Pool, RequestKey, Reservation
from tokenauth.stores.store import PoolStore

NAMES, USERS = ("moto", "nokia", "pixel", "sony"), ("ann", "bob")
TTL, KEEP = 60.0, 200.0


class Settings(NamedTuple):
    """What the configuration says: the labels of each member, and `per_user`."""

    members: Mapping[str, Sequence[str]]
    per_user: int | None

    def pool(self) -> Pool:
        members = {name: Member(name, tuple(labels)) for name, labels in self.members.items()}
        return Pool("phones", lease_ttl=TTL, capacity=len(members), members=members, per_user=self.per_user)


class Step(NamedTuple):
    """One operation. What its numbers mean depends on it."""

    what: str
    user: str
    name: str
    labels: tuple[str, ...]
    number: int
    process: int
    seconds: float
    settings: Settings


@dataclass
class Phone:
    """A member: free since an instant, or leased until then."""

    number: int
    free_at: float
    user: str | None = None
    fence: int = 0
    reserved_until: float = 0.0
    reserved_for: str | None = None


@dataclass
class Waits:
    """A request in the line."""

    id: str
    user: str
    labels: tuple[str, ...]
    count: int
    since: float

    @property
    def key(self) -> tuple[str, str]:
        return self.user, self.id


@dataclass
class Model:
    settings: Settings
    now: float = START
    asked: int = 0
    phones: dict[str, Phone] = field(default_factory=dict)
    line: list[Waits] = field(default_factory=list)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.line = [each for each in self.line if self.now < each.since + KEEP]
        for phone in self.phones.values():
            if phone.free_at <= self.now:
                phone.user = None

    def configure(self, new: Settings) -> None:
        self.settings = new
        for name in new.members:
            self.phones.setdefault(name, Phone(len(self.phones), self.now))

    def has(self, name: str, labels: Sequence[str]) -> bool:
        return {*labels} <= {name, *self.settings.members[name]}

    def allowance(self, user: str) -> float:
        if self.settings.per_user is None:
            return float("inf")
        return self.settings.per_user - sum(phone.user == user for phone in self.phones.values())

    def free(self) -> list[str]:
        """Return the free members in the order in which they are leased: reserved ones first."""
        free = [name for name in self.settings.members if self.phones[name].user is None]
        return sorted(free, key=lambda name: (not self.reserved(name), self.phones[name].free_at, self.place(name)))

    def place(self, name: str) -> int:
        return self.phones[name].number

    def reserved(self, name: str) -> bool:
        return self.now < self.phones[name].reserved_until

    def turns(self, *more: Waits) -> dict[str, list[str]]:
        """Return who would be served now, if all were: the members for each request."""
        free, served = self.free(), dict[str, list[str]]()
        allowances = {user: self.allowance(user) for user in USERS}
        for each in [*self.line, *more]:
            hopeless = each.count > sum(self.has(name, each.labels) for name in self.settings.members)
            if (hopeless and each not in more) or each.count > allowances[each.user]:
                continue
            usable = [
                name
                for name in free
                if self.has(name, each.labels)
                and (not self.reserved(name) or self.phones[name].reserved_for == each.user)
            ]
            taken = usable[: each.count]
            if len(taken) == each.count:
                served[each.id] = taken
                allowances[each.user] -= each.count
            free = [name for name in free if name not in taken]
        return served

    def lease(self, name: str, user: str) -> None:
        phone = self.phones[name]
        phone.user, phone.free_at, phone.fence = user, self.now + TTL, phone.fence + 1

    def grant(self, grant: Grant, names: Sequence[str]) -> None:
        assert [token.member for token in grant.tokens] == [*names]
        for token, name in zip(grant.tokens, names, strict=True):
            self.lease(name, grant.request.username)
            assert token.fence == self.phones[name].fence
        self.line = [each for each in self.line if each.key != grant.request.key]


class MemberTest:
    """The store and the model."""

    def __init__(self, settings: Settings) -> None:
        self.model = Model(settings)

    @property
    def pool(self) -> Pool:
        return self.model.settings.pool()

    async def reload(self, store: PoolStore, step: Step) -> None:
        """Take other settings over, as a start and SIGHUP do."""
        missing = [f"value of {name}" for name in step.settings.members if name not in self.model.phones]
        self.model.configure(step.settings)
        assert await store.fit(self.pool, missing, self.model.now) == 0

    async def ask(self, store: PoolStore, step: Step) -> None:
        """Ask for one or two members, with or without a place in the line."""
        model, keep = self.model, None if step.number == 9 else KEEP
        model.asked += 1
        asked = Waits(f"r{model.asked}", step.user, step.labels, 1 + step.number % 2, model.now)
        answer = await store.ask(
            self.pool, step.user, asked.id, "ci", model.now, asked.count, labels=asked.labels, keep=keep
        )
        names = model.turns(asked).get(asked.id)
        if names is not None:
            assert isinstance(answer, Grant), answer
            model.grant(answer, names)
        elif keep is None:
            over = model.allowance(asked.user) < asked.count
            assert isinstance(answer, TooManyLeases if over else NoFreeToken)
        else:
            assert isinstance(answer, LeaseRequest), answer
            model.line.append(asked)

    async def take_turns(self, store: PoolStore, step: Step) -> None:
        """Serve the requests of a process that has some of them."""
        own = self._some(step)
        assert await store.may_have_turn(self.pool, own, self.model.now) is bool(self._turns(own))
        self._serve(own, await store.take_turns(self.pool, own, self.model.now))

    async def hand_over(self, store: PoolStore, step: Step) -> None:
        """Release a member, and serve the requests of a process that has some of them."""
        model, phone, own = self.model, self.model.phones.get(step.name), self._some(step)
        check = LeaseCheck(username=step.user)
        released, found = await store.hand_over(self.pool, f"value of {step.name}", own, model.now, check)
        ended = phone is not None and phone.user == step.user
        assert (released is not None and released.granted) is ended
        if phone is None or not ended:
            assert found == []
            return
        phone.free_at, phone.user = model.now, None
        self._serve(own, found)

    def _some(self, step: Step) -> Mapping[RequestKey, int]:
        return {each.key: 1 for place, each in enumerate(self.model.line) if step.number != place % 4}

    def _turns(self, own: Mapping[RequestKey, int]) -> Mapping[RequestKey, Sequence[str]]:
        turns = self.model.turns()
        return {each.key: turns[each.id] for each in self.model.line if each.id in turns and each.key in own}

    def _serve(self, own: Mapping[RequestKey, int], found: Sequence[Grant]) -> None:
        turns = self._turns(own)
        assert [grant.request.key for grant in found] == [*turns]
        for grant in found:
            self.model.grant(grant, turns[grant.request.key])

    async def assign(self, store: PoolStore, step: Step) -> None:
        """Lease a member without a place in the line."""
        model = self.model
        names = model.turns(Waits("late", step.user, step.labels, 1, model.now)).get("late")
        answer = await store.assign(self.pool, "ci", model.now, step.user, labels=step.labels)
        assert answer.over_limit is (model.allowance(step.user) < 1)
        assert (answer.token and [answer.token.member]) == names
        if answer.token is not None and answer.token.member is not None:
            model.lease(answer.token.member, step.user)
            assert answer.token.fence == model.phones[answer.token.member].fence

    async def keep_alive(self, store: PoolStore, step: Step) -> None:
        await self._change(store, step, keep=True)

    async def release(self, store: PoolStore, step: Step) -> None:
        await self._change(store, step, keep=False)

    async def _change(self, store: PoolStore, step: Step, keep: bool) -> None:
        """Keep a lease alive or release it, also one of a member that was taken out."""
        model, phone = self.model, self.model.phones.get(step.name)
        change = store.keep_alive if keep else store.release
        answer = await change(self.pool, f"value of {step.name}", model.now, LeaseCheck(username=step.user))
        if phone is None or (phone.user is None and step.name not in model.settings.members):
            assert answer is None
            return
        assert answer is not None
        assert answer.granted is (phone.user == step.user)
        if answer.granted:
            phone.free_at = model.now + TTL if keep else model.now
            phone.user = step.user if keep else None

    async def reserve(self, store: PoolStore, step: Step) -> None:
        """Reserve a member for a user or for nobody, or end its reservation."""
        model, until = self.model, self.model.now + 10 * step.number
        user = step.user if step.number % 2 else None
        reservation = Reservation(until, user, "", "ops") if step.number else None
        answer = await store.reserve(self.pool, step.name, reservation, model.now)
        assert (answer is not None) is (step.name in model.settings.members)
        if answer is not None:
            phone = model.phones[step.name]
            phone.reserved_until, phone.reserved_for = until, user

    async def purge(self, store: PoolStore, _: Step) -> None:
        """Do what the sweeper does."""
        await store.note_lapsed(self.pool, START, self.model.now, 100)
        await store.purge(self.pool, self.model.now, 100)

    async def check(self, store: PoolStore) -> None:
        """Compare the members, their counts and the line."""
        model, found = self.model, await store.members(self.pool, self.model.now)
        assert {token.member: (token.value, token.fence, token.retired) for token in found} == {
            name: (f"value of {name}", phone.fence, name not in model.settings.members)
            for name, phone in model.phones.items()
            if phone.user is not None or name in model.settings.members
        }
        assert {token.member: token.username for token in found if token.is_leased(model.now)} == {
            name: phone.user for name, phone in model.phones.items() if phone.user is not None
        }
        reserved = sum(map(model.reserved, model.free()))
        leased = sum(phone.user is not None for phone in model.phones.values())
        assert self.pool.count(found, model.now) == (len(model.free()) - reserved, leased, reserved)
        line = [request.key for request in await store.list_requests(self.pool, model.now, 100)]
        assert line == [each.key for each in model.line]


labels = st.sampled_from([(), ("arm",), ("ios",), ("arm", "ios")])
configurations = st.builds(
    Settings,
    st.dictionaries(st.sampled_from(NAMES), labels, min_size=1),
    st.sampled_from([None, None, 1, 2]),
)
steps = st.builds(
    Step,
    st.sampled_from(
        [
            *("ask", "take_turns", "hand_over", "release", "reload") * 2,
            "ask",
            "assign",
            "keep_alive",
            "reserve",
            "purge",
        ]
    ),
    st.sampled_from(USERS),
    st.sampled_from(NAMES),
    st.one_of(labels, st.just(("pixel",))),
    st.integers(0, 9),
    st.integers(0, 1),
    st.sampled_from([0, 0, 0.5, 1, 20, 61]),
    configurations,
)


async def live_through(name: str, directory: Path, first: Settings, script: Sequence[Step]) -> None:
    places, test = Places(STORES[name], directory), MemberTest(first)
    try:
        both = [(await places.open()).pools for _ in range(2)]
        await test.reload(both[0], script[0]._replace(settings=first))
        for step in script:
            test.model.pass_time(step.seconds)
            await getattr(test, step.what)(both[step.process], step)
            await test.check(both[1 - step.process])
    finally:
        await places.close_all()


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", STORES)
def test_members_are_as_their_model_while_settings_change(templates: Templates, name: str, examples: int) -> None:
    @settings(SCRIPTS, max_examples=examples)
    @given(configurations, st.lists(steps, min_size=20, max_size=50))
    def holds(first: Settings, script: list[Step]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            asyncio.run(live_through(name, templates.fresh(name, Path(scratch) / "store"), first, script))

    holds()
