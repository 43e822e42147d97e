"""What the tests of OAuth share: clients in the configuration, and a day that passes before each test."""

from pathlib import Path

import pytest

from tests.support.servers import HandClock, write_config
from tests.wire.oauth.forms import CLIENTS


@pytest.fixture(scope="module")
def config_file(directory: Path, settings: str) -> Path:
    """Write one module's configuration."""
    return write_config(directory, settings, CLIENTS)


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Let every token expire and every secret and failure be forgotten, so that tests do not meet."""
    clock.advance(25 * 3600)
