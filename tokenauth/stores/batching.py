"""Group commit: all changes that wait at the same time share one transaction and one commit."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context
from time import monotonic
from typing import Any, Generic, TypeVar

from tokenauth.errors import Overloaded, StoreUnavailable
from tokenauth.models import Instant
from tokenauth.stores.engine import Change, Transaction

A = TypeVar("A")

LIMIT = 10_000
"""Maximum number of changes that wait; further ones are refused."""

IDLE = 12
"""Consecutive idle iterations of the event loop after which the batch is committed."""

GATHER = 0.001
"""Seconds that a commit waits for more changes at most."""


def _deliver(change: Change[A], future: asyncio.Future[A], answer: A) -> None:
    if change.on_commit is not None:
        future.get_loop().call_soon(change.on_commit, answer)
    if not future.done():
        future.set_result(answer)


class Group(Generic[A]):
    """The changes of one kind in a batch, and the futures of their answers."""

    __slots__ = ("_answers", "changes", "futures")

    def __init__(self) -> None:
        self.changes: list[Change[A]] = []
        self.futures: list[asyncio.Future[A]] = []

    def make(self, db: Transaction) -> None:
        """Make all changes, and keep the answers until the commit."""
        self._answers = type(self.changes[0]).make(db, self.changes)

    def resolve(self) -> None:
        """Deliver the answers, after the commit."""
        for change, future, answer in zip(self.changes, self.futures, self._answers, strict=True):
            _deliver(change, future, answer)

    def fail(self, error: Exception) -> None:
        """Deliver an error instead."""
        for future in self.futures:
            if not future.done():
                future.set_exception(error)

    def split(self) -> "Iterable[Group[A]]":
        """Return groups of one change each."""
        for change, future in zip(self.changes, self.futures, strict=True):
            alone = Group[A]()
            alone.changes.append(change)
            alone.futures.append(future)
            yield alone


ChangeKind = type[Change[Any]]

UNMADE = object()
"""The answer for a change that is still to be made."""


class Batch:
    """What one transaction makes: groups of changes by kind, and the latest time that their callers have read."""

    __slots__ = ("groups", "now", "size")

    def __init__(self, now: Instant = 0.0) -> None:
        self.groups: dict[ChangeKind, Group[Any]] = {}  # Any: each kind has its own type of answer
        self.now = now
        self.size = 0

    def add(self, change: Change[A], future: asyncio.Future[A]) -> None:
        kind = type(change)
        group = self.groups.get(kind)
        if group is None:
            group = self.groups[kind] = Group()
        group.changes.append(change)
        group.futures.append(future)
        self.size += 1
        self.now = max(self.now, change.now)

    def make(self, db: Transaction) -> None:
        """Make all changes."""
        for group in self.groups.values():
            group.make(db)

    def settle(self, kind: ChangeKind, answers: Sequence[Any]) -> None:
        """Deliver answers for one kind, after a commit. The changes whose answer is UNMADE stay in the batch."""
        group = self.groups.pop(kind)
        for change, future, answer in zip(group.changes, group.futures, answers, strict=True):
            if answer is UNMADE:
                left = self.groups.setdefault(kind, Group())
                left.changes.append(change)
                left.futures.append(future)
            else:
                _deliver(change, future, answer)

    def resolve(self) -> None:
        """Deliver all answers, after the commit."""
        for group in self.groups.values():
            group.resolve()

    def fail(self, error: Exception) -> None:
        """Deliver an error instead of all answers."""
        for group in self.groups.values():
            group.fail(error)

    def split(self) -> "Iterable[Batch]":
        """Return batches of one change each."""
        for kind, group in self.groups.items():
            for alone in group.split():
                batch = Batch(self.now)
                batch.groups[kind], batch.size = alone, 1
                yield batch


class Writer:
    """Collects changes, commits them in one transaction, then delivers the answers."""

    def __init__(self, commit: Callable[[Batch], Awaitable[None]], gather: float = GATHER) -> None:
        """`commit` makes and commits a batch, or changes nothing and raises. `gather`: seconds to wait for changes."""
        self._commit = commit
        self._gather_time = gather
        self._waiting = Batch()
        self._expected = 0  # changes that may come soon: those who were answered last may go on, and others wait
        self._task: asyncio.Task[None] | None = None

    def apply(self, change: Change[A]) -> asyncio.Future[A]:
        """Make a change; the future has its answer after the commit, or StoreUnavailable if it was not made.

        Raises Overloaded when too many changes wait.
        """
        if self._waiting.size >= LIMIT:
            raise Overloaded
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.add(change, future)
        if self._task is None:
            self._task = asyncio.create_task(self._work(), context=Context())
        return future

    def refuse_waiting(self, error: StoreUnavailable) -> None:
        """Fail the waiting changes, except those of the batch that is being written."""
        self._take().fail(error)

    async def finish(self) -> None:
        """Wait until all changes have been written."""
        if self._task is not None:
            await self._task

    def _take(self) -> Batch:
        batch, self._waiting = self._waiting, Batch(self._waiting.now)
        return batch

    async def _work(self) -> None:
        try:
            while self._waiting.size:
                await self._gather()
                batch = self._take()
                await self._write(batch)
                self._expected = batch.size + self._waiting.size
        finally:
            self._task = None

    async def _gather(self) -> None:
        """Wait briefly for the changes that are expected: they share the commit. A client that is alone never waits."""
        idle, count, deadline = 0, self._waiting.size, monotonic() + self._gather_time
        while count < self._expected and idle < IDLE and monotonic() < deadline:
            await asyncio.sleep(0)
            idle = idle + 1 if count == self._waiting.size else 0
            count = self._waiting.size

    async def _write(self, batch: Batch) -> None:
        try:
            await self._commit(batch)
        except Exception as error:
            if batch.size == 1 or isinstance(error, StoreUnavailable):
                batch.fail(error)
            else:  # one bad change must not fail the others
                for alone in batch.split():
                    await self._write(alone)
            return
        batch.resolve()
