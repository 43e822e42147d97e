"""Sliding lifetimes against a model: several processes on one store, and a clock that is moved by hand."""

import asyncio
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.conftest import STORES, Templates
from tests.support.servers import START, USERS
from tokenauth.login_queue import never_disconnected
from tokenauth.models import LATE_USE, IssuedToken
from tokenauth.service import Service, create_service
from tokenauth.settings import loader

PROCESSES = 3
STEPS = 150

OFTEN = ["use", "use", "look", "later", "last_moment"]
KINDS = [*5 * OFTEN, "issue", "issue", "too_late", "flush", "renew", "purge", "kill", "revoke", "revoke_all"]


@dataclass
class Life:
    """What is known of one token."""

    issued: IssuedToken
    latest: int
    last_use: float
    sure_use: float
    """The last use of which every process learns when it asks the store."""
    written: float
    """The last use in the store, when the test looked last."""
    unwritten: dict[int, float] = field(default_factory=dict)
    """The last use in each process that has not been written yet."""
    ended: bool = False

    @property
    def value(self) -> bytes:
        return self.issued.value.encode()

    @property
    def digest(self) -> bytes:
        return self.issued.token.digest


class World:
    """Some processes, their clock, and their tokens."""

    def __init__(self, idle: int, ttl: int) -> None:
        self.now = START
        self.services: list[Service] = []
        self.idle = idle
        self.ttl = ttl
        self.lives: list[Life] = []
        self.renewals: set[float] = set()

    async def act(self, kind: str, who: int, which: int, amount: int) -> None:
        """Do one step, and compare its result."""
        self.now += 0.001
        life = self.lives[-1 - which % len(self.lives)] if self.lives else None
        if kind == "issue" or life is None:
            await self.issue(who)
        elif kind == "later":
            await self.later((0.9, self.idle / 8, self.idle / 4 + 0.5, self.idle / 2)[amount])
        elif kind == "last_moment":
            await self.later(min(life.sure_use + self.idle, life.latest) - self.now - 0.01)
        elif kind == "too_late":
            await self.later(min(life.last_use + self.idle * 1.25, life.latest) - self.now)
        elif kind == "flush":
            await self.flush(who)
        elif kind == "purge":
            await self.services[who].store.tokens.purge(self.now - LATE_USE, 100)
        elif kind == "revoke_all":
            await self.services[who].tokens.revoke_all("ann")
            for life in self.lives:
                life.ended = True
        elif kind == "kill":
            self.services[who].tokens.uses._notes.clear()
            for life in self.lives:
                life.unwritten.pop(who, None)
        else:
            await self.ask(kind, who, life)
        await self.settle()

    async def issue(self, who: int) -> None:
        service = self.services[who]
        user = service.users["ann"]
        issued = await service.tokens.grant(user, "", "", never_disconnected, slides=True)
        latest = int(self.now) + self.ttl
        assert issued.token.expires_at == min(latest, int(self.now) + self.idle + self.idle // 4)
        self.lives.append(Life(issued, latest, self.now, self.now, self.now))

    async def later(self, seconds: float) -> None:
        """Let time pass. What waited for the flush interval is written before."""
        if seconds <= 0:
            return
        if seconds >= self.services[0].tokens.uses._interval:
            for who in range(PROCESSES):
                await self.flush(who)
        self.now += seconds

    async def ask(self, kind: str, who: int, life: Life) -> None:
        """Validate, renew or revoke."""
        tokens = self.services[who].tokens
        await self.catch_up(who)
        token = await tokens.validate(life.value, touch=kind == "use")
        sure = max(life.sure_use, life.unwritten.get(who, life.sure_use))
        if life.ended or self.now >= min(life.last_use + self.idle * 1.25, life.latest):
            assert token is None, "it lives too long"
        elif self.now < min(sure + self.idle, life.latest):
            assert token is not None, "it ends too early"
        if token is not None:
            assert self.now < token.expires_at <= min(life.last_use + self.idle * 1.25, life.latest)
        if token is not None and kind == "use":
            life.last_use = self.now
            if life.digest in tokens.uses._notes:
                life.unwritten[who] = self.now
            else:
                life.sure_use = self.now
        if token is not None and kind == "renew":
            renewed = await tokens.uses.renew(token)
            assert renewed.expires_at == min(life.latest, int(self.now) + self.idle + self.idle // 4)
            assert renewed.expires_at >= token.expires_at
            life.last_use = life.sure_use = self.now
            self.renewals.add(self.now)
        if kind == "revoke":
            await tokens.revoke(life.value)
            life.ended = True

    async def catch_up(self, who: int) -> None:
        """Wait until a process knows of all revocations: PostgreSQL's notifications take time."""
        feed = self.services[who].store.engine.feed
        feed.invalidate()
        while not feed.is_current():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.0005)

    async def flush(self, who: int) -> None:
        """Write the uses of a process."""
        uses = self.services[who].tokens.uses
        while uses._notes:  # what others lock is written later
            await uses.flush()
        await self.note_written(who)

    async def settle(self) -> None:
        """Wait for what is written at once: uses shortly before an end."""
        for who, service in enumerate(self.services):
            uses = service.tokens.uses
            if uses._urgent or uses._task is not None:
                while uses._urgent or uses._task is not None:  # noqa: ASYNC110 - there is no event to wait for
                    await asyncio.sleep(0)
                await self.note_written(who)

    async def note_written(self, who: int) -> None:
        """Look at the rows: each use that was written is at least a quarter of `idle` after the one before."""
        for life in self.lives:
            if life.digest not in self.services[who].tokens.uses._notes:
                life.sure_use = max(life.sure_use, life.unwritten.pop(who, life.sure_use))
            row = await self.services[who].store.tokens.find(life.issued.token.id)
            if row is not None and row.used_at != life.written:
                if row.used_at not in self.renewals:
                    assert int(row.used_at) - int(life.written) >= self.idle // 4, "too many rows"
                life.written = row.used_at


async def live_through(url: str, idle: int, ttl: int, random: Random) -> None:
    """Do many steps, then ask for each token in each process."""
    text = f'[database]\nurl = "{url}"\nconnections = 4\n[tokens]\nidle = {idle}\nttl = {ttl}\nper_user = 0\n{USERS}'
    config = loader.parse(text)
    world = World(idle, ttl)
    async with AsyncExitStack() as stack:
        for _ in range(PROCESSES):
            service = create_service(config, lambda: world.now, lambda: 0.0)
            await stack.enter_async_context(service.running())
            world.services.append(service)
        for _ in range(STEPS):
            await world.act(random.choice(KINDS), random.randrange(PROCESSES), random.randrange(2), random.randrange(4))
        for who in range(PROCESSES):
            for which in range(len(world.lives)):
                await world.act("look", who, which, 0)


@pytest.mark.parametrize("examples", [2, pytest.param(40, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", STORES)
def test_a_login_lives_as_long_as_its_uses_say(templates: Templates, name: str, examples: int) -> None:
    @settings(max_examples=examples, database=None)
    @given(
        st.sampled_from([60, 64, 400, 7200]),
        st.sampled_from([1, 1.1, 3, 12]),
        st.integers(0, 2**32),
    )
    def holds(idle: int, factor: float, seed: int) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            directory = templates.fresh(name, Path(scratch) / "store")
            url = f"sqlite+aiosqlite:///{directory}/tokens.db"
            if name == "postgres":
                url = (directory / "url").read_text()
            asyncio.run(live_through(url, idle, int(idle * factor), Random(seed)))

    holds()
