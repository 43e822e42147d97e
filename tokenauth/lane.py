"""A lane of its own for work that would hold up the event loop: a few threads, which may give way to everything else.

Results come back in bundles: one wake-up of the event loop serves all that are ready.
"""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

from tokenauth.errors import Overloaded

Job = TypeVar("Job")
Result = TypeVar("Result")

LOW_PRIORITY = 19
"""How far the threads stand back (nice): at 10, validation took twice as long under a flood of logins."""


class Lane(Generic[Job, Result]):
    """Runs one function in threads, for a bounded number of callers."""

    def __init__(
        self, function: Callable[[Job], Result], threads: int, queue: int = 1, gives_way: bool = False
    ) -> None:
        """Run `function` in so many threads; `queue` more callers may wait. `gives_way`: at low priority."""
        self._function = function
        self._threads = threads
        self._room = threads + queue
        self._gives_way = gives_way
        self._jobs: SimpleQueue[tuple[Job, asyncio.Future[Result]] | None] = SimpleQueue()
        self._done: deque[tuple[asyncio.Future[Result], Result | Exception]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = False

    async def run(self, job: Job) -> Result:
        """Have a job done and return its result. Raises Overloaded when too many wait.

        A job that was begun keeps its place until it is done, even if its caller has gone.
        """
        if self._room <= 0:
            raise Overloaded
        self._room -= 1
        if self._loop is None:
            self._open()
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, future))
        return await future

    def close(self) -> None:
        """Let the threads end after what they have begun."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        for number in range(self._threads):
            threading.Thread(target=self._work, name=f"lane-{number}", daemon=True).start()

    def _work(self) -> None:
        if self._gives_way:
            _give_way()
        while (item := self._jobs.get()) is not None:
            job, future = item
            self._done.append((future, self._try(job)))
            del item, job  # it may be a password, and the next one may be long in coming
            if not self._told:
                self._told = True
                assert self._loop is not None
                with suppress(RuntimeError):  # the loop has closed, and nobody waits any more
                    self._loop.call_soon_threadsafe(self._deliver)

    def _try(self, job: Job) -> Result | Exception:
        try:
            return self._function(job)
        except Exception as error:
            return error

    def _deliver(self) -> None:
        """Hand out what is ready, on the event loop."""
        self._told = False  # first: what is appended from now on is told again
        while self._done:
            future, result = self._done.popleft()
            self._room += 1
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _give_way() -> None:
    """Lower the priority of the calling thread, so that answering comes before this work."""
    with suppress(OSError, AttributeError):  # where threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
