"""Each test of the routes starts a day later than the one before."""

import pytest

from tests.support.servers import HandClock


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all tokens and failure counters, so that tests are independent."""
    clock.advance(25 * 3600)
