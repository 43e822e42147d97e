"""Promise 1: an answered issue or revocation survives kill -9 (power loss: `tests/system/faults/test_syscalls.py`)."""

from pathlib import Path

from tests.support.journal import kill_in_a_loop
from tests.support.servers import write_config


def test_an_answered_issue_or_revocation_survives_kill_9(tmp_path: Path) -> None:
    """A short version of the test in `make faults`: two workers, four clients, three kills."""
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    journals = kill_in_a_loop(config, rounds=3, clients=4)
    states = [state for journal in journals for state in journal.issued.values()]
    assert states.count("live") >= 12
    assert states.count("ended") >= 3
