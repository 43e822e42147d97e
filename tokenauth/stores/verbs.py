"""The changes that a database can be asked for, each written once for many callers at a time.

A verb takes what its callers wish and returns an answer to each. All verbs of one commit share a transaction.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Float,
    Select,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
)

from tokenauth.models import Instant, Token
from tokenauth.stores.tables import failures, revocations, tokens

CLOCK = "clock"
"""The mark that remembers the latest `now` that was written."""

_SLICE = 10_000
"""Values in one statement: SQLite takes 32,766."""


# Statements are made once: making one costs more than running it.
_INSERT = insert(tokens)
_DELETE = delete(tokens).where(tokens.c.digest.in_(bindparam("digests", expanding=True))).returning(tokens.c.digest)
_LOG = insert(revocations)
_REMEMBER = text("""
    INSERT INTO marks (name, at) VALUES (:name, :now)
    ON CONFLICT (name) DO UPDATE SET at = excluded.at WHERE marks.at < excluded.at
""")
_CLAIM = text("""
    INSERT INTO marks (name, at) VALUES (:duty, :until)
    ON CONFLICT (name) DO UPDATE SET at = excluded.at WHERE marks.at <= :now
""")
_FAIL = text("""
    INSERT INTO failures (key, count, last_at) VALUES (:key, 1, :now)
    ON CONFLICT (key) DO UPDATE SET
        count = CASE WHEN failures.last_at <= :known THEN 1 ELSE failures.count + 1 END, last_at = excluded.last_at
""")


def _too_many() -> Select[bytes]:
    """Find the tokens that users have beyond `per_user` live ones.

    For each user it steps along the index to the first token too many, newest first, and no further.
    """
    names = func.json_each(bindparam("names")).table_valued("value", name="names")
    live = tokens.alias("live")
    of_user = select(live.c.number).where(live.c.username == names.c.value, live.c.expires_at > bindparam("now"))
    first = of_user.order_by(live.c.number.desc()).limit(1).offset(bindparam("per_user")).scalar_subquery()
    edges = select(names.c.value.label("username"), first.label("number")).subquery("edges")
    return (
        select(tokens.c.digest)
        .join_from(edges, tokens, (tokens.c.username == edges.c.username) & (tokens.c.number <= edges.c.number))
        .where(tokens.c.expires_at > bindparam("now"))
    )


_TOO_MANY = _too_many()


class Add(NamedTuple):
    """Keep a token, and of its user's live ones no more than `per_user`."""

    token: Token
    per_user: int
    now: Instant


class Remove(NamedTuple):
    """End one token."""

    digest: bytes
    now: Instant


class RemoveAll(NamedTuple):
    """End all tokens of a user, or of everybody, but one."""

    username: str | None
    keep: bytes | None
    now: Instant


class Purge(NamedTuple):
    """Delete at most `limit` rows that are older than an instant."""

    before: Instant
    limit: int


class Fail(NamedTuple):
    """Count one more failure under each key."""

    keys: Sequence[bytes]
    now: Instant
    forget: float


class Claim(NamedTuple):
    """Take on a duty until an instant."""

    duty: str
    now: Instant
    until: Instant


def add_tokens(db: Connection, wishes: Sequence[Add]) -> Sequence[None]:
    """Insert tokens; then end the oldest of each user that has too many."""
    db.execute(_INSERT, [wish.token._asdict() for wish in wishes])
    limited: dict[int, set[str]] = {}
    for wish in wishes:
        if wish.per_user:
            limited.setdefault(wish.per_user, set()).add(wish.token.username)
    now = max(wish.now for wish in wishes)
    for per_user, names in limited.items():
        wanted = {"names": json.dumps(sorted(names)), "per_user": per_user, "now": now}
        _end(db, db.execute(_TOO_MANY, wanted).scalars().all(), now)
    return [None] * len(wishes)


def remove_tokens(db: Connection, wishes: Sequence[Remove]) -> Sequence[bool]:
    """End single tokens."""
    gone = _end(db, [wish.digest for wish in wishes], max(wish.now for wish in wishes))
    answers = []
    for wish in wishes:
        answers.append(wish.digest in gone)
        gone.discard(wish.digest)
    return answers


def remove_all_tokens(db: Connection, wishes: Sequence[RemoveAll]) -> Sequence[int]:
    """End all live tokens of a user, or of everybody, but one."""
    answers = []
    for wish in wishes:
        chosen = select(tokens.c.digest).where(tokens.c.expires_at > wish.now)
        if wish.username is not None:
            chosen = chosen.where(tokens.c.username == wish.username)
        if wish.keep is not None:
            chosen = chosen.where(tokens.c.digest != wish.keep)
        log = select(chosen.subquery().c.digest, bindparam("now", wish.now, Float()))
        db.execute(insert(revocations).from_select(["digest", "at"], log))
        answers.append(db.execute(delete(tokens).where(tokens.c.digest.in_(chosen))).rowcount)
    return answers


def purge_tokens(db: Connection, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete tokens that have expired; no cache need hear of it."""
    return [
        _purge(db, tokens.c.number, tokens.c.expires_at, tokens.c.expires_at <= wish.before, wish.limit)
        for wish in wishes
    ]


def purge_failures(db: Connection, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete keys whose last failure is long past."""
    return [
        _purge(db, failures.c.key, failures.c.last_at, failures.c.last_at < wish.before, wish.limit) for wish in wishes
    ]


def purge_revocations(db: Connection, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete old entries of the revocation log, but never the last: its number shows what was missed."""
    answers = []
    for wish in wishes:
        last = select(func.max(revocations.c.seq)).scalar_subquery()
        oldest = select(revocations).order_by(revocations.c.seq).limit(wish.limit).subquery()
        old = select(oldest.c.seq).where(oldest.c.at < wish.before, oldest.c.seq < last)
        answers.append(db.execute(delete(revocations).where(revocations.c.seq.in_(old))).rowcount)
    return answers


def count_failures(db: Connection, wishes: Sequence[Fail]) -> Sequence[None]:
    """Count one more failure under each key; after a long quiet time counting starts anew."""
    for wish in wishes:
        known = wish.now - wish.forget
        db.execute(_FAIL, [{"key": key, "now": wish.now, "known": known} for key in wish.keys])
    return [None] * len(wishes)


def clear_failures(db: Connection, wishes: Sequence[bytes]) -> Sequence[None]:
    """Count nothing under these keys any more."""
    db.execute(delete(failures).where(failures.c.key.in_(wishes)))
    return [None] * len(wishes)


def claim(db: Connection, wishes: Sequence[Claim]) -> Sequence[bool]:
    """Take on a duty, unless somebody has it."""
    return [db.execute(_CLAIM, wish._asdict()).rowcount == 1 for wish in wishes]


def remember_now(_: Connection, wishes: Sequence[None]) -> Sequence[None]:
    """Change nothing: every commit writes down the time."""
    return [None] * len(wishes)


def remember(db: Connection, now: Instant) -> None:
    """Write down that it has been `now`, so that no restart believes an earlier clock."""
    db.execute(_REMEMBER, {"name": CLOCK, "now": now})


def _end(db: Connection, digests: Sequence[bytes], now: Instant) -> set[bytes]:
    """Delete tokens and log it for every cache to read; say which there were."""
    gone: set[bytes] = set()
    for start in range(0, len(digests), _SLICE):
        gone.update(db.execute(_DELETE, {"digests": digests[start : start + _SLICE]}).scalars())
    if gone:
        db.execute(_LOG, [{"digest": digest, "at": now} for digest in gone])
    return gone


def _purge(db: Connection, key: Column[Any], age: Column[Any], old: ColumnElement[bool], limit: int) -> int:
    """Delete the rows of the key's table that are old, the oldest first."""
    chosen = select(key).where(old).order_by(age).limit(limit)
    return db.execute(delete(key.table).where(key.in_(chosen))).rowcount
