"""The changes that a database can be asked for, each written once for many callers at a time.

A verb takes what its callers wish and returns an answer to each. All verbs of one commit share a transaction.
"""

import json
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Float,
    Select,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from tokenauth.models import Instant, Token
from tokenauth.stores.tables import failures, marks, revocations, token_columns, tokens

_FIELDS = [column.name for column in token_columns]
_values = attrgetter(*_FIELDS)

_INSERT = insert(tokens)


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

CLOCK = "clock"
"""The mark that remembers the latest `now` that was written."""


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
    db.execute(_INSERT, [dict(zip(_FIELDS, _values(wish.token), strict=True)) for wish in wishes])
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
    return [_purge(db, tokens, tokens.c.digest, tokens.c.expires_at, wish) for wish in wishes]


def purge_failures(db: Connection, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete keys whose last failure is long past."""
    return [_purge(db, failures, failures.c.key, failures.c.last_at, wish) for wish in wishes]


def purge_revocations(db: Connection, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete old entries of the revocation log, but never the last: its number shows what was missed."""
    answers = []
    for wish in wishes:
        last = select(func.max(revocations.c.seq)).scalar_subquery()
        oldest = select(revocations).order_by(revocations.c.seq).limit(wish.limit).subquery()
        old = select(oldest.c.seq).where(oldest.c.at <= wish.before, oldest.c.seq < last)
        answers.append(db.execute(delete(revocations).where(revocations.c.seq.in_(old))).rowcount)
    return answers


def count_failures(db: Connection, wishes: Sequence[Fail]) -> Sequence[None]:
    """Count one more failure under each key; after a long quiet time counting starts anew."""
    for wish in wishes:
        first = _insert(db, failures).values([{"key": key, "count": 1, "last_at": wish.now} for key in wish.keys])
        forgotten = failures.c.last_at <= wish.now - wish.forget
        more = {"count": case((forgotten, 1), else_=failures.c.count + 1), "last_at": first.excluded.last_at}
        db.execute(first.on_conflict_do_update(index_elements=[failures.c.key], set_=more))
    return [None] * len(wishes)


def clear_failures(db: Connection, wishes: Sequence[bytes]) -> Sequence[None]:
    """Count nothing under these keys any more."""
    db.execute(delete(failures).where(failures.c.key.in_(wishes)))
    return [None] * len(wishes)


def claim(db: Connection, wishes: Sequence[Claim]) -> Sequence[bool]:
    """Take on a duty, unless somebody has it."""
    answers = []
    for wish in wishes:
        mine = _insert(db, marks).values(name=wish.duty, at=wish.until)
        free = mine.on_conflict_do_update(
            index_elements=[marks.c.name], set_={"at": wish.until}, where=marks.c.at <= wish.now
        )
        answers.append(db.execute(free).rowcount == 1)
    return answers


def remember_now(_: Connection, wishes: Sequence[None]) -> Sequence[None]:
    """Change nothing: every commit writes down the time."""
    return [None] * len(wishes)


def remember(db: Connection, now: Instant) -> None:
    """Write down that it has been `now`, so that no restart believes an earlier clock."""
    mark = _insert(db, marks).values(name=CLOCK, at=now)
    db.execute(mark.on_conflict_do_update(index_elements=[marks.c.name], set_={"at": now}, where=marks.c.at < now))


def _end(db: Connection, digests: Sequence[bytes], now: Instant) -> set[bytes]:
    """Delete tokens and log it for every cache to read; say which there were."""
    if not digests:
        return set()
    gone = set(db.execute(delete(tokens).where(tokens.c.digest.in_(digests)).returning(tokens.c.digest)).scalars())
    if gone:
        db.execute(insert(revocations), [{"digest": digest, "at": now} for digest in gone])
    return gone


def _purge(db: Connection, table: Table, key: Column[bytes], age: ColumnElement[float], wish: Purge) -> int:
    old = select(key).where(age <= wish.before).order_by(age).limit(wish.limit)
    return db.execute(delete(table).where(key.in_(old))).rowcount


def _insert(db: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Insert with ON CONFLICT, which the two engines write alike and SQLAlchemy keeps apart."""
    return postgresql.insert(table) if db.dialect.name == "postgresql" else sqlite.insert(table)
