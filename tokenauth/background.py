"""Work that goes on when the request that started it has ended."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Tasks that are finished before the service closes."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()  # Any: each has its own type of result

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work to its end, also if the caller is cancelled meanwhile."""
        return await asyncio.shield(self.start(work))

    async def close(self) -> None:
        """Wait until all is finished."""
        while self._tasks:
            await asyncio.wait(self._tasks)


class HasBackground(Protocol):
    background: Background


S = TypeVar("S", bound=HasBackground)


async def outlast(work: Awaitable[T]) -> tuple[asyncio.Future[T], bool]:
    """Do work to its end, also if the caller is cancelled meanwhile.

    Return the finished work, and whether the caller was cancelled. If it is cancelled again, it no longer waits.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await asyncio.wait([task])
        return task, True
    return task, False


def finished(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Let a method go on to its end, also if its caller is cancelled: what it has written is counted and logged."""

    @wraps(method)
    async def finish(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.background.finish(method(self, *args, **kwargs))

    return finish
