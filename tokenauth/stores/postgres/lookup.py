"""Look-ups by key that share a query."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from typing import Generic, TypeVar

V = TypeVar("V")

_OVERLAP_AFTER = 0.05
"""Seconds after which the next query starts on another connection, though the previous one has not been answered."""


class Lookup(Generic[V]):
    """Coalesces concurrent look-ups into one query; keys that arrive while it runs join the next."""

    def __init__(self, fetch: Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, V]]]) -> None:
        """`fetch` returns the values of those keys that exist."""
        self._fetch = fetch
        self._waiting: list[tuple[Sequence[bytes], asyncio.Future[Mapping[bytes, V]]]] = []
        self._task: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def find(self, *keys: bytes) -> Mapping[bytes, V]:
        """Return the values of these keys, and maybe of others. The query starts after the call.

        Raises StoreUnavailable.
        """
        future: asyncio.Future[Mapping[bytes, V]] = asyncio.get_running_loop().create_future()
        self._waiting.append((keys, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work(), context=Context())
        return await future

    async def _work(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                running = asyncio.create_task(self._run(waiting))
                self._running.add(running)
                running.add_done_callback(self._running.discard)
                await asyncio.wait({running}, timeout=_OVERLAP_AFTER)
        finally:
            self._task = None

    async def _run(self, waiting: Sequence[tuple[Sequence[bytes], asyncio.Future[Mapping[bytes, V]]]]) -> None:
        try:
            found = await self._fetch(list({key: None for keys, _ in waiting for key in keys}))
        except Exception as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for _, future in waiting:
            if not future.done():
                future.set_result(found)
