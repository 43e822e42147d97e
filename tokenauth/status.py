"""How a node is doing: what its main process knows of all its workers, for GET /api/status."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenauth.metrics import Counts, Key
from tokenauth.models import Throttled

STEP = 60
"""Seconds of one number of the history."""

LENGTH = 60
"""Numbers in the history."""

Numbers = Sequence[int | None]


class History(NamedTuple):
    """What happened in each minute until `end`, the oldest first; None where that is not known.

    The last minute is not over. `leases` and `waiting` are what there was at its end.
    """

    end: int
    logins: Numbers
    failures: Numbers
    validations: Numbers
    leases: Numbers
    waiting: Numbers


class WorkerStatus(NamedTuple):
    pid: int
    started_at: int


class NodeStatus(NamedTuple):
    """The sums of all workers, since the start of the main process."""

    started_at: int
    workers: Sequence[WorkerStatus]
    configured: int
    crashes: int
    counts: Counts
    gauges: dict[Key, float]
    history: History
    throttled: Sequence[Throttled] = ()
    """Whom the workers have refused after failed logins, and who may still have to wait; also those that have ended."""


class Node:
    """The node of a worker."""

    def __init__(self) -> None:
        self.ask: Callable[[], Awaitable[NodeStatus]] | None = None
        """Asks the main process; None if there is none. Raises Overloaded."""
        self.config_file: Path | None = None
        """Where the settings were read; None if that is not known."""

    async def throttled(self, own: Callable[[], Sequence[Throttled]]) -> Sequence[Throttled]:
        """Return who was refused on this node; `own` returns who was in this process, if that is the whole node."""
        return own() if self.ask is None else (await self.ask()).throttled
