"""Changes to the table `marks`: the clock row, and until when a process has a duty."""

from collections.abc import Sequence
from typing import Self

from sqlalchemy import text

from tokenauth.models import Instant
from tokenauth.stores.engine import Change, Transaction

CLOCK = "clock"
"""The name of the clock row: the latest time that any commit has written."""

PROBE = """
    INSERT INTO marks (name, at) VALUES ('probe', 0) ON CONFLICT (name) DO UPDATE SET at = excluded.at
"""
"""Always writes something, to find out whether anything can be written."""

# Statements are constants: compiling one costs more than running it.
_WRITE_CLOCK = text("""
    INSERT INTO marks (name, at) VALUES (:name, :now)
    ON CONFLICT (name) DO UPDATE SET at = excluded.at WHERE marks.at < excluded.at
""")
_PROBE = text(PROBE)
_ACQUIRE_DUTY = text("""
    INSERT INTO marks (name, at) VALUES (:duty, :until)
    ON CONFLICT (name) DO UPDATE SET at = excluded.at WHERE marks.at <= :now
""")


class SaveTime(Change[None]):
    """Write only the clock row, which every other change writes as well."""

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[None]:
        """Do nothing: the engine writes the clock row."""
        return [None] * len(changes)


class AcquireDuty(Change[bool]):
    """Reserve a periodic task for this process until an instant, unless another process has it."""

    duty: str
    until: Instant

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[bool]:
        """Reserve duties. If several ask for the same one, the first gets it."""
        return [
            db.execute(_ACQUIRE_DUTY, {"duty": change.duty, "until": change.until, "now": change.now}) == 1
            for change in changes
        ]


def write_clock(db: Transaction, now: Instant) -> None:
    """Write `now` to the clock row if it is later, so that time does not go back after a restart."""
    db.execute(_WRITE_CLOCK, {"name": CLOCK, "now": now})


def write_probe(db: Transaction) -> None:
    """Write a row without a meaning."""
    db.execute(_PROBE, {})
