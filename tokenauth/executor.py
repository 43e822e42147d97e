"""A small thread pool for work that would block the event loop."""

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
"""The nice value of low-priority threads. With 10, validation took twice as long during a flood of logins."""


class Executor(Generic[Job, Result]):
    """Runs one function in a few threads, for a bounded number of callers.

    Why not `concurrent.futures.ThreadPoolExecutor`, which this replaces:

    - Its threads are joined when the interpreter exits. A thread that hangs on a broken disk would keep the process
      from ending. These threads are daemons.
    - When it cannot start a thread, `submit` raises, but the job stays in its queue: a write that was refused would be
      made later. Here a refused job is never run, and the next job tries to start the thread again.
    - Its queue has no bound.
    - It wakes the event loop for each result. Here one wake-up delivers all results that are ready. A job costs 19
      microseconds of CPU instead of 34, and 2 instead of 14 when 32 callers wait (measured on uvloop with a job that
      does nothing). Requests hardly gain from that: a lease by 1 client at a time costs about 3 % less CPU, by 32
      clients, whose writes share a job, less than 1 %.

    An idle thread keeps no reference to its last job, which may be a password.
    """

    def __init__(
        self, function: Callable[[Job], Result], threads: int, queue: int = 1, low_priority: bool = False
    ) -> None:
        """Run `function` in up to `threads` threads, while at most `queue` more callers wait."""
        self._function = function
        self._threads = threads
        self._started = 0
        self._room = threads + queue
        self._low_priority = low_priority
        self._jobs: SimpleQueue[tuple[Job, asyncio.Future[Result]] | None] = SimpleQueue()
        self._done: deque[tuple[asyncio.Future[Result], Result | Exception]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wakeup_pending = False
        self._start_failed = False

    def run(self, job: Job) -> asyncio.Future[Result]:
        """Run a job; return the future of its result, which the caller may also set or cancel.

        Raises Overloaded when too many wait, or when no thread can be started. The job of a caller that was cancelled
        keeps its place in the bound until it is done.
        """
        if self._room <= 0:
            raise Overloaded
        if self._started < self._threads and not self._start():
            raise Overloaded("The server cannot start a thread. Try again shortly.")
        self._room -= 1
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, future))
        return future

    def problem(self) -> str | None:
        """Return why no job can be run, after trying again. Call it on the event loop."""
        return "a thread cannot be started" if self._start_failed and not self._start() else None

    def close(self) -> None:
        """Let the threads end after the jobs that were submitted."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _start(self) -> bool:
        """Start the missing threads; return whether at least one runs."""
        self._loop = asyncio.get_running_loop()
        try:
            while self._started < self._threads:
                threading.Thread(target=self._work, name=f"executor-{self._started}", daemon=True).start()
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
        if self._low_priority:
            _lower_priority()
        while (item := self._jobs.get()) is not None:
            job, future = item
            self._done.append((future, self._try(job)))
            del item, job  # it may be a password, and the next job may come much later
            if not self._wakeup_pending:
                self._wakeup_pending = True
                assert self._loop is not None
                with suppress(RuntimeError):  # the event loop is closed, so no caller waits
                    self._loop.call_soon_threadsafe(self._deliver)

    def _try(self, job: Job) -> Result | Exception:
        try:
            return self._function(job)
        except Exception as error:
            return error

    def _deliver(self) -> None:
        """Pass the results that are ready to their callers, on the event loop."""
        self._wakeup_pending = False  # first, so that a result that is added from now on causes another wake-up
        while self._done:
            future, result = self._done.popleft()
            self._room += 1
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _lower_priority() -> None:
    """Lower the priority of the calling thread, so that answering requests comes first.

    Linux only: other systems know priorities of processes, and a thread's id may be the id of another process there.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
