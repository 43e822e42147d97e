"""The tables, for SQLAlchemy; `migrations` creates them step by step.

PostgreSQL has other primary keys, which can be distributed: the digest of a token; the pool and the number of a pool
token, and of a request.
There a token's number is the microsecond in which it was added, or one more than the last of its user: unlike a
sequence, that needs no lock.
"""

import json
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
    text,
)

from tokenauth.models import LeaseRequest, PoolToken, Reservation, Token

metadata = MetaData()

# On PostgreSQL, the same indexes have the same conditions: a test compares them. To declare them here too would load
# SQLAlchemy's dialect of PostgreSQL, and make each start 25 ms slower.
_IS_NAMED = text("name IS NOT NULL")

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
    # Empty in the row of a login whose lifetime is fixed and of which no use was noted: see `token_row`.
    Column("name", String),
    Column("scopes", String),
    Column("max_expires_at", BigInteger),
    Column("used_at", Float),
    # On SQLite a small numbered row and a dense index of digests cost a random insert a third less than
    # rows ordered by digest. Numbers are the order of issue.
    Index("tokens_by_digest", "digest", unique=True),
    # with expires_at and name, so that counting a user's live logins reads the index alone
    Index("tokens_by_user", "username", "number", "expires_at", "name"),
    Index("tokens_by_expiry", "expires_at"),
    # of named tokens only, so that it costs a login nothing
    Index("tokens_by_name", "username", "name", sqlite_where=_IS_NAMED),
)

_not_checked = (tokens.c.address, tokens.c.user_agent)
checked_columns = [column for column in tokens.c if column is not tokens.c.number and column not in set(_not_checked)]
"""The columns that decide whether a token is valid. `as_checked_token` reads them, in its order."""

token_columns = [*checked_columns, *_not_checked]
"""The columns that `as_token` reads, in its order."""

OPTIONAL_COLUMNS = [column.name for column in token_columns if column.nullable]
PLAIN_COLUMNS = [column.name for column in token_columns if not column.nullable]


def as_checked_token(row: Sequence[Any]) -> Token:
    """Make a token for a cache, without `address` and `user_agent`, which would be a tenth of its memory.

    Thousands of tokens share their texts: interning keeps one copy of each.
    """
    digest, username, credential, issued_at, expires_at, name, scopes, latest, used_at = row
    return Token._make(  # in half the time of a call of Token
        (
            digest,
            intern(username),
            intern(credential),
            issued_at,
            expires_at,
            latest,
            issued_at if used_at is None else used_at,
            "",
            "",
            name,
            None if scopes is None else tuple(scopes.split()),
        )
    )


def as_token(row: Sequence[Any]) -> Token:
    """Make a token from a row, with all that is known of it."""
    *checked, address, user_agent = row
    return as_checked_token(checked)._replace(address=address, user_agent=user_agent)


def token_row(token: Token) -> dict[str, Any]:
    """Make the row of a token, by column. An ordinary login has only PLAIN_COLUMNS, so that it costs least."""
    row = {
        "digest": token.digest,
        "username": token.username,
        "credential": token.credential,
        "issued_at": token.issued_at,
        "expires_at": token.expires_at,
        "address": token.address,
        "user_agent": token.user_agent,
    }
    unused = token.used_at == token.issued_at
    if unused and token.max_expires_at is None and token.name is None and token.scopes is None:
        return row
    return row | {
        "name": token.name,
        "scopes": None if token.scopes is None else " ".join(token.scopes),
        "max_expires_at": token.max_expires_at,
        "used_at": None if unused else token.used_at,
    }


revocations = Table(
    "revocations",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("digest", LargeBinary(32), nullable=False),
    Column("at", Float, nullable=False),
    sqlite_autoincrement=True,  # a number is never reused, so that a reader notices a gap
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
    Column("idle", Boolean, Computed("holder IS NULL", persisted=True), nullable=False),  # neither leased nor lapsed
    Column("username", String),
    Column("leased_at", Float),
    Column("lease_ttl", Float),
    Column("member", String),
    # A JSON array, the fields of a Reservation: one column, since PostgreSQL plans for a table that was never analyzed
    # by the width of its rows, and takes the wrong index if they are wide.
    Column("reservation", String),
    Index("pool_tokens_by_value", "pool", "value", unique=True),
    # Every query of a pool reads a range of this index: what is free longest, how many are leased, what has expired.
    Index("pool_tokens_by_turn", "pool", "retired", "idle", "free_at", "number"),
)

pool_token_columns = [column for column in pool_tokens.c if column.name not in {"number", "idle"}]
"""The columns that are fields of a `PoolToken`, in its order."""


forced_ends = Table(
    "forced_ends",
    metadata,
    Column("pool", String, primary_key=True),
    Column("value", String, primary_key=True),
    Column("at", Float, nullable=False),
    Column("end", String, nullable=False),  # a JSON array, the fields of a ForcedEnd
    Index("forced_ends_by_age", "pool", "at"),
    sqlite_with_rowid=False,
)


def as_pool_token(row: Sequence[Any]) -> PoolToken:
    """Make a pool token from a row; SQLite's plain driver returns a boolean as a number."""
    pool, value, free_at, holder, fence, retired, username, leased_at, lease_ttl, member, reservation = row
    lease = holder, fence, bool(retired), username, leased_at, lease_ttl
    return PoolToken(pool, value, free_at, *lease, member, as_reservation(reservation))


def as_reservation(text: str | None) -> Reservation | None:
    """Make a reservation from its column."""
    return None if text is None else Reservation(*json.loads(text))


_IS_WAITING, _IS_GRANTED = text("granted_at IS NULL"), text("granted_at IS NOT NULL")

pool_requests = Table(
    "pool_requests",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("pool", String, nullable=False),
    Column("username", String, nullable=False),
    Column("id", String, nullable=False),
    Column("holder", String, nullable=False),
    Column("count", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("ttl", Float),
    Column("labels", String, nullable=False),  # a JSON array, as are `leases`
    Column("since", Float, nullable=False),
    Column("turn", Float, nullable=False),
    Column("kept_until", Float, nullable=False),
    Column("granted_at", Float),
    Column("leases", String),
    Column("asks", Integer, nullable=False),
    Column("answers", Integer, nullable=False),
    Index("pool_requests_by_id", "pool", "id", "username", unique=True),
    # the waiting line in its order, with what else is counted, so that this reads the index alone
    Index(
        "pool_requests_by_turn",
        *("pool", "turn", "number", "kept_until", "since"),
        sqlite_where=_IS_WAITING,
    ),
    # whether anyone waits, and what has lapsed
    Index("pool_requests_by_end", "pool", "kept_until", sqlite_where=_IS_WAITING),
    # what was granted, by when it is forgotten
    Index("pool_requests_granted", "pool", "kept_until", sqlite_where=_IS_GRANTED),
)

pool_request_columns = list(pool_requests.c)
"""The columns that `as_lease_request` reads, in its order."""


def as_lease_request(row: Sequence[Any]) -> LeaseRequest:
    """Make a request for leases from a row."""
    number, pool, username, id, holder, count, priority, ttl, labels, since, turn, kept_until, *granted = row
    granted_at, leases, asks, answers = granted
    return LeaseRequest(
        number,
        pool,
        username,
        id,
        holder,
        count,
        priority,
        ttl,
        tuple(json.loads(labels)),
        since,
        turn,
        kept_until,
        granted_at,
        None if leases is None else tuple((number, fence) for number, fence in json.loads(leases)),
        asks,
        answers,
    )


failures = Table(
    "failures",
    metadata,
    Column("key", LargeBinary(16), primary_key=True),
    Column("count", Integer, nullable=False),
    Column("last_at", Float, nullable=False),
    Index("failures_by_age", "last_at"),
    sqlite_with_rowid=False,
)

# Instants by name: the clock row (the latest time that any commit has written), and the ends of duties.
marks = Table(
    "marks",
    metadata,
    Column("name", String, primary_key=True),
    Column("at", Float, nullable=False),
    sqlite_with_rowid=False,
)
