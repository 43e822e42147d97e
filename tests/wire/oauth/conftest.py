"""Fixtures: OAuth clients in the configuration. Each test starts a day later than the one before."""

from pathlib import Path

import pytest

from tests.support.servers import HandClock, write_config
from tests.wire.oauth.forms import CLIENTS


@pytest.fixture(scope="module")
def config_file(directory: Path, settings: str) -> Path:
    return write_config(directory, settings, CLIENTS)


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all tokens, remembered secrets and failure counters, so that tests are independent."""
    clock.advance(25 * 3600)
