"""The one writer of a process: everything that waits to be written shares one commit."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from tokenauth.errors import Overloaded, StoreUnavailable
from tokenauth.models import Instant
from tokenauth.stores.engine import Transaction

Verb = Callable[[Transaction, Sequence[Any]], Sequence[Any]]
"""A change, written once for many callers: takes what each of them asks for, returns an answer to each."""

Batch = Mapping[Verb, Sequence[Any]]
"""What is to be done in one transaction."""

Answers = Sequence[Sequence[Any]]
"""The answers to a batch: one row for each verb, in order."""

Waiting = dict[Verb, list[tuple[Any, asyncio.Future[Any]]]]

LIMIT = 10_000
"""Changes that may wait; one more is refused."""

QUIET = 12
"""Turns of the event loop in a row in which nobody came, after which a commit waits for nobody more."""

GATHER = 0.001
"""Seconds that a commit is put off at the most."""


class Writer:
    """Takes all that waits, applies it in one transaction, commits once, then answers everybody."""

    def __init__(self, transact: Callable[[Batch, Instant], Awaitable[Answers]]) -> None:
        """Write through `transact`, which applies a batch and commits it, or does nothing and raises."""
        self._transact = transact
        self._waiting: Waiting = {}
        self._count = 0
        self._now: Instant = 0
        self._task: asyncio.Task[None] | None = None

    def write(self, verb: Verb, wish: Any, now: Instant) -> asyncio.Future[Any]:
        """Have a change made and committed; the future has the verb's answer, or StoreUnavailable if it was not made.

        Raises Overloaded when too many wait.
        """
        if self._count >= LIMIT:
            raise Overloaded
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(verb, []).append((wish, future))
        self._count += 1
        self._now = max(self._now, now)
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return future

    def refuse_waiting(self) -> None:
        """Fail what waits with StoreUnavailable, but for the batch that is being written."""
        waiting, self._waiting, self._count = self._waiting, {}, 0
        _fail(waiting, StoreUnavailable())

    async def finish(self) -> None:
        """Wait until everything that was asked for has been written."""
        if self._task is not None:
            await self._task

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                waiting, self._waiting, self._count = self._waiting, {}, 0
                await self._commit(waiting)
        finally:
            self._task = None

    async def _gather(self) -> None:
        """When several wait, let those come who are on their way: they then share the commit."""
        quiet, count, deadline = 0, self._count, monotonic() + GATHER
        while count > 1 and quiet < QUIET and monotonic() < deadline:
            await asyncio.sleep(0)
            quiet = quiet + 1 if count == self._count else 0
            count = self._count

    async def _commit(self, waiting: Waiting) -> None:
        batch = {verb: [wish for wish, _ in wishes] for verb, wishes in waiting.items()}
        try:
            answers = await self._transact(batch, self._now)
        except Exception as error:
            alone = sum(map(len, waiting.values())) == 1
            if alone or isinstance(error, StoreUnavailable):
                _fail(waiting, error)
            else:  # one bad wish must not spoil the others
                for verb, wishes in waiting.items():
                    for wish in wishes:
                        await self._commit({verb: [wish]})
            return
        for wishes, row in zip(waiting.values(), answers, strict=True):
            for (_, future), answer in zip(wishes, row, strict=True):
                if not future.done():
                    future.set_result(answer)


def _fail(waiting: Waiting, error: Exception) -> None:
    for wishes in waiting.values():
        for _, future in wishes:
            if not future.done():
                future.set_exception(error)
