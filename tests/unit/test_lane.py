"""The executor: a thread that cannot be started costs the jobs that need it, and nothing after it can be."""

import asyncio
from collections.abc import Iterator

import pytest
import structlog

from tests.support.threads import no_new_threads
from tokenauth.errors import Overloaded
from tokenauth.executor import Lane


@pytest.fixture
def lane() -> Iterator[Lane[int, int]]:
    """Run an executor that doubles numbers."""
    lane: Lane[int, int] = Lane(lambda number: 2 * number, threads=2, queue=2)
    yield lane
    lane.close()


async def test_a_first_job_without_a_thread_is_overload(lane: Lane[int, int]) -> None:
    with no_new_threads(), structlog.testing.capture_logs() as logs:
        for _ in range(10):  # more than there is room for: none of them keeps its place
            with pytest.raises(Overloaded):
                await lane.run(1)
        assert lane.trouble() == "a thread cannot be started"
    assert [line["event"] for line in logs] == ["thread_not_started"], "once, however often it fails"


async def test_the_next_job_starts_the_missing_thread(lane: Lane[int, int]) -> None:
    with no_new_threads(), pytest.raises(Overloaded):
        await lane.run(1)
    async with asyncio.timeout(10):
        with structlog.testing.capture_logs() as logs:
            assert await asyncio.gather(*map(lane.run, range(4))) == [0, 2, 4, 6]
    assert [line["event"] for line in logs] == ["thread_started_again"]
    assert lane.trouble() is None


async def test_asking_for_the_trouble_tries_again(lane: Lane[int, int]) -> None:
    with no_new_threads(), pytest.raises(Overloaded):
        await lane.run(1)
    assert lane.trouble() is None, "without a job that would show it"
