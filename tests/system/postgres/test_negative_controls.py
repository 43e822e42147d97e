"""The check of histories works on PostgreSQL, too: it reports a store with a fault, and not the real one."""

import asyncio
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, suppress
from random import Random
from typing import Any, TypeVar

import pytest

from tests.support.history import Grant, HandTime, History
from tests.support.postgres import Cluster
from tests.support.races import Holder, release_late
from tests.system.postgres.nodes import fresh
from tests.unit.test_negative_controls import assert_like, interleave
from tokenauth.models import LeaseCheck, Pool, PoolToken
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.changes import pool_rows
from tokenauth.stores.changes import pools as pool_changes
from tokenauth.stores.changes.pool_rows import PoolRows
from tokenauth.stores.open import open_store
from tokenauth.stores.postgres import connections

T = TypeVar("T")

TTL = 10.0
POOL = Pool("p", lease_ttl=TTL, capacity=2)

_pauses = threading.local()


class Sound(PoolRows):
    """The real rows, with a pause between reading and writing."""

    def free(self, limit: int) -> list[tuple[int, PoolToken]]:
        """Look up free tokens, then pause if the thread is to."""
        found = super().free(limit)
        getattr(_pauses, "pause", lambda: None)()
        return found


class NoLock(Sound):
    """Rows that are read without a lock, so that others can change them."""

    def free(self, limit: int) -> list[tuple[int, PoolToken]]:
        """Look up free tokens, also locked ones."""
        found = self._found(pool_rows._FREE, limit=limit)
        getattr(_pauses, "pause", lambda: None)()
        return found


def matches_any_user(check: LeaseCheck, token: PoolToken, now: float) -> bool:
    """Accept the lease check of any user."""
    return token.lease(now) is not None


class StorePool:
    """The store of one node, used by one thread. Its event loop runs only during calls."""

    def __init__(self, url: str, time: HandTime, pause: Callable[[], object] = lambda: None) -> None:
        """Run `pause` after reading the free tokens and before leasing one."""
        self._runner = asyncio.Runner()
        self._time = time
        self._pause = pause
        self._store = open_store(DatabaseSettings(url, connections=1), 10, time)
        self._run(self._store.start())

    def assign(self, holder: str) -> Grant | None:
        _pauses.pause = self._pause
        leased = self._run(self._store.pools.assign(POOL, holder, self._time())).token
        return leased and Grant(leased.value, leased.fence)

    def keep_alive(self, holder: str, grant: Grant) -> Grant | None:
        claim = LeaseCheck(holder, grant.fence)
        touched = self._run(self._store.pools.keep_alive(POOL, grant.token, self._time(), claim))
        return grant if touched is not None and touched.granted else None

    def release(self, holder: str, grant: Grant) -> Grant | None:
        claim = LeaseCheck(holder, grant.fence)
        touched = self._run(self._store.pools.release(POOL, grant.token, self._time(), claim))
        return grant if touched is not None and touched.granted else None

    def generate(self) -> Grant | None:
        value = secrets.token_hex(8)
        return Grant(value) if self._run(self._store.pools.generate(POOL, [value], self._time())) else None

    def delete(self, token: str) -> Grant | None:
        return Grant(token) if self._run(self._store.pools.delete(POOL, token, self._time())) else None

    def close(self) -> None:
        with suppress(RuntimeError):
            self._run(self._store.stop(0))
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)


Opener = Callable[..., StorePool]


@pytest.fixture
def machine(postgres: Cluster, time: HandTime) -> Iterator[Opener]:
    """Return a function that opens the database as another node."""
    with fresh(postgres) as url, ExitStack() as stack:
        yield lambda *pause: stack.enter_context(closing(StorePool(url, time, *pause)))


@pytest.mark.parametrize(
    ("rows", "sentences"), [(NoLock, ["certainly held it until", "the same fence", "2 leases"]), (Sound, [])]
)
def test_the_check_detects_an_assign_without_a_lock(
    history: History, machine: Opener, monkeypatch: pytest.MonkeyPatch, rows: type[PoolRows], sentences: list[str]
) -> None:
    monkeypatch.setattr(pool_changes, "PoolRows", rows)
    monkeypatch.setattr(connections, "AT_ONCE", {})  # which would not use these rows
    quick = machine()
    history.record("generate", quick.generate)
    interleave(
        lambda pause: Holder("slow", machine(pause), history, Random(1)).assign(),
        Holder("quick", quick, history, Random(2)).assign,
        locked=rows is Sound,
    )
    assert_like(history.violations(TTL, 1), sentences)


@pytest.mark.parametrize(
    ("checks", "sentences"),
    [
        (
            False,
            ["and b/1 (fence 2) certainly held it", "for a/1 (fence 1) after b/1 (fence 2) had the token", "2 leases"],
        ),
        (True, []),
    ],
)
def test_the_check_detects_a_release_by_a_stale_holder(
    history: History,
    time: HandTime,
    machine: Opener,
    monkeypatch: pytest.MonkeyPatch,
    checks: bool,
    sentences: list[str],
) -> None:
    if not checks:
        monkeypatch.setattr(LeaseCheck, "matches", matches_any_user)
    release_late(history, time, TTL, machine(), machine())
    assert_like(history.violations(TTL, 1), sentences)
