"""Rows of every kind for all tables, and reading them back from any database."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    String,
    Table,
    create_engine,
    insert,
    select,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.stores.tables import metadata

T = TypeVar("T")

Rows = Mapping[str, Sequence[dict[str, Any]]]

_TEXTS = ["", "ann", "Ännchen", "名前", "🔑", "a'b\"c", "\\N", "a\\b\tc\nd\re", "x" * 5000, "[1, null]", "\x01", "~"]
_VALUES: Mapping[type, Sequence[Any]] = {
    Float: [0.0, 1.0, -1.0, 0.1, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), 1764366000.123456],
    BigInteger: [0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63), 1764366000],
    Integer: [0, 1, -1, 2**31 - 1, -(2**31)],
    Boolean: [False, True],
}


def generate(seed: int, size: int) -> Rows:
    """Generate `size` rows for each table, with the extremes of every column. Keys are unique."""
    random = Random(seed)
    return {table.name: _rows(random, table, size) for table in metadata.sorted_tables}


def _rows(random: Random, table: Table, size: int) -> Sequence[dict[str, Any]]:
    unique = {*table.primary_key.columns, *(c for index in table.indexes if index.unique for c in index.columns)}
    number, rows = 0, []
    for turn in range(size):
        number += random.choice([1, 1, 1, 1000])
        rows.append({c.name: _value(random, c, number, turn, c in unique) for c in table.c if c.computed is None})
    if rows and len(table.primary_key.columns) == 1 and isinstance(table.primary_key.columns[0].type, BigInteger):
        rows[0][table.primary_key.columns[0].name] = -5
        rows[-1][table.primary_key.columns[0].name] = 2**62
    random.shuffle(rows)
    return rows


def _value(random: Random, column: Column[Any], number: int, turn: int, unique: bool) -> Any:
    kind = column.type
    if column.nullable and random.randrange(10) < 3:
        return None
    if isinstance(kind, LargeBinary):
        length = kind.length or 1
        return [b"\0" * length, b"\xff" * length][turn] if turn < 2 else random.randbytes(length)
    if isinstance(kind, String):
        text = random.choice(_TEXTS)
        return f"{text[:100]}{number}" if unique else text
    if unique:
        return number
    [values] = [values for each, values in _VALUES.items() if type(kind) is each]
    return random.choice(values)


async def create(url: str) -> None:
    """Create a database with all tables, and without rows."""
    store = open_store(DatabaseSettings(url=url), 1)
    await store.start()
    await store.stop(0)
    await on_connection(url, lambda db: [db.execute(table.delete()) for table in metadata.sorted_tables])


async def write(url: str, rows: Rows) -> None:
    """Add rows to a database that has all tables."""
    tables = [table for table in metadata.sorted_tables if rows.get(table.name)]
    await on_connection(url, lambda db: [db.execute(insert(table), [*rows[table.name]]) for table in tables])


async def read(url: str) -> Mapping[str, Sequence[tuple[Any, ...]]]:
    """Return all rows of all tables, with the columns that the database computes, in one order for all databases."""

    def rows(db: Connection) -> Mapping[str, Sequence[tuple[Any, ...]]]:
        return {t.name: sorted(map(tuple, db.execute(select(*t.c))), key=repr) for t in metadata.sorted_tables}

    return await on_connection(url, rows)


async def on_connection(url: str, use: Callable[[Connection], T]) -> T:
    """Use a connection to a database, in one transaction."""
    if url.startswith("sqlite"):
        engine = create_engine(url.replace("+aiosqlite", ""), poolclass=NullPool)
        with engine.begin() as connection:
            return use(connection)
    remote = create_async_engine(url, poolclass=NullPool)
    async with remote.begin() as db:
        return await db.run_sync(use)
