"""Promise 11, at length: an hour of streams by a grammar to a server, and ten minutes of random ones in process."""

import secrets
import time

import pytest

from tests.support.length import scaled
from tests.support.servers import Server
from tests.wire.test_framing import disagreements
from tests.wire.test_fuzzing import fuzz


async def test_two_parsers_agree_on_random_streams() -> None:
    deadline = time.monotonic() + scaled(600, 10)
    while time.monotonic() < deadline:
        seed = secrets.randbits(32)
        assert await disagreements(seed, 1000) == [], f"{seed=}"


def test_an_hour_of_fuzzing_gets_no_wrong_answer(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    deadline, rounds = time.monotonic() + scaled(3600, 10), 0
    while time.monotonic() < deadline:
        fuzz(server, secrets.randbits(32), 500)
        rounds += 1
    with capsys.disabled():
        print(f"\n{rounds * 500} streams")
