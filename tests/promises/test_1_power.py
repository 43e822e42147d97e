"""Promise 1: a power failure at any instant loses nothing that was answered."""

from pathlib import Path

import pytest

from tests.support.power import Recorded, record


@pytest.fixture(scope="module")
def recorded(directory: Path) -> Recorded:
    return record(directory, 12)


def test_an_answer_survives_a_power_failure(recorded: Recorded) -> None:
    """A short version of the test in `make faults`: any subset of the writes since the last sync, also torn ones."""
    assert list(recorded.faults(40, booted=1)) == []


def test_without_syncs_a_power_failure_loses_answers(recorded: Recorded) -> None:
    """A negative control: it is the syncs that the test above checks."""
    missing = {"a token is gone", "a revoked token is back", "a released lease is back"}
    for fault in recorded.without_syncs().faults(2000):
        missing -= {fault.partition(": ")[2]}
        if not missing:
            break
    assert not missing
