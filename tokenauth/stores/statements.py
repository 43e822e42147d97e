"""SQLAlchemy statements as text for a plain driver: that costs a third of running them through an engine."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BindParameter, ClauseElement, Dialect, Insert, TableValuedAlias
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from tokenauth.stores.engine import Values


class Compiled:
    """The text of statements in one dialect; each is compiled when it is first run."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._compiled: dict[ClauseElement, tuple[str, Sequence[str], Values]] = {}

    def __call__(self, statement: ClauseElement, values: Values) -> tuple[str, Sequence[str], Values]:
        """Return the text of a statement, the names of its parameters in order, and the values that it contains."""
        found = self._compiled.get(statement)
        if found is None:
            columns = list(values) if isinstance(statement, Insert) and statement.select is None else None
            compiled = statement.compile(dialect=self._dialect, column_keys=columns)
            assert isinstance(compiled, SQLCompiler)
            own = {name: bound.value for name, bound in compiled.binds.items() if not bound.required}
            found = self._compiled[statement] = (str(compiled), compiled.positiontup or (), own)
        return found


class _Elements(GenericFunction[str]):
    """The strings of a JSON array, one per row."""

    name = "json_each"


@compiles(_Elements, "postgresql")
def _compile_elements(function: _Elements, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(function.clauses, **options)} AS json))"


def elements(strings: BindParameter[str], name: str) -> TableValuedAlias:
    """Make a table with a column `value` from the strings of a JSON array: many values in one parameter."""
    return _Elements(strings).table_valued("value", name=name)
