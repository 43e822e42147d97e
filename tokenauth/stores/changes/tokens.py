"""The changes that a database can be asked for, each written once for many callers at a time.

A verb takes what its callers wish and returns an answer to each. All verbs of one commit share a transaction.
"""

import json
from collections import ChainMap
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Delete,
    Float,
    Insert,
    Integer,
    Select,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    update,
)

from tokenauth.models import Failures, Instant, Token
from tokenauth.stores.engine import Transaction, elements
from tokenauth.stores.store import Note, TakeBack
from tokenauth.stores.tables import failures, revocations, tokens

CLOCK = "clock"
"""The mark that remembers the latest `now` that was written."""

_MANY = 1000
"""Tokens that one login ends at the most."""

REVOKING = "revocations"
"""What whoever revokes holds: so revocations are committed in the order of their numbers."""

_now = bindparam("now", type_=Float())

# Statements are made once: making one costs more than running it.
_INSERT = insert(tokens).inline()
# Where others add at the same time, numbers are times, but those of a user go up also when the clock is set back.
_INSERT_IN_TURN = text("""
    INSERT INTO tokens (number, digest, username, credential, issued_at, expires_at, address, user_agent)
    VALUES (
        greatest(
            CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint),
            (SELECT max(number) + 1 FROM tokens WHERE username = :username)
        ),
        :digest, :username, :credential, :issued_at, :expires_at, :address, :user_agent
    )
""")
_DELETE = delete(tokens).where(tokens.c.digest == bindparam("digest")).returning(tokens.c.digest)
_LOG = insert(revocations).inline()
_REMEMBER = text("""
    INSERT INTO marks (name, at) VALUES (:name, :now)
    ON CONFLICT (name) DO UPDATE SET at = excluded.at WHERE marks.at < excluded.at
""")
PROBE = """
    INSERT INTO marks (name, at) VALUES ('probe', 0) ON CONFLICT (name) DO UPDATE SET at = excluded.at
"""
"""Writes something in any case."""

_PROBE = text(PROBE)
_CLAIM = text("""
    INSERT INTO marks (name, at) VALUES (:duty, :until)
    ON CONFLICT (name) DO UPDATE SET at = excluded.at WHERE marks.at <= :now
""")
_NOTE = text("""
    INSERT INTO failures (key, count, last_at)
    VALUES (:key, CASE WHEN :plus > 0 THEN :plus ELSE 0 END, :at + :later)
    ON CONFLICT (key) DO UPDATE SET
        count = CASE
            WHEN failures.last_at <= :expired THEN excluded.count
            WHEN failures.count + :plus < 0 THEN 0
            ELSE failures.count + :plus
        END,
        last_at = CASE WHEN failures.last_at > :at THEN failures.last_at ELSE :at END + :later
""").bindparams(
    bindparam("plus", type_=Integer),
    bindparam("at", type_=Float),
    bindparam("later", type_=Float),
    bindparam("expired", type_=Float),
)
_LOCK_FAILURES = (
    select(failures.c.key, failures.c.count, failures.c.last_at)
    .where(failures.c.key == bindparam("wanted"))
    .with_for_update()
)
_SET_FAILURES = (
    update(failures)
    .where(failures.c.key == bindparam("wanted"))
    .values(count=bindparam("number"), last_at=bindparam("until"))
)


def _too_many() -> Select[bytes]:
    """Find the tokens that users have beyond `per_user` live ones.

    For each user it steps along the index to the first token too many, newest first, and no further. It finds only so
    many as can be ended in a short time; who has more of them, since `per_user` has become less, ends others later.
    """
    names = elements(bindparam("names"), "names")
    live = tokens.alias("live")
    of_user = select(live.c.number).where(live.c.username == names.c.value, live.c.expires_at > _now)
    first = of_user.order_by(live.c.number.desc()).limit(1).offset(bindparam("per_user")).scalar_subquery()
    edges = select(names.c.value.label("username"), first.label("number")).subquery("edges")
    return (
        select(tokens.c.digest)
        .join_from(edges, tokens, (tokens.c.username == edges.c.username) & (tokens.c.number <= edges.c.number))
        .where(tokens.c.expires_at > _now)
        .limit(_MANY)
    )


_TOO_MANY = _too_many()


def _live(of_user: bool, but_one: bool) -> Select[bytes]:
    """Find live tokens of a user, or of everybody, or of all of them but one."""
    chosen = select(tokens.c.digest).where(tokens.c.expires_at > _now).limit(bindparam("limit"))
    if of_user:
        chosen = chosen.where(tokens.c.username == bindparam("username"))
    if but_one:
        chosen = chosen.where(tokens.c.digest != bindparam("keep"))
    return chosen


def _log_of(chosen: Select[bytes]) -> Insert:
    named = select(chosen.subquery().c.digest, _now)
    return insert(revocations).from_select(["digest", "at"], named)


_LIVE = {(of_user, but_one): _live(of_user, but_one) for of_user in (False, True) for but_one in (False, True)}
_LOG_ALL = {which: _log_of(chosen) for which, chosen in _LIVE.items()}
_LAST = select(func.max(revocations.c.seq))
_DELETE_LOGGED = delete(tokens).where(
    tokens.c.digest.in_(select(revocations.c.digest).where(revocations.c.seq > bindparam("last")))
)


def _oldest(key: Column[Any], age: Column[Any], old: ColumnElement[bool]) -> Delete:
    """Delete the rows of the key's table that are old, the oldest first."""
    oldest = select(key).where(old).order_by(age).limit(bindparam("limit")).with_for_update(skip_locked=True)
    return delete(key.table).where(key.in_(oldest))


_PURGE_TOKENS = _oldest(tokens.c.digest, tokens.c.expires_at, tokens.c.expires_at <= bindparam("before"))
_PURGE_FAILURES = _oldest(failures.c.key, failures.c.last_at, failures.c.last_at < bindparam("before"))


def _purge_revocations() -> Delete:
    """Delete old entries of the log, but never the last: its number shows what was missed."""
    last = select(func.max(revocations.c.seq)).scalar_subquery()
    oldest = select(revocations).order_by(revocations.c.seq).limit(bindparam("limit")).subquery()
    old = select(oldest.c.seq).where(oldest.c.at < bindparam("before"), oldest.c.seq < last)
    return delete(revocations).where(revocations.c.seq.in_(old))


_PURGE_REVOCATIONS = _purge_revocations()


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
    """End the tokens of a user, or of everybody, but one; at most `limit` of them."""

    username: str | None
    keep: bytes | None
    limit: int
    now: Instant


class Purge(NamedTuple):
    """Delete at most `limit` rows that are older than an instant."""

    before: Instant
    limit: int


class Claim(NamedTuple):
    """Take on a duty until an instant."""

    duty: str
    now: Instant
    until: Instant


def add_tokens(db: Transaction, wishes: Sequence[Add]) -> Sequence[Sequence[bytes]]:
    """Insert tokens; then end the oldest of each user that has too many, and say which those are."""
    limited: dict[int, set[str]] = {}
    for wish in wishes:
        if wish.per_user:
            limited.setdefault(wish.per_user, set()).add(wish.token.username)
    if limited:
        db.hold(*(f"user {name}" for name in set().union(*limited.values())))
    db.change_each(_INSERT if db.alone else _INSERT_IN_TURN, [wish.token._asdict() for wish in wishes])
    now = max(wish.now for wish in wishes)
    ended: list[bytes] = []
    for per_user, names in limited.items():
        wanted = {"names": json.dumps(sorted(names)), "per_user": per_user, "now": now}
        too_many = [digest for (digest,) in db.rows(_TOO_MANY, wanted)]
        _end(db, too_many, now)
        ended += too_many
    return [ended] * len(wishes)


def remove_tokens(db: Transaction, wishes: Sequence[Remove]) -> Sequence[bool]:
    """End single tokens."""
    return _end(db, [wish.digest for wish in wishes], max(wish.now for wish in wishes))


def remove_all_tokens(db: Transaction, wishes: Sequence[RemoveAll]) -> Sequence[int]:
    """End live tokens of a user, or of everybody, but one."""
    db.hold(REVOKING)
    answers = []
    for wish in wishes:
        which = (wish.username is not None, wish.keep is not None)
        last = db.rows(_LAST, {})[0][0] or 0
        db.change(_LOG_ALL[which], wish._asdict())
        answers.append(db.change(_DELETE_LOGGED, {"last": last}))
    db.announce()
    return answers


def purge_tokens(db: Transaction, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete tokens that have expired; no cache need hear of it."""
    # tokens expire at whole seconds; compared with a fraction, PostgreSQL would find none of them by an index
    return [db.change(_PURGE_TOKENS, {"before": int(wish.before), "limit": wish.limit}) for wish in wishes]


def purge_failures(db: Transaction, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete keys whose instant is long past."""
    return [db.change(_PURGE_FAILURES, wish._asdict()) for wish in wishes]


def purge_revocations(db: Transaction, wishes: Sequence[Purge]) -> Sequence[int]:
    """Delete old entries of the revocation log, but never the last."""
    db.hold("log")
    return [db.change(_PURGE_REVOCATIONS, wish._asdict()) for wish in wishes]


def note_logins(db: Transaction, wishes: Sequence[Sequence[Note]]) -> Sequence[None]:
    """Change what is kept of past logins."""
    each = [note._asdict() for notes in wishes for note in notes]
    db.change_each(_NOTE, sorted(each, key=itemgetter("key")))
    return [None] * len(wishes)


def take_back(db: Transaction, wishes: Sequence[TakeBack]) -> Sequence[None]:
    """Remove failures from the counts that they were added to: exactly what is there, read under the lock."""
    wanted: set[bytes] = set()
    for wish in wishes:
        wanted.update([wish.own], [] if wish.row is None else [wish.row], *wish.shares)
    # in the order in which `note_logins` locks them
    locked = db.rows_each(_LOCK_FAILURES, [{"wanted": key} for key in sorted(wanted)])
    found = {key: Failures(count, last_at) for key, count, last_at in locked}
    changed: dict[bytes, Failures] = {}
    for wish in wishes:
        kept = ChainMap(changed, found)
        own = kept.get(wish.own)
        if own is not None:
            changed[wish.own] = Failures(0, own.last_at)
            row = None if wish.row is None or own.last_at <= wish.expired else kept.get(wish.row)
            if wish.row is not None and row is not None:
                changed[wish.row] = Failures(max(0, row.count - own.count), row.last_at)
        for share, bucket in wish.shares:
            if share not in kept or bucket not in kept:
                continue
            left = kept[share].last_at - wish.now
            full = kept[bucket].last_at - wish.now
            if left > 0:
                changed[share] = Failures(kept[share].count, wish.now)
                changed[bucket] = Failures(kept[bucket].count, wish.now + max(0.0, full - left))
    db.change_each(
        _SET_FAILURES,
        [{"wanted": key, "number": each.count, "until": each.last_at} for key, each in sorted(changed.items())],
    )
    return [None] * len(wishes)


def claim(db: Transaction, wishes: Sequence[Claim]) -> Sequence[bool]:
    """Take on a duty, unless somebody has it."""
    return [db.change(_CLAIM, wish._asdict()) == 1 for wish in wishes]


def remember_now(_: Transaction, wishes: Sequence[None]) -> Sequence[None]:
    """Change nothing: every commit writes down the time."""
    return [None] * len(wishes)


def remember(db: Transaction, now: Instant) -> None:
    """Write down that it has been `now`, so that no restart believes an earlier clock."""
    db.change(_REMEMBER, {"name": CLOCK, "now": now})


def probe(db: Transaction) -> None:
    """Write something that means nothing, to find out whether anything can be written."""
    db.change(_PROBE, {})


def _end(db: Transaction, digests: Sequence[bytes], now: Instant) -> Sequence[bool]:
    """Delete tokens and log it for every cache to read; say of each whether it was there."""
    if not digests:
        return []
    db.hold(REVOKING)
    gone = [digest for (digest,) in db.rows_each(_DELETE, [{"digest": digest} for digest in digests])]
    if gone:
        db.change_each(_LOG, [{"digest": digest, "at": now} for digest in gone])
        db.announce()
    left = dict.fromkeys(gone, True)
    return [left.pop(digest, False) for digest in digests]
