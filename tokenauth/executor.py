"""An executor for work that would block the event loop: a few threads, which may run at low priority.

Results come back in batches: one wake-up of the event loop delivers all that are ready. A thread that cannot be started
(no memory, no process left) fails the jobs that need it, and is tried again at the next one.
"""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

from tokenauth.errors import Overloaded
from tokenauth.logs import log

Job = TypeVar("Job")
Result = TypeVar("Result")

LOW_PRIORITY = 19
"""How far the threads stand back (nice): at 10, validation took twice as long under a flood of logins."""


class Lane(Generic[Job, Result]):
    """Runs one function in threads, for a bounded number of callers.

    Each job wakes all threads that wait, one after the other: that is too much for jobs of less than a millisecond.
    """

    def __init__(
        self, function: Callable[[Job], Result], threads: int, queue: int = 1, gives_way: bool = False
    ) -> None:
        """Run `function` in up to `threads` threads; `queue` more callers may wait. `gives_way`: at low priority."""
        self._function = function
        self._threads = threads
        self._started = 0
        self._room = threads + queue
        self._gives_way = gives_way
        self._jobs: SimpleQueue[tuple[Job, asyncio.Future[Result]] | None] = SimpleQueue()
        self._done: deque[tuple[asyncio.Future[Result], Result | Exception]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = False
        self._start_failed = False

    async def run(self, job: Job) -> Result:
        """Run a job and return its result. Raises Overloaded when too many wait, or no thread can be started.

        A job that has begun keeps its place until it is done, even if its caller has gone.
        """
        return await self.submit(job)

    def submit(self, job: Job) -> asyncio.Future[Result]:
        """Have a job run, and return the future of its result, which may be ended before. Raises what run() raises."""
        if self._room <= 0:
            raise Overloaded
        if self._started < self._threads and not self._start():
            raise Overloaded("The server cannot start a thread. Try again shortly.")
        self._room -= 1
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, future))
        return future

    def trouble(self) -> str | None:
        """Return why no job can be done, after trying again; call it on the event loop."""
        return "a thread cannot be started" if self._start_failed and not self._start() else None

    def close(self) -> None:
        """Let the threads end after what they have begun."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _start(self) -> bool:
        """Start the threads that do not run yet; return whether any runs. Some are enough to go on with."""
        self._loop = asyncio.get_running_loop()
        try:
            while self._started < self._threads:
                threading.Thread(target=self._work, name=f"lane-{self._started}", daemon=True).start()
                self._started += 1
        except (RuntimeError, MemoryError) as error:
            if not self._start_failed:
                log.error("thread_not_started", reason=str(error), running=self._started, wanted=self._threads)
            self._start_failed = True
            return self._started > 0
        if self._start_failed:
            log.info("thread_started_again", running=self._started)
        self._start_failed = False
        return True

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
    """Lower the priority of the calling thread, so that answering requests comes first.

    Linux only: other systems know priorities of processes, and a thread's id may be the id of another process there.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
