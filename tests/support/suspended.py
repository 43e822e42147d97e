"""Processes that are suspended (SIGSTOP) for a time, while others must be served."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.connections import Connection
from tests.support.journal import until


@contextmanager
def suspended(processes: Sequence[int]) -> Iterator[None]:
    """Suspend processes. Those that have ended meanwhile are not woken."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def with_children(process: int) -> list[int]:
    """Return a process and all that it has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in with_children(int(child)))]


def others_are_served(port: int, seconds: float, bound: float) -> int:
    """Log in, probe and log out over new connections for some seconds, and return how often.

    Each of the three is answered within `bound` seconds, and a token that was revoked is refused at once.
    """
    ends, count = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        with Connection(port) as connection:
            began = time.monotonic()
            token = connection.log_in()
            assert connection.valid(token)
            connection.log_out(token)
            assert time.monotonic() - began < 3 * bound, "an answer took too long"
        with Connection(port) as connection:
            assert not connection.valid(token)
        count += 1
    return count


def is_served(port: int) -> bool:
    """Wait until a server works again: a new login is valid."""

    def works() -> bool:
        with Connection(port) as connection:
            return connection.ask("GET", "/readyz").status == 200 and connection.valid(connection.log_in())

    until(works, "it serves again")
    return True
