"""One transaction, as the verbs see it; and how each plain driver runs statements that SQLAlchemy has written."""

import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import AdaptedConnection, BindParameter, ClauseElement, Dialect, Insert, TableValuedAlias
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from tokenauth.models import Instant

if TYPE_CHECKING:
    import asyncpg

Values = Mapping[str, Any]
"""What the named parameters of a statement are."""

Rows = Sequence[Any]


class Disturbed(Exception):
    """Others were at work on what was asked for: it must be asked again, while they are held off."""


class Transaction(Protocol):
    """Runs statements, none of which is committed before the others. A statement is made once, and is a constant."""

    alone: bool
    """Whether nobody else writes to this database at the same time."""

    undisturbed: bool
    """Whether what is held is held alone, also where `shared` would do."""

    def rows(self, statement: ClauseElement, values: Values) -> Rows:
        """Run a query, or a change that returns something; the answer is the rows."""

    def rows_each(self, statement: ClauseElement, each: Sequence[Values]) -> Rows:
        """Run a change that returns something once for each; the answer is the rows of all."""

    def change(self, statement: ClauseElement, values: Values) -> int:
        """Run a change; the answer is how many rows it touched."""

    def change_each(self, statement: ClauseElement, each: Sequence[Values]) -> None:
        """Run a change once for each."""

    def hold(self, *names: str, shared: bool = False) -> None:
        """Wait until nobody else holds any of these names, and hold them until the end.

        `shared`: others may hold them at the same time who say so, too.
        """

    def moment(self, read: Instant) -> Instant:
        """Return the time at which a change happens; `read` is the latest that whoever asked for it has read."""

    def announce(self) -> None:
        """Wake all caches, once this is committed: there are new revocations."""


class _Written:
    """Statements as text for a plain driver; each is written when it is first run."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._written: dict[ClauseElement, tuple[str, Sequence[str], Values]] = {}

    def __call__(self, statement: ClauseElement, values: Values) -> tuple[str, Sequence[str], Values]:
        """Return a statement's text, its parameters in order, and the values that it has by itself."""
        written = self._written.get(statement)
        if written is None:
            columns = list(values) if isinstance(statement, Insert) and statement.select is None else None
            compiled = statement.compile(dialect=self._dialect, column_keys=columns)
            assert isinstance(compiled, SQLCompiler)
            own = {name: bound.value for name, bound in compiled.binds.items() if not bound.required}
            written = self._written[statement] = (str(compiled), compiled.positiontup or (), own)
        return written


class SqliteTransaction:
    """Transaction of the plain SQLite driver: a statement costs a third of what it costs through an engine.

    Whoever writes has locked the whole database, and the time is what the callers have read.
    """

    alone = undisturbed = True

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Run on a connection; whoever made it begins and commits."""
        self._connection = connection
        self._write = _Written(sqlite.dialect(paramstyle="named"))

    def rows(self, statement: ClauseElement, values: Values) -> Rows:
        """Run a query."""
        text, _, own = self._write(statement, values)
        return self._connection.execute(text, {**own, **values}).fetchall()

    def rows_each(self, statement: ClauseElement, each: Sequence[Values]) -> Rows:
        """Run a change that returns something once for each."""
        return [row for values in each for row in self.rows(statement, values)]

    def change(self, statement: ClauseElement, values: Values) -> int:
        """Run a change."""
        text, _, own = self._write(statement, values)
        return self._connection.execute(text, {**own, **values}).rowcount

    def change_each(self, statement: ClauseElement, each: Sequence[Values]) -> None:
        """Run a change, which has no values of its own, once for each."""
        if each:
            self._connection.executemany(self._write(statement, each[0])[0], each)

    def hold(self, *names: str, shared: bool = False) -> None:
        """Do nothing: everything is held."""

    def moment(self, read: Instant) -> Instant:
        """Return the time that was read."""
        return read

    def announce(self) -> None:
        """Do nothing: caches ask the file."""


class _Elements(GenericFunction[str]):
    """The strings of a JSON array, one a row."""

    name = "json_each"


@compiles(_Elements, "postgresql")
def _write_elements(function: _Elements, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(function.clauses, **options)} AS json))"


def elements(strings: BindParameter[str], name: str) -> TableValuedAlias:
    """Make a table with a column `value` of the strings of a JSON array: many values in one parameter."""
    return _Elements(strings).table_valued("value", name=name)


CHANNEL = "tokenauth_revocations"
"""Where PostgreSQL tells of revocations."""

CLOCK_SAYS = "extract(epoch FROM clock_timestamp())::float8"
"""What time it is by PostgreSQL's clock, which can be set back."""

WRITTEN_DOWN = "(SELECT at FROM marks WHERE name = 'clock')"
"""The latest time that any process has written down, or NULL."""

_NOW = f"greatest({CLOCK_SAYS}, {WRITTEN_DOWN})"
_HOLD = f"SELECT pg_advisory_xact_lock%s(key), {_NOW} FROM unnest($1::int8[]) key"  # noqa: S608
_HOLD_ALONE, _HOLD_SHARED = _HOLD % "", _HOLD % "_shared"
_TIME = f"SELECT {_NOW}"
_NOTIFY = f"SELECT pg_notify('{CHANNEL}', '')"

_postgres = _Written(postgresql.asyncpg.dialect())  # type: ignore[no-untyped-call]


def advisory_key(name: str) -> int:
    """Return the number of the advisory lock with this name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), signed=True)


class PostgresTransaction:
    """Transaction of asyncpg, inside of SQLAlchemy's `run_sync`. Names are advisory locks; the time is the database's.

    Others write at the same time. Each verb has a transaction to itself, takes its locks in one order, and locks
    rows in one order, or only those that nobody has locked: so no two can wait for each other.
    """

    alone = False

    def __init__(
        self, connection: AdaptedConnection, timed: bool = True, notifies: bool = False, undisturbed: bool = False
    ) -> None:
        """Run on a connection; whoever made it begins and commits.

        `timed`: the callers say what time it is. `notifies`: the database can. `undisturbed`: hold nothing shared.
        """
        self._connection = connection
        self.undisturbed = undisturbed
        self._notifies = notifies
        self._timed = timed
        self._held_at: Instant | None = None

    def rows(self, statement: ClauseElement, values: Values) -> Rows:
        """Run a query."""
        text, names, own = _postgres(statement, values)
        rows: Rows = self._run(lambda db: db.fetch(text, *_ordered(names, own, values)))
        return rows

    def rows_each(self, statement: ClauseElement, each: Sequence[Values]) -> Rows:
        """Run a change that returns something once for each, all in one go."""
        return self._each(lambda db: db.fetchmany, statement, each) if each else []

    def change(self, statement: ClauseElement, values: Values) -> int:
        """Run a change."""
        text, names, own = _postgres(statement, values)
        status: str = self._run(lambda db: db.execute(text, *_ordered(names, own, values)))
        return int(status.rpartition(" ")[2])

    def change_each(self, statement: ClauseElement, each: Sequence[Values]) -> None:
        """Run a change once for each, all in one go."""
        if each:
            self._each(lambda db: db.executemany, statement, each)

    def hold(self, *names: str, shared: bool = False) -> None:
        """Wait for advisory locks, always in the same order."""
        keys = sorted(map(advisory_key, names))
        rows = self._run(lambda db: db.fetch(_HOLD_SHARED if shared and not self.undisturbed else _HOLD_ALONE, keys))
        self._held_at = rows[-1][1]

    def moment(self, read: Instant) -> Instant:
        """Return the database's time, at which the last lock was had."""
        if self._timed:
            return read
        if self._held_at is None:
            self._held_at = self._run(lambda db: db.fetchval(_TIME))
        return max(read, self._held_at)

    def announce(self) -> None:
        """Have the database notify whoever listens, when this is committed."""
        if self._notifies:
            self._run(lambda db: db.execute(_NOTIFY))

    def _each(self, how: Callable[[Any], Callable[..., Any]], statement: ClauseElement, each: Sequence[Values]) -> Any:
        text, names, own = _postgres(statement, each[0])
        return self._run(lambda db: how(db)(text, [_ordered(names, own, values) for values in each]))

    def _run(self, what: "Callable[[asyncpg.Connection], Awaitable[Any]]") -> Any:
        return self._connection.run_async(what)


def _ordered(names: Sequence[str], own: Values, values: Values) -> list[Any]:
    return [values[name] if name in values else own[name] for name in names]
