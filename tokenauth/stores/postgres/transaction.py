"""A transaction of asyncpg, inside SQLAlchemy's `run_sync`."""

import math
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import AdaptedConnection, ClauseElement
from sqlalchemy.dialects import postgresql

from tokenauth.clock import Clock, boottime
from tokenauth.models import Instant
from tokenauth.stores.engine import Rows, Values
from tokenauth.stores.sql import StatementCache

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")

PATIENCE = 0.5
"""Seconds after which a statement of `at_once` fails that has waited for locks."""

WITHIN = 1.0
"""Seconds after which a statement of `at_once` fails, from when it is sent.

A node's estimate of the database's clock may be wrong by one round trip: a statement then has that much less time.
PATIENCE counts within it.
"""

CHANNEL = "tokenauth_revocations"
"""The channel on which PostgreSQL notifies of revocations."""

SERVER_CLOCK = "extract(epoch FROM clock_timestamp())::float8"
"""The time of PostgreSQL's clock, which can be set back."""

CLOCK_ROW = "(SELECT at FROM marks WHERE name = 'clock')"
"""The latest time that any process has written, or NULL."""

_NOW = f"greatest({SERVER_CLOCK}, {CLOCK_ROW})"
_LOCK = f"SELECT pg_advisory_xact_lock%s(key), {_NOW} FROM unnest($1::int8[]) key"  # noqa: S608 - constants
_LOCK_EXCLUSIVE, _LOCK_SHARED = _LOCK % "", _LOCK % "_shared"
_READ_CLOCK = f"SELECT {_NOW}"
_NOTIFY = f"SELECT pg_notify('{CHANNEL}', '')"

_statements = StatementCache(postgresql.asyncpg.dialect())  # type: ignore[no-untyped-call]


def advisory_key(name: str) -> int:
    """Return the number of the advisory lock with this name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), signed=True)


class PostgresTransaction:
    """Transaction whose named locks are advisory locks and whose time is the database's.

    Others write at the same time. Each kind of change has a transaction to itself, takes its locks in one order, and
    locks rows in one order or skips locked rows, so no two transactions can deadlock.
    """

    single_writer = False

    def __init__(
        self,
        connection: AdaptedConnection,
        caller_time: bool = True,
        notifies: bool = False,
        exclusive: bool = False,
        clock: Instant | None = None,
        patience: float = PATIENCE,
        deadline: Clock = lambda: math.inf,
    ) -> None:
        """Run statements on a connection; the caller begins and commits.

        `caller_time`: the time is what the callers have read, not the database's. `notifies`: NOTIFY works there.
        `clock`: what `steps` writes to the clock row, if anything. `patience`: seconds that they may take. `deadline`:
        asked when they are sent, the time of the database's clock at which they fail.
        """
        self.sent_at: float | None = None
        """When `steps` sent a statement that was not answered, by `boottime`."""
        self.stepped = False
        """Whether `steps` has made a change: then it has also written the clock row."""
        self._deadline = deadline
        self._connection = connection
        self.exclusive = exclusive
        self._clock = clock
        self._patience = patience
        self._notifies = notifies
        self._caller_time = caller_time
        self._locked_at: Instant | None = None

    @property
    def latest(self) -> Instant:
        """The database's time that `now` has returned; 0 if it has returned none."""
        return 0.0 if self._caller_time else self._locked_at or 0.0

    def rows(self, statement: ClauseElement, values: Values) -> Rows:
        text, names, constants = _statements.compile(statement, values)
        return self._run(lambda db: db.fetch(text, *_ordered(names, constants, values)))

    def rows_each(self, statement: ClauseElement, each: Sequence[Values]) -> Rows:
        """Run a change that returns rows once for each set of values, in one round trip."""
        return self._each(lambda db: db.fetchmany, statement, each) if each else []

    def execute(self, statement: ClauseElement, values: Values) -> int:
        text, names, constants = _statements.compile(statement, values)
        status = self._run(lambda db: db.execute(text, *_ordered(names, constants, values)))
        return int(status.rpartition(" ")[2])

    def execute_each(self, statement: ClauseElement, each: Sequence[Values]) -> None:
        """Run a change once for each set of values, in one round trip."""
        if each:
            self._each(lambda db: db.executemany, statement, each)

    def steps(self, statement: ClauseElement, steps: Sequence[Values]) -> Rows:
        """Run a statement of `at_once` in steps, in one round trip. Outside a transaction, it also commits."""
        own: Values = {
            **{"clock": None, "notifies": self._notifies, "caller_time": self._caller_time},
            **{"patience": self._patience, "deadline": self._deadline()},
        }
        each = [{**own, **values} for values in steps]
        each[-1]["clock"] = self._clock  # as in other transactions, its row is the last that is locked
        self.sent_at = boottime()
        rows = self.rows_each(statement, each)
        self.sent_at = None
        self.stepped = True
        return rows

    def check_confirmed(self) -> None:
        """Raise OSError if what was committed may be lost: the synchronous standbys lack it, or one was promoted."""
        if self._connection.driver_connection.unconfirmed:
            raise OSError("PostgreSQL has committed without its synchronous standbys, or one was promoted")

    def timed(self, statement: ClauseElement, values: Values) -> Rows:
        """Run a query of `at_once` that reads the time."""
        return self.rows(statement, {"caller_time": self._caller_time, **values})

    def lock(self, *names: str, shared: bool = False) -> None:
        """Wait for advisory locks, always in the same order."""
        keys = sorted(map(advisory_key, names))
        rows = self._run(lambda db: db.fetch(_LOCK_SHARED if shared and not self.exclusive else _LOCK_EXCLUSIVE, keys))
        self._locked_at = rows[-1][1]

    def now(self, read: Instant) -> Instant:
        """Return the database's time when the last lock was acquired."""
        if self._caller_time:
            return read
        if self._locked_at is None:
            self._locked_at = self._run(lambda db: db.fetchval(_READ_CLOCK))
        return max(read, self._locked_at)

    def notify(self) -> None:
        """Have the database notify all listeners after the commit."""
        if self._notifies:
            self._run(lambda db: db.execute(_NOTIFY))

    def _each(
        self,
        how: "Callable[[asyncpg.Connection], Callable[..., Awaitable[T]]]",
        statement: ClauseElement,
        each: Sequence[Values],
    ) -> T:
        text, names, constants = _statements.compile(statement, each[0])
        return self._run(lambda db: how(db)(text, [_ordered(names, constants, values) for values in each]))

    def _run(self, call: "Callable[[asyncpg.Connection], Awaitable[T]]") -> T:
        try:
            answer: T = self._connection.run_async(call)
        except AttributeError as error:  # asyncpg's, if another task closes the connection between two of its steps
            if not self._connection.driver_connection.is_closed():
                raise
            raise OSError("the connection was closed during an operation") from error
        return answer


def _ordered(names: Sequence[str], constants: Values, values: Values) -> list[Any]:
    return [values[name] if name in values else constants[name] for name in names]
