"""What the tests of all routes share: a day that passes before each test."""

import pytest

from tests.support.servers import HandClock


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Let every token expire and every failed login be forgotten, so that tests do not meet."""
    clock.advance(25 * 3600)
