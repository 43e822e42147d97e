"""The schema, as SQLAlchemy knows it; `migrations` builds it step by step.

PostgreSQL has other primary keys: those that spread, the digest of a token, the pool and the number of one that is
lent. And there the number of a token is the microsecond in which it was added, for which nobody has to queue, or one
more than the last of its user has.
"""

from collections.abc import Sequence
from sys import intern
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Computed,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

from tokenauth.models import Token

metadata = MetaData()

tokens = Table(
    "tokens",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("username", String, nullable=False),
    Column("credential", String, nullable=False),
    Column("issued_at", Float, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("address", String, nullable=False),
    Column("user_agent", String, nullable=False),
    # On SQLite a small numbered row and a dense index of digests cost a random insert a third less than
    # rows ordered by digest. Numbers are the order of issue.
    Index("tokens_by_digest", "digest", unique=True),
    # expires_at stands in it so that counting a user's live tokens reads the index alone
    Index("tokens_by_user", "username", "number", "expires_at"),
    Index("tokens_by_expiry", "expires_at"),
)

token_columns = [column for column in tokens.c if column is not tokens.c.number]
"""The columns that are fields of a `Token`, in its order."""


def as_token(row: Sequence[Any]) -> Token:
    """Make a token of a row. Thousands of tokens share their texts: a cache keeps one copy of each."""
    digest, username, credential, issued_at, expires_at, address, user_agent = row
    shared = (intern(username), intern(credential), issued_at, expires_at, intern(address), intern(user_agent))
    return Token(digest, *shared)


revocations = Table(
    "revocations",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("at", Float, nullable=False),
    sqlite_autoincrement=True,  # a number is never used again, so that a gap shows
)

pool_tokens = Table(
    "pool_tokens",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("pool", String, nullable=False),
    Column("value", String, nullable=False),
    Column("free_at", Float, nullable=False),
    Column("holder", String),
    Column("fence", BigInteger, nullable=False),
    Column("retired", Boolean, nullable=False),
    Column("idle", Boolean, Computed("holder IS NULL", persisted=True), nullable=False),  # neither lent nor lapsed
    Column("username", String),
    Index("pool_tokens_by_value", "pool", "value", unique=True),
    # Every question about a pool is a range of this index: which is free longest, how many are lent, what has expired.
    Index("pool_tokens_by_turn", "pool", "retired", "idle", "free_at", "number"),
)

pool_token_columns = [column for column in pool_tokens.c if column.name not in {"number", "idle"}]
"""The columns that are fields of a `PoolToken`, in its order."""

failures = Table(
    "failures",
    metadata,
    Column("key", LargeBinary(16), primary_key=True),
    Column("count", Integer, nullable=False),
    Column("last_at", Float, nullable=False),
    Index("failures_by_age", "last_at"),
    sqlite_with_rowid=False,
)

marks = Table(
    "marks",
    metadata,
    Column("name", String, primary_key=True),
    Column("at", Float, nullable=False),
    sqlite_with_rowid=False,
)
