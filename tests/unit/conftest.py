"""Fixtures of several modules: services in the process of the test."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.servers import HandClock
from tests.support.services import Opener


@pytest.fixture
async def opener(tmp_path: Path) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener(tmp_path, stack)


@pytest.fixture
def hand_clock(tmp_path: Path) -> HandClock:
    """Return the clock of one test."""
    return HandClock(tmp_path / "clock", create=True)
