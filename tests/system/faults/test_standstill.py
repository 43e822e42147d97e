"""A long fault test that fails while the machine stands still is run again: its timeouts say nothing then."""

import os
import subprocess
from threading import Event
from time import monotonic

from tests.support.journal import until
from tests.support.standstill import LEAST, LEAST_SYNC, StandstillWatch

_runs: list[str] = []


def test_a_failure_in_a_standstill_is_tried_again() -> None:
    """The first run fails after this process was suspended."""
    _runs.append("begun")
    if len(_runs) == 1:
        own = os.getpid()
        subprocess.run(["sh", "-c", f"kill -STOP {own}; sleep {LEAST + 1}; kill -CONT {own}"], check=True)
    assert len(_runs) == 2


def test_a_disk_that_stands_still_is_noticed() -> None:
    began, syncs = monotonic(), [LEAST_SYNC + 0.5]
    watch = StandstillWatch(lambda: Event().wait(syncs.pop() if syncs else 0))
    watch.start()
    until(lambda: watch.seconds_since(began) > LEAST_SYNC, "it is noticed")
    assert watch.seconds_since(monotonic()) == 0
