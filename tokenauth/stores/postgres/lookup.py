"""Look-ups that share a query: the keys of all who ask at the same time."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

Found = Mapping[bytes, Any]
"""What was found, by key."""

_PATIENCE = 0.05
"""Seconds after which a query is no longer waited for by those who came later: they ask on another connection."""


class Lookup:
    """Asks with one query for what several wish to know at the same time, and with the next for what came meanwhile."""

    def __init__(self, fetch: Callable[[Sequence[bytes]], Awaitable[Found]]) -> None:
        """Ask through `fetch`, which finds what is there of any number of keys."""
        self._fetch = fetch
        self._waiting: list[tuple[Sequence[bytes], asyncio.Future[Found]]] = []
        self._task: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[None]] = set()

    async def find(self, *keys: bytes) -> Found:
        """Return what is there of these keys, maybe of others; the query begins after this. Raises StoreUnavailable."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((keys, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        found: Found = await future
        return found

    async def _work(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                asking = asyncio.create_task(self._ask(waiting))
                self._asking.add(asking)
                asking.add_done_callback(self._asking.discard)
                await asyncio.wait({asking}, timeout=_PATIENCE)
        finally:
            self._task = None

    async def _ask(self, waiting: Sequence[tuple[Sequence[bytes], asyncio.Future[Found]]]) -> None:
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
