"""The interface between the stores and a database: what an engine provides, and what a change is.

An `Engine` is what differs between SQLite and PostgreSQL. The stores, the changes and the cache are written once, on
top of it.
"""

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

from msgspec import Struct
from sqlalchemy import ClauseElement, CompoundSelect, Select

from tokenauth.clock import Clock
from tokenauth.models import Failures, Instant, Token

Values = Mapping[str, Any]
"""The named parameters of a statement."""

Rows = Sequence[Any]

Query = Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]]

OnClockAdvance = Callable[[Instant], object]
"""Is called with a later time that another process has written to the clock row."""


def ignore_clock(_: Instant) -> None:
    """Do nothing when the clock row advances."""


class LockConflict(Exception):
    """Other transactions have locked rows that this one needs: retry it with exclusive locks."""


class Transaction(Protocol):
    """Runs statements that are committed together. A statement is a constant: it is compiled once and kept."""

    single_writer: bool
    """Whether no other transaction can write to this database at the same time."""

    exclusive: bool
    """Whether all locks are exclusive, also those requested as shared."""

    def rows(self, statement: ClauseElement, values: Values) -> Rows:
        """Run a query, or a change that returns rows, and return the rows."""

    def rows_each(self, statement: ClauseElement, each: Sequence[Values]) -> Rows:
        """Run a change that returns rows once for each set of values, and return all rows."""

    def execute(self, statement: ClauseElement, values: Values) -> int:
        """Run a change and return how many rows it touched."""

    def execute_each(self, statement: ClauseElement, each: Sequence[Values]) -> None:
        """Run a change once for each set of values."""

    def lock(self, *names: str, shared: bool = False) -> None:
        """Wait for the locks of these names and keep them until the transaction ends.

        Several transactions can have a `shared` lock at the same time.
        """

    def now(self, read: Instant) -> Instant:
        """Return the time at which the change happens; `read` is the latest time that its callers have read."""

    def notify(self) -> None:
        """Wake the caches of other processes after the commit: there are new revocations."""


A_co = TypeVar("A_co", covariant=True)
A = TypeVar("A")


class Change(Struct, Generic[A_co], kw_only=True):
    """A change to the database; the type parameter is the type of its answer.

    It is a Struct because there are many kinds: each dataclass would make every start half a millisecond longer.
    """

    now: Instant = 0.0
    """The time that the caller has read, written to the clock row by the commit; 0 if the change needs no time."""
    on_commit: Callable[[Any], object] | None = None  # Any: its answer, whose type is covariant
    """Is called with the answer after the commit and before it is delivered, also if the caller was cancelled."""

    @classmethod
    @abstractmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[A_co]:
        """Make many changes of this kind in one transaction; return one answer for each, in order."""


class Feed(Protocol):
    """The revocations that a cache must know of, from all processes."""

    sees_commits: bool
    """Whether it has what other processes of this machine have committed as soon as they know of it themselves."""

    def is_current(self) -> bool:
        """Return whether the feed is up to date. While it is not, the cache must not be used."""

    def age(self) -> float:
        """Return the seconds since the feed was last known to have all revocations."""

    def drain(self) -> Collection[bytes] | None:
        """Return the digests revoked since the last call; None if some may have been missed.

        Raises StoreUnavailable if the revocations cannot be read.
        """

    def add(self, digests: Collection[bytes]) -> None:
        """Add digests that were revoked."""

    def invalidate(self) -> None:
        """Stop being current until the log of revocations has been read again, which starts now."""


class Engine(Protocol):
    """A database that is read, changed and watched. Every method that reads or changes can raise StoreUnavailable."""

    @property
    def clock(self) -> Clock:
        """The clock that all users of this database share."""

    @property
    def feed(self) -> Feed:
        """The revocations of all processes that use this database."""

    @property
    def identity(self) -> str:
        """Differs from that of another database at the same address; DATABASE_LOST after the open one was replaced."""

    async def start(self, on_clock_advance: OnClockAdvance) -> Instant:
        """Migrate the schema, connect, and return the time in the clock row. Raises StartError.

        `on_clock_advance` is called after this has returned, and not before.
        """

    async def stop(self, now: Instant) -> None:
        """Finish the waiting changes, write `now` to the clock row, and disconnect."""

    async def ready(self) -> str | None:
        """Return why the database cannot be used, or None."""

    async def read(self, query: Query, values: Values, brief: bool = False) -> Rows:
        """Run a query. `brief`: it takes microseconds, such as a look-up by key."""

    def apply(self, change: Change[A]) -> Awaitable[A]:
        """Make a change; the answer comes after the commit. Changes that wait at the same time share a commit."""

    async def token(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""

    @property
    def token_now(self) -> Callable[[bytes], Token | None] | None:
        """Does what `token` does, without waiting; None if this engine must wait."""

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Return what is stored under these keys; missing keys are left out."""
