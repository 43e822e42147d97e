"""A successful login refunds its own failures, once, and no failures of others."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.servers import START
from tokenauth.errors import InvalidCredentials, TooManyAttempts
from tokenauth.login_queue import LoginQueue
from tokenauth.models import CountUpdate, Failures
from tokenauth.settings.model import DatabaseSettings, ThrottleSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.store import Store
from tokenauth.throttle import Throttle, _keys

OWN = ("eve", "john doe", "john+doe")
"""The attacker's own users. One header can mean either of the last two."""

READINGS = (("eve",), ("eve", "%65ve"), ("john doe",), ("john doe", "john+doe"), ("john+doe", "john doe"))
EACH = 3600 / 100
"""Seconds after which the network forgets a failure."""

_networks = count(1)
_NOTHING = Failures(0, 0.0)


class World:
    """A throttle and its clock. `others` is when the failures of others will be forgotten."""

    def __init__(self, throttle: Throttle, store: Store, now: list[float]) -> None:
        self.throttle = throttle
        self.store = store
        self.now = now
        network = next(_networks)
        self.home = f"10.{network % 250}.{network // 250 % 250}."
        self.others = 0.0

    async def log_in(self, names: Sequence[str], place: int, username: str | None = None) -> None:
        """Fail to log in, or succeed as `username`."""
        with suppress(InvalidCredentials):
            async with self.throttle.attempt(names, f"{self.home}{place}", hashes=False) as attempt:
                if username is None:
                    raise InvalidCredentials
                attempt.username = username

    async def fail_others(self, number: int) -> None:
        """Fail to log in with the names of others."""
        for _ in range(number):
            await self.log_in([f"other{next(_networks)}"], 200)
            self.others = max(self.others, self.now[0]) + EACH

    async def level(self) -> float:
        """Return the seconds until the network has forgotten all failures."""
        key = _keys("any", f"{self.home}1").network
        found = await self.store.failures.get([key])
        return max(0.0, found.get(key, _NOTHING).last_at - self.now[0])


@asynccontextmanager
async def opened(directory: str | Path, free: int = 5) -> AsyncIterator[World]:
    """Open a throttle of one worker with its own store."""
    store, now = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{directory}/tokenauth.db"), 10), [START]
    await store.start()
    settings = ThrottleSettings(free=free, network_free=100)
    throttle = Throttle(settings, 1, store, lambda: now[0], LoginQueue(20, 64))
    yield World(throttle, store, now)
    await throttle.close()
    await store.stop(now[0])


STEPS = st.one_of(
    st.tuples(st.just("others"), st.integers(1, 8), st.just(0)),
    st.tuples(st.just("fail"), st.integers(0, len(READINGS) - 1), st.integers(1, 3)),
    st.tuples(st.just("log in"), st.integers(0, len(READINGS) - 1), st.integers(1, 3)),
    st.tuples(st.just("all log in"), st.integers(0, len(READINGS) - 1), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([1, 30, 36, 100, 1000, 3500]), st.just(0)),
)


@settings(max_examples=25)
@given(st.lists(STEPS, max_size=30))
def test_own_logins_hide_no_failures_of_others(steps: list[tuple[str, int, int]]) -> None:
    async def run(directory: str) -> None:
        async with opened(directory, free=1000) as world:
            for what, number, place in steps:
                if what == "others":
                    await world.fail_others(number)
                elif what == "wait":
                    world.now[0] += number
                elif what == "fail":
                    await world.log_in(READINGS[number], place)
                else:
                    names = READINGS[number]
                    own = [name for name in names if name in OWN] * (1 if what == "log in" else 4)
                    await asyncio.gather(*(world.log_in(names, place, name) for name in own))
                assert await world.level() >= world.others - world.now[0] - 0.001

    with TemporaryDirectory() as directory:
        asyncio.run(run(directory))


@pytest.mark.parametrize("names", READINGS)
async def test_own_failures_are_refunded_exactly(tmp_path: Path, names: Sequence[str]) -> None:
    async with opened(tmp_path, free=1000) as world:
        await world.fail_others(7)
        for place in range(1, 9):
            for _ in range(4):
                await world.log_in(names, place)
            assert await world.level() == pytest.approx(11 * EACH)
            await asyncio.gather(*(world.log_in(names, place, names[0]) for _ in range(5)))
            assert await world.level() == pytest.approx(7 * EACH)
            world.now[0] += EACH
            await world.fail_others(1)


async def test_a_success_refunds_no_forgotten_failure(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        for _ in range(4):
            await world.log_in(["eve"], 1)
        world.now[0] += 3 * EACH
        await world.fail_others(5)
        await world.log_in(["eve"], 1, "eve")
        assert await world.level() == pytest.approx(5 * EACH)


async def test_a_success_refunds_only_its_own_reading(tmp_path: Path) -> None:
    """Failures of the header's other reading stay counted, whether that name exists or not."""
    async with opened(tmp_path) as world:
        for _ in range(4):
            await world.log_in(["john+doe"], 1)
        await world.log_in(["john doe", "john+doe"], 1, "john doe")
        await world.log_in(["john+doe"], 1)
        with pytest.raises(TooManyAttempts):
            await world.log_in(["john+doe"], 1)


async def test_frequent_logins_hide_no_guesses_from_their_place(tmp_path: Path) -> None:
    """100 guesses are free, then 10 an hour."""
    async with opened(tmp_path) as world:
        guesses = 0
        for _ in range(6 * 120):
            world.now[0] += 30
            with suppress(TooManyAttempts):
                await world.log_in(["eve"], 1, "eve")
                await world.log_in(["eve"], 1)
                guesses += 1
        assert guesses == 100 + 6 * 10 - 1


async def test_a_comparison_counts_if_the_attempt_is_refused(tmp_path: Path) -> None:
    """Otherwise a full queue would let guesses at a cached secret through."""
    async with opened(tmp_path) as world:
        await world.log_in(["eve"], 1, "eve")
        key = _keys("eve", f"{world.home}1").location
        await world.store.failures.update([CountUpdate(key, at=START, shift=36000.0)], START)
        for number in range(1, 4):
            world.throttle.return_permit("eve", f"{world.home}1", START)
            assert await world.throttle.permit_comparison("eve", f"{world.home}1") is not None
            with pytest.raises(TooManyAttempts):
                async with world.throttle.attempt(["eve"], f"{world.home}1", compared=True):
                    pass
            assert (await world.store.failures.get([key]))[key].last_at == START + 36000.0 + number * 360
            assert await world.throttle.permit_comparison("eve", f"{world.home}1") is None


async def test_a_user_is_not_throttled_by_another_reading(tmp_path: Path) -> None:
    """An attacker guesses at `john%40corp`. That name is then skipped, and the user's own name is tried."""
    async with opened(tmp_path) as world:
        await world.log_in(["john@corp", "john%40corp"], 1, "john@corp")
        for _ in range(5):
            await world.log_in(["john%40corp"], 2)
        with pytest.raises(TooManyAttempts):
            await world.log_in(["john%40corp"], 1)
        async with world.throttle.attempt(["john@corp", "john%40corp"], f"{world.home}1") as attempt:
            assert attempt.names == ["john@corp"]


async def test_a_refund_spares_what_failed_after_a_clear(tmp_path: Path) -> None:
    """An operator has cleared the network, so nothing of the user's own failures is left in it."""
    async with opened(tmp_path) as world:
        for _ in range(4):
            await world.log_in(["eve"], 1)
        assert await world.throttle.clear_network(f"{world.home}0/24", "operator")
        assert await world.level() == 0
        await world.fail_others(3)
        await world.log_in(["eve"], 1, "eve")
        assert await world.level() == pytest.approx(3 * EACH)
        await world.log_in(["john doe"], 2)
        await world.log_in(["john doe"], 2, "john doe")
        assert await world.level() == pytest.approx(3 * EACH), "a later failure is refunded"
