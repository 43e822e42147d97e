"""Credentials: a right password is cached for a minute, a wrong one is hashed each time, and neither is revealed."""

import asyncio
import gc
import os
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import pytest
import structlog
from passlib.hash import argon2, scrypt

from tests.support.servers import START
from tests.support.steps import Call, calls_of_threads, hashes
from tokenauth import login_queue
from tokenauth.credentials import CACHE_SECONDS, Candidate, Credentials
from tokenauth.errors import InvalidCredentials, Overloaded, TooManyAttempts
from tokenauth.login_queue import LoginQueue
from tokenauth.models import User
from tokenauth.passwords import Passwords
from tokenauth.settings.model import DatabaseSettings, PasswordSettings, ThrottleSettings, canonical
from tokenauth.stores.open import open_store
from tokenauth.stores.store import Store
from tokenauth.throttle import Throttle

HOME = "203.0.113.7"
WORD = "correct horse battery staple"
OTHER = "another horse"

ANN = Candidate("ann", WORD)
WRONG = Candidate("ann", "wrong")


def user(name: str, word: str) -> User:
    """Return a user with a negligible hash."""
    return User(name, argon2.using(type="ID", memory_cost=8, time_cost=1, parallelism=1).hash(word))


class Keeper(NamedTuple):
    """Credentials, their clock and users, and the hashes that their threads computed."""

    credentials: Credentials
    time: list[float]
    users: dict[str, User]
    calls: list[Call]

    async def hashed(self, *readings: Candidate, address: str = HOME) -> int:
        """Check a right or a wrong password. Return the number of hashes it took."""
        self.calls.clear()
        with suppress(InvalidCredentials):
            await self.credentials.verify_cached(readings, address)
        return len(hashes(self.calls))

    async def right(self, *readings: Candidate, address: str = HOME) -> bool:
        """Return whether a password is accepted."""
        try:
            await self.credentials.verify_cached(readings, address)
        except InvalidCredentials:
            return False
        return True


@pytest.fixture(scope="module")
def users() -> dict[str, User]:
    """Return the users, made once; each test has a copy."""
    return {"ann": user("ann", WORD), "bob": user("bob", WORD), "a b": user("a b", "p q")}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = open_store(DatabaseSettings(url=f"sqlite+aiosqlite:///{tmp_path}/tokenauth.db"), 10)
    await opened.start()
    yield opened
    await opened.stop(START)


@pytest.fixture
def known(users: dict[str, User]) -> dict[str, User]:
    """Return a copy of the users, for a test to change."""
    return dict(users)


@pytest.fixture
def passwords(known: dict[str, User]) -> Iterator[Passwords]:
    """Return a hasher of one thread, for which one more login may wait."""
    made = Passwords(PasswordSettings(memory_kib=8, time_cost=1, threads=1, queue=1), known)
    yield made
    made.close()


@pytest.fixture
def keeper(store: Store, passwords: Passwords, known: dict[str, User]) -> Iterator[Keeper]:
    """Return credentials whose hashes are counted, with a clock moved by hand."""
    time = [START]
    throttle = Throttle(ThrottleSettings(), 1, store, lambda: time[0], LoginQueue(1, 1))
    with calls_of_threads() as calls:
        yield Keeper(Credentials(known, passwords, throttle, lambda: time[0]), time, known, calls)


async def test_a_right_secret_is_hashed_once_a_minute(keeper: Keeper) -> None:
    assert await keeper.hashed(ANN) == 1
    for step in (0.0, 30.0, CACHE_SECONDS - 30.001):
        keeper.time[0] += step
        assert await keeper.hashed(ANN) == 0
        assert await keeper.credentials.verify_cached([ANN], HOME) is keeper.users["ann"]
    keeper.time[0] = START + CACHE_SECONDS
    assert await keeper.hashed(ANN) == 1, "must expire a minute after the hash, however often it was used"
    assert await keeper.hashed(ANN) == 0


async def test_it_is_cached_per_address_and_for_any_case(keeper: Keeper) -> None:
    assert await keeper.hashed(ANN) == 1
    assert await keeper.hashed(Candidate("ANN", WORD)) == 0
    assert await keeper.hashed(ANN, address="203.0.113.8") == 1
    assert await keeper.hashed(ANN, address="2001:db8::1") == 1
    assert await keeper.hashed(ANN, address="2001:db8::2") == 0, "an IPv6 /64 counts as one address"


async def test_a_wrong_secret_is_hashed_and_counted_each_time(keeper: Keeper) -> None:
    assert await keeper.right(ANN)
    for _ in range(ThrottleSettings().free):
        assert await keeper.hashed(WRONG) == 1
    keeper.calls.clear()
    with pytest.raises(TooManyAttempts):
        await keeper.credentials.verify_cached([WRONG], HOME)
    assert not hashes(keeper.calls)
    for ask in (keeper.credentials.verify_cached([ANN], HOME), keeper.credentials.verify(ANN, HOME)):
        with pytest.raises(TooManyAttempts):
            await ask
    assert not hashes(keeper.calls)
    assert await keeper.right(ANN, address="203.0.113.8"), "must not throttle another address of the network"


async def test_a_login_is_hashed_each_time_and_not_cached(keeper: Keeper) -> None:
    for _ in range(2):
        await keeper.credentials.verify(ANN, HOME)
    assert len(hashes(keeper.calls)) == 2
    assert await keeper.hashed(ANN) == 1
    keeper.calls.clear()
    await keeper.credentials.verify(ANN, HOME)
    assert len(hashes(keeper.calls)) == 1


async def test_a_wrong_secret_is_hashed_and_clears_the_cache(keeper: Keeper) -> None:
    assert await keeper.right(ANN)
    for wrong in (OTHER, WORD[:-1], WORD + " ", "", f"{WORD}\0"[:-1].upper()):
        assert await keeper.hashed(Candidate("ann", wrong)) == 1
        assert await keeper.hashed(ANN) == 1, "must hash again after a failure"
        assert await keeper.hashed(ANN) == 0


async def test_the_cache_does_not_apply_to_other_users(keeper: Keeper) -> None:
    assert await keeper.right(ANN)
    assert await keeper.hashed(Candidate("bob", WORD)) == 1
    assert await keeper.hashed(Candidate("unknown", WORD)) == 1
    assert not await keeper.right(Candidate("a b", WORD))
    assert await keeper.hashed(ANN) == 0


async def test_a_new_password_hash_clears_the_cache(keeper: Keeper) -> None:
    assert await keeper.right(ANN)
    keeper.users["ann"] = user("ann", WORD)
    assert await keeper.hashed(ANN) == 1, "must hash again, even for the same secret"
    keeper.users["ann"] = user("ann", OTHER)
    assert not await keeper.right(ANN)
    del keeper.users["ann"]
    assert not await keeper.right(ANN)


async def test_new_credentials_have_an_empty_cache(keeper: Keeper, store: Store, passwords: Passwords) -> None:
    assert await keeper.right(ANN)
    throttle = Throttle(ThrottleSettings(), 1, store, lambda: START, LoginQueue(1, 1))
    restarted = keeper._replace(credentials=Credentials(keeper.users, passwords, throttle, lambda: START))
    assert await restarted.hashed(ANN) == 1
    changed = {**keeper.users, "ann": user("ann", OTHER)}
    passwords = Passwords(PasswordSettings(memory_kib=8, time_cost=1, threads=1, queue=1), changed)
    reloaded = keeper._replace(credentials=Credentials(changed, passwords, throttle, lambda: START))
    assert not await reloaded.right(ANN)
    assert await reloaded.right(ANN._replace(password=OTHER))
    passwords.close()


async def test_concurrent_calls_share_one_hash(keeper: Keeper) -> None:
    """There is room for only two hashes at a time."""
    found = await asyncio.gather(*(keeper.credentials.verify_cached([ANN], HOME) for _ in range(200)))
    assert all(each is keeper.users["ann"] for each in found)
    assert len(hashes(keeper.calls)) == 1


async def test_a_cancelled_caller_leaves_the_hash_to_the_others(keeper: Keeper) -> None:
    calls = [asyncio.ensure_future(keeper.credentials.verify_cached([ANN], HOME)) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(ended[0], asyncio.CancelledError)
    assert ended[1:] == [keeper.users["ann"]] * 2
    assert len(hashes(keeper.calls)) == 1


async def test_different_guesses_at_the_same_time_are_hashed_each(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are refused when too many wait. That does not count as a failure."""
    monkeypatch.setattr(login_queue, "REFUSAL_DELAY", 0.01)
    guesses = [Candidate("ann", f"wrong-{number}") for number in range(5)]
    ended = await asyncio.gather(
        *(keeper.credentials.verify_cached([guess], HOME) for guess in guesses), return_exceptions=True
    )
    assert [type(each) for each in ended] == [InvalidCredentials] * 2 + [Overloaded] * 3
    assert len(hashes(keeper.calls)) == 2


TWO = {
    "a wrong secret": (Candidate("ann", "p q"), Candidate("ann", "p+q")),
    "a wrong secret of an unknown user": (Candidate("unknown", "p q"), Candidate("unknown", "p+q")),
    "an odd name": (Candidate("a b", "x"), Candidate("a+b", "x")),
    "an odd name of an unknown user": (Candidate("c d", "x"), Candidate("c+d", "x")),
    "an odd name and a wrong secret": (Candidate("a b", "x y"), Candidate("a+b", "x+y")),
    "an odd name and a right secret": (Candidate("a b", "p q"), Candidate("a+b", "p+q")),
    "an odd name of an unknown user and a secret": (Candidate("c d", "x y"), Candidate("c+d", "x+y")),
    "one reading": (Candidate("ann", "x"),),
    "one reading in two forms": (Candidate("ann", "x"), Candidate("ANN", "x")),
    "one reading of an unknown user": (Candidate("unknown", "x"),),
    "one of two can be hashed": (Candidate("unknown", "x\0"), Candidate("unknown", "x%00")),
}


@pytest.mark.parametrize("sent", TWO)
async def test_each_reading_costs_one_hash_for_any_name(keeper: Keeper, sent: str) -> None:
    readings = TWO[sent]
    expected = len({(canonical(name), password) for name, password in readings if "\0" not in password})
    assert await keeper.hashed(*readings) == expected


@pytest.mark.parametrize("name", ["a b", "a+b", "c d", "c+d"])
async def test_failures_count_under_every_reading_of_a_name(keeper: Keeper, name: str) -> None:
    """Whether a user has that name or not. Otherwise alternating HTTP Basic and JSON would reveal it."""
    both = [Candidate(name.replace("+", " "), "x"), Candidate(name.replace(" ", "+"), "x")]
    for _ in range(ThrottleSettings().free):
        assert not await keeper.right(*both)
    for one in both:
        with pytest.raises(TooManyAttempts):
            await keeper.credentials.verify(one, HOME)


async def test_a_success_clears_only_the_name_that_it_was_for(keeper: Keeper, known: dict[str, User]) -> None:
    """Otherwise the user `a b` could erase the failures of `a+b`."""
    known["a+b"] = user("a+b", "plus")
    both = [Candidate("a b", "p q"), Candidate("a+b", "p+q")]
    for _ in range(ThrottleSettings().free - 1):
        assert not await keeper.right(Candidate("a+b", "guess"))
    assert await keeper.right(*both)
    assert not await keeper.right(Candidate("a+b", "guess"))
    with pytest.raises(TooManyAttempts):
        await keeper.credentials.verify(Candidate("a+b", "plus"), HOME)


async def test_both_users_of_a_header_can_authenticate(keeper: Keeper, known: dict[str, User]) -> None:
    known["a+b"] = user("a+b", "plus+secret")
    assert (
        await keeper.credentials.verify_cached([Candidate("a b", "p q"), Candidate("a+b", "p+q")], HOME)
    ).username == "a b"
    readings = [Candidate("a b", "plus secret"), Candidate("a+b", "plus+secret")]
    assert (await keeper.credentials.verify_cached(readings, HOME)).username == "a+b"


@pytest.mark.parametrize("order", [1, -1])
async def test_either_reading_may_be_the_right_one(keeper: Keeper, order: int) -> None:
    for readings in (
        [Candidate("ann", WORD), Candidate("ann", "x")],
        [Candidate("a b", "p q"), Candidate("a+b", "p+q")],
    ):
        assert await keeper.right(*readings[::order])
        assert await keeper.hashed(*readings[::order]) == 0
        assert await keeper.hashed(*readings[:1]) == 0, "must cache the reading that was right"


async def test_nothing_that_is_kept_holds_the_secret(keeper: Keeper) -> None:
    for claimed in (ANN, WRONG, Candidate("unknown", OTHER)):
        asked = asyncio.ensure_future(keeper.credentials.verify_cached([claimed], HOME))
        await asyncio.sleep(0)
        assert claimed.password in list(reachable(keeper.credentials)), "must be found during the check"
        await asyncio.gather(asked, return_exceptions=True)
        kept = [each if isinstance(each, str) else each.decode("latin-1") for each in reachable(keeper.credentials)]
        assert keeper.users["ann"].password_hash in kept
        for secret in (WORD, WRONG.password, OTHER):
            assert not [text for text in kept if secret in text]


def reachable(start: object) -> Iterator[str | bytes]:
    """Yield all text and bytes that are reachable from an object."""
    seen: set[int] = set()
    waiting: list[Any] = [start]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type | ModuleType | FunctionType | asyncio.AbstractEventLoop):
            continue
        seen.add(id(found))
        if isinstance(found, str | bytes):
            yield found
        else:
            waiting.extend(gc.get_referents(found))


async def test_each_process_keeps_a_different_secret_digest(keeper: Keeper, passwords: Passwords) -> None:
    """Fingerprints that were precomputed, or come from other processes, do not match."""
    throttle = keeper.credentials._throttle
    found = []
    for _ in range(2):
        credentials = Credentials(keeper.users, passwords, throttle, lambda: START)
        await credentials.verify_cached([ANN], HOME)
        found.append({each for each in reachable(credentials) if isinstance(each, bytes) and len(each) == 32})
    assert len(found[0]) == len(found[1]) == 2, "a key and a fingerprint"
    assert not found[0] & found[1]


class Hungry(NamedTuple):
    """A user whose hash takes much memory, and a limit on memory."""

    keeper: Keeper
    user: User

    @contextmanager
    def starved(self) -> Iterator[None]:
        """Limit this process to the memory that it has, and little more. What other tests have freed is taken, too."""
        was = resource.getrlimit(resource.RLIMIT_AS)
        has = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        taken: list[bytes] = []
        resource.setrlimit(resource.RLIMIT_AS, (has + (16 << 20), was[1]))
        try:
            with suppress(MemoryError):
                while True:
                    taken.append(bytes(32 << 20))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, was)


HUNGRY = {
    "argon2": argon2.using(type="ID", memory_cost=64 << 10, time_cost=1, parallelism=1),
    "argon2, four lanes": argon2.using(type="ID", memory_cost=64 << 10, time_cost=1, parallelism=4),
    "scrypt": scrypt.using(rounds=16, block_size=8),
}


@pytest.fixture(params=HUNGRY)
async def hungry(store: Store, request: pytest.FixtureRequest) -> AsyncIterator[Hungry]:
    """Return credentials of one user. Its hash was computed once, so the thread and its stack exist."""
    only = User("ann", HUNGRY[request.param].hash(WORD))
    time, users = [START], {"ann": only, "bob": user("bob", WORD)}
    passwords = Passwords(PasswordSettings(memory_kib=8, time_cost=1, threads=1), users)
    throttle = Throttle(ThrottleSettings(), 1, store, lambda: time[0], LoginQueue(1, 1))
    keeper = Keeper(Credentials(users, passwords, throttle, lambda: time[0]), time, users, [])
    assert await keeper.right(Candidate("bob", WORD))
    yield Hungry(keeper, only)
    passwords.close()


async def test_without_memory_a_login_fails_as_overloaded(hungry: Hungry) -> None:
    """It is not counted as a failure. When there is memory again, the right password is accepted."""
    with hungry.starved(), structlog.testing.capture_logs() as logs:
        for number in range(2 * ThrottleSettings().free):
            with pytest.raises(Overloaded) as refusal:
                await hungry.keeper.credentials.verify(WRONG if number % 2 else ANN, HOME)
            assert "memory" not in str(refusal.value), "must not show the cost of a hash to clients"
    assert {line["event"] for line in logs} == {"login_not_checked"}
    assert len(logs) == 2 * ThrottleSettings().free
    assert all(line["user"] == "ann" and "64 MiB for about" in line["cost"] for line in logs)
    assert await hungry.keeper.credentials.verify(ANN, HOME) is hungry.user
