"""A long fault test that fails while the machine stands still is run again: its timeouts say nothing then."""

import os
import subprocess

from tests.support.standstill import LEAST

_runs: list[str] = []


def test_a_failure_in_a_standstill_is_tried_again() -> None:
    """The first run fails after this process was suspended."""
    _runs.append("begun")
    if len(_runs) == 1:
        own = os.getpid()
        subprocess.run(["sh", "-c", f"kill -STOP {own}; sleep {LEAST + 1}; kill -CONT {own}"], check=True)
    assert len(_runs) == 2
