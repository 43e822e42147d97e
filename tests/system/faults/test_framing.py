"""The long form of tests/wire/test_framing.py: ten minutes of streams that no run has seen before."""

import secrets
import time

import pytest

from tests.wire.test_framing import disagreements

MINUTES = 10


@pytest.mark.faults
async def test_two_readers_agree_on_what_a_request_is() -> None:
    deadline = time.monotonic() + MINUTES * 60
    while time.monotonic() < deadline:
        seed = secrets.randbits(32)
        assert await disagreements(seed, 1000) == [], f"{seed=}"
