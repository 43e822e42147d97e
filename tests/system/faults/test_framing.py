"""A long run of tests/wire/test_framing.py: ten minutes of new random streams."""

import secrets
import time

import pytest

from tests.wire.test_framing import disagreements

MINUTES = 10


@pytest.mark.faults
async def test_two_parsers_agree_on_random_streams() -> None:
    deadline = time.monotonic() + MINUTES * 60
    while time.monotonic() < deadline:
        seed = secrets.randbits(32)
        assert await disagreements(seed, 1000) == [], f"{seed=}"
