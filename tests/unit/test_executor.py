"""The executor: its queue limit, threads that cannot be started, and references to finished jobs."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import structlog

from tests.support.threads import no_new_threads
from tokenauth.errors import Overloaded
from tokenauth.executor import Executor


@pytest.fixture
def doubling() -> Iterator[Executor[int, int]]:
    """Run an executor that doubles numbers."""
    executor: Executor[int, int] = Executor(lambda number: 2 * number, threads=2, queue=2)
    yield executor
    executor.close()


async def test_a_first_job_without_a_thread_is_overload(doubling: Executor[int, int]) -> None:
    with no_new_threads(), structlog.testing.capture_logs() as logs:
        for _ in range(10):  # more than the queue holds: a failed job must leave it
            with pytest.raises(Overloaded):
                await doubling.run(1)
        assert doubling.problem() == "a thread cannot be started"
    assert [line["event"] for line in logs] == ["thread_not_started"], "must log it once"


async def test_the_next_job_starts_the_missing_thread(doubling: Executor[int, int]) -> None:
    with no_new_threads(), pytest.raises(Overloaded):
        await doubling.run(1)
    async with asyncio.timeout(10):
        with structlog.testing.capture_logs() as logs:
            assert await asyncio.gather(*map(doubling.run, range(4))) == [0, 2, 4, 6]
    assert [line["event"] for line in logs] == ["thread_started_again"]
    assert doubling.problem() is None


async def test_trouble_tries_to_start_a_thread_again(doubling: Executor[int, int]) -> None:
    with no_new_threads(), pytest.raises(Overloaded):
        await doubling.run(1)
    assert doubling.problem() is None, "must recover without a job"


async def test_a_job_refused_without_a_thread_never_runs() -> None:
    ran: list[str] = []
    executor = Executor(ran.append, threads=1)
    with no_new_threads(), pytest.raises(Overloaded):
        await executor.run("refused")
    await executor.run("accepted")
    assert ran == ["accepted"]
    executor.close()


async def test_a_cancelled_caller_keeps_its_place_until_the_end() -> None:
    """Otherwise a client that disconnects could make the server queue work without bound."""
    gate = threading.Event()
    executor: Executor[float, bool] = Executor(gate.wait, threads=1, queue=1)
    waiting = [executor.run(20) for _ in range(2)]
    for future in waiting:
        future.cancel()
    with pytest.raises(Overloaded):
        executor.run(20)
    gate.set()
    async with asyncio.timeout(20):
        while True:
            try:
                assert await executor.run(20)
                break
            except Overloaded:
                await asyncio.sleep(0.001)
    executor.close()


async def test_an_idle_thread_keeps_no_reference_to_a_job() -> None:
    class Password:
        """Can be weakly referenced, unlike a str."""

    executor = Executor(id, threads=1)
    password = Password()
    seen = weakref.ref(password)
    await executor.run(password)
    del password
    async with asyncio.timeout(10):
        while seen() is not None:  # the thread may still be about to wait for the next job
            await asyncio.sleep(0.001)
            gc.collect()
    executor.close()


async def test_an_error_of_the_function_reaches_the_caller() -> None:
    executor = Executor(int, threads=1)
    with pytest.raises(ValueError, match="invalid literal"):
        await executor.run("x")
    assert await executor.run("1") == 1, "its thread must continue"
    executor.close()


HANGS = """
import asyncio, threading
from tokenauth.executor import Executor
async def main():
    started = threading.Event()
    Executor(lambda _: started.set() or threading.Event().wait(), threads=1).run(None)
    await asyncio.to_thread(started.wait)
asyncio.run(main())
"""


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    assert subprocess.run([sys.executable, "-c", HANGS], timeout=30, check=False).returncode == 0
