"""Promise 4: whichever system call of a commit fails, the answer is 503 or true. At length in `make faults`."""

from pathlib import Path

from tests.support.syscalls import survive


def test_a_call_of_a_commit_may_fail(tmp_path: Path) -> None:
    survive(tmp_path, ["EIO"], step=12)
