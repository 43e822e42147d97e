"""One transaction, as the verbs see it; and how SQLite's plain driver runs statements that SQLAlchemy has written."""

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import ClauseElement, Insert
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql.compiler import SQLCompiler

Values = Mapping[str, Any]
"""What the named parameters of a statement are."""


class Transaction(Protocol):
    """Runs statements, none of which is committed before the others. A statement is made once, and is a constant."""

    def rows(self, statement: ClauseElement, values: Values) -> Sequence[Any]:
        """Run a query, or a change that returns something; the answer is the rows."""

    def change(self, statement: ClauseElement, values: Values) -> int:
        """Run a change; the answer is how many rows it touched."""

    def change_each(self, statement: ClauseElement, each: Sequence[Values]) -> None:
        """Run a change once for each."""


class PlainTransaction:
    """Transaction of the plain SQLite driver: a statement costs a third of what it costs through an engine."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Run on a connection; whoever made it begins and commits."""
        self._connection = connection
        self._written: dict[ClauseElement, tuple[str, Values]] = {}

    def rows(self, statement: ClauseElement, values: Values) -> Sequence[Any]:
        """Run a query."""
        text, own = self._write(statement, values)
        return self._connection.execute(text, {**own, **values}).fetchall()

    def change(self, statement: ClauseElement, values: Values) -> int:
        """Run a change."""
        text, own = self._write(statement, values)
        return self._connection.execute(text, {**own, **values}).rowcount

    def change_each(self, statement: ClauseElement, each: Sequence[Values]) -> None:
        """Run a change, which has no values of its own, once for each."""
        if each:
            self._connection.executemany(self._write(statement, each[0])[0], each)

    def _write(self, statement: ClauseElement, values: Values) -> tuple[str, Values]:
        """Return the text of a statement and the values that it has by itself; it is written when it is first run."""
        written = self._written.get(statement)
        if written is None:
            columns = list(values) if isinstance(statement, Insert) and statement.select is None else None
            compiled = statement.compile(dialect=_DIALECT, column_keys=columns)
            assert isinstance(compiled, SQLCompiler)
            own = {name: bound.value for name, bound in compiled.binds.items() if not bound.required}
            written = self._written[statement] = (str(compiled), own)
        return written


_DIALECT = sqlite.dialect(paramstyle="named")
