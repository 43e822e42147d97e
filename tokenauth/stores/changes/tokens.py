"""Changes to tokens, and to the log of revocations that caches read."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, Self

from sqlalchemy import (
    BigInteger,
    Delete,
    Float,
    Insert,
    LargeBinary,
    Select,
    TextClause,
    Update,
    bindparam,
    case,
    delete,
    func,
    insert,
    select,
    text,
    update,
)

from tokenauth.models import LATE_USE, Instant, Token, TokenKind, Use
from tokenauth.stores.engine import Change, Transaction
from tokenauth.stores.sql import delete_oldest, elements
from tokenauth.stores.tables import (
    OPTIONAL_COLUMNS,
    PLAIN_COLUMNS,
    as_checked_token,
    checked_columns,
    revocations,
    token_row,
    tokens,
)

_MAX_REVOKED = 1000
"""Maximum number of tokens that one login revokes."""

REVOCATION_LOCK = "revocations"
"""The lock of all transactions that revoke: they commit in the order of the revocations' numbers."""


def user_lock(username: str) -> str:
    """Return the lock of transactions that count a user's tokens. It is taken before REVOCATION_LOCK."""
    return f"user {username}"


_now = bindparam("now", type_=Float())

# Statements are constants: compiling one costs more than running it.
_INSERT_PLAIN, _INSERT = insert(tokens).inline(), insert(tokens).inline()


def _insert_concurrently(columns: Sequence[str]) -> TextClause:
    """With concurrent writers, numbers are times; those of one user grow even if the clock is set back."""
    return text(f"""
        INSERT INTO tokens (number, {", ".join(columns)})
        VALUES (
            greatest(
                CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint),
                (SELECT max(number) + 1 FROM tokens WHERE username = :username)
            ),
            {", ".join(f":{column}" for column in columns)}
        )
    """)  # noqa: S608 - constants


_INSERT_PLAIN_CONCURRENTLY = _insert_concurrently(PLAIN_COLUMNS)
_INSERT_CONCURRENTLY = _insert_concurrently([*PLAIN_COLUMNS, *OPTIONAL_COLUMNS])
_DELETE = delete(tokens).where(tokens.c.digest == bindparam("digest")).returning(tokens.c.digest)
_LOG = insert(revocations).inline()


def _surplus() -> Select[bytes, str]:
    """Select the logins that users have beyond `per_user` live ones. Named tokens are not counted.

    For each user it reads the index, newest first, up to the first surplus login. The number is limited, so that a
    login stays quick; when `per_user` was lowered, later logins revoke the rest.
    """
    names = elements(bindparam("names"), "names")
    live = tokens.alias("live")
    of_user = select(live.c.number).where(
        live.c.username == names.c.value, live.c.expires_at > _now, live.c.name.is_(None)
    )
    first = of_user.order_by(live.c.number.desc()).limit(1).offset(bindparam("per_user")).scalar_subquery()
    edges = select(names.c.value.label("username"), first.label("number")).subquery("edges")
    older = (
        select(tokens.c.digest, tokens.c.username, tokens.c.name)
        .join_from(edges, tokens, (tokens.c.username == edges.c.username) & (tokens.c.number <= edges.c.number))
        .where(tokens.c.expires_at > _now)
        .offset(0)  # keeps PostgreSQL from planning with the condition on names, which would read all users' tokens
        .subquery()
    )
    return select(older.c.digest, older.c.username).where(older.c.name.is_(None)).limit(_MAX_REVOKED)


SURPLUS = _surplus()


def _chosen(lapsed: bool, of_user: bool, but_one: bool, kind: TokenKind | None) -> Select[bytes]:
    """Select live tokens of one user or of all, of one kind or both, except the digest `keep` if `but_one`.

    `lapsed`: instead of live ones, those that have expired and could still be extended.
    """
    candidates = select(*tokens.c)
    if of_user:
        candidates = candidates.where(tokens.c.username == bindparam("username"))
        if lapsed:  # keeps PostgreSQL from planning with their ends, which would read the tokens of all users
            candidates = candidates.offset(0)
    found = candidates.subquery().c
    chosen = select(found.digest).limit(bindparam("limit"))
    if lapsed:
        late, ended = bindparam("late", type_=BigInteger()), bindparam("ended", type_=BigInteger())
        chosen = chosen.where(found.expires_at > late, found.expires_at <= ended, found.max_expires_at > _now)
    else:
        chosen = chosen.where(found.expires_at > _now)
    if but_one:
        chosen = chosen.where(found.digest != bindparam("keep"))
    if kind is not None:
        chosen = chosen.where(found.name.is_(None) if kind == "login" else found.name.is_not(None))
    return chosen


@cache  # one statement of many: to make them all would take 20 ms of each start
def _log_of(lapsed: bool, of_user: bool, but_one: bool, kind: TokenKind | None) -> Insert:
    """Write the tokens that are chosen in this way to the log of revocations."""
    chosen = _chosen(lapsed, of_user, but_one, kind)
    named = select(chosen.subquery().c.digest, _now)
    return insert(revocations).from_select(["digest", "at"], named)


_LAST = select(func.max(revocations.c.seq))
_DELETE_LOGGED = delete(tokens).where(
    tokens.c.digest.in_(select(revocations.c.digest).where(revocations.c.seq > bindparam("last")))
)


def _note(extends: bool) -> Update:
    """Write one use, unless the store knows a later one or the token has ended too long ago.

    Unless it `extends` the token, `expires_at` is not set: SQLite would write its indexes again, though unchanged.
    Rows that others have locked are skipped, so that no transaction waits for this one while this one waits for it.
    """
    noted_at = func.coalesce(tokens.c.used_at, tokens.c.issued_at)
    used_at = bindparam("used_at", type_=Float())
    end = bindparam("end", type_=BigInteger())
    fixed = tokens.c.max_expires_at.is_(None)
    needed = (tokens.c.expires_at < bindparam("needed", type_=Float())) & (
        tokens.c.expires_at < tokens.c.max_expires_at
    )
    due = (
        select(tokens.c.digest)
        .where(
            tokens.c.digest == bindparam("of", type_=LargeBinary()),
            tokens.c.expires_at > bindparam("late", type_=BigInteger()),
            (noted_at <= bindparam("stale", type_=Float())) | needed,
        )
        .with_for_update(skip_locked=True)
        .cte("due", nesting=True)
    )
    used = {"used_at": case((noted_at < used_at, used_at), else_=tokens.c.used_at)}
    extended = {
        "expires_at": case(
            (fixed | (tokens.c.expires_at >= end), tokens.c.expires_at),
            (tokens.c.max_expires_at < end, tokens.c.max_expires_at),
            else_=end,
        )
    }
    return update(tokens).where(tokens.c.digest.in_(select(due.c.digest))).values(used | extended if extends else used)


_NOTE, _NOTE_AND_EXTEND = _note(extends=False), _note(extends=True)
_TOKEN = select(*checked_columns).where(tokens.c.digest == bindparam("of", type_=LargeBinary()))
_PURGE = delete_oldest(tokens.c.digest, tokens.c.expires_at, tokens.c.expires_at <= bindparam("before"))


def _purge_revocations() -> Delete:
    """Delete old entries of the log, but never the last: from its number, readers know whether they missed any."""
    last = select(func.max(revocations.c.seq)).scalar_subquery()
    oldest = select(revocations).order_by(revocations.c.seq).limit(bindparam("limit")).subquery()
    old = select(oldest.c.seq).where(oldest.c.at < bindparam("before"), oldest.c.seq < last)
    return delete(revocations).where(revocations.c.seq.in_(old))


_PURGE_REVOCATIONS = _purge_revocations()


class Surplus(NamedTuple):
    """The logins that a batch of logins has revoked."""

    digests: Sequence[bytes]
    """All of them: no login of the batch is answered before every cache has dropped them."""
    own: Sequence[bytes]
    """Those of the user of one login, unless an earlier one of the batch has them."""

    @classmethod
    def divide(cls, logins: Sequence["Issue"], revoked: Sequence[tuple[bytes, str]]) -> Sequence[Self]:
        """Return what each login of a batch has revoked, of these digests with the names of their users."""
        left: dict[str, list[bytes]] = {}
        for digest, username in revoked:
            left.setdefault(username, []).append(digest)
        digests = [digest for digest, _ in revoked]
        return [cls(digests, left.pop(login.token.username, ())) for login in logins]


class Issue(Change[Surplus]):
    """Add a login and revoke the oldest live ones of its user beyond `per_user`; the answer names the revoked ones."""

    token: Token
    per_user: int

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[Surplus]:
        """Insert tokens, then revoke the surplus of each user."""
        limited: dict[int, set[str]] = {}
        for change in changes:
            if change.per_user:
                limited.setdefault(change.per_user, set()).add(change.token.username)
        if limited:
            db.lock(*map(user_lock, set().union(*limited.values())))
        insert_tokens(db, [change.token for change in changes])
        now = max(change.now for change in changes)
        revoked: list[tuple[bytes, str]] = []
        for per_user, names in limited.items():
            wanted = {"names": json.dumps(sorted(names)), "per_user": per_user, "now": now}
            surplus = [(digest, username) for digest, username in db.rows(SURPLUS, wanted)]
            revoke(db, [digest for digest, _ in surplus], now)
            revoked += surplus
        return Surplus.divide(changes, revoked)


class Revoke(Change[bool]):
    """Revoke one token; the answer is whether it existed."""

    digest: bytes

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[bool]:
        return revoke(db, [change.digest for change in changes], max(change.now for change in changes))


class RevokedCounts(NamedTuple):
    """How many tokens were revoked: live ones, and those that had expired and could still have been extended."""

    live: int
    lapsed: int


class RevokeAll(Change[RevokedCounts]):
    """Revoke tokens of one user or of all (None), except `keep`: at most `limit` live ones and as many lapsed ones.

    kind: only tokens of this kind.
    """

    username: str | None
    keep: bytes | None
    limit: int
    kind: TokenKind | None = None

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[RevokedCounts]:
        """Log the digests, then delete the tokens that are logged."""
        db.lock(REVOCATION_LOCK)
        answers = []
        for change in changes:
            last = db.rows(_LAST, {})[0][0] or 0
            values = {
                "username": change.username,
                "keep": change.keep,
                "limit": change.limit,
                "now": change.now,
                "ended": int(change.now),
                "late": int(change.now) - LATE_USE,
            }
            which = change.username is not None, change.keep is not None, change.kind
            # What has lapsed may be extended in between: then it is live.
            lapsed = db.execute(_log_of(True, *which), values)
            answers.append(RevokedCounts(db.execute(_log_of(False, *which), values), lapsed))
            db.execute(_DELETE_LOGGED, {"last": last})
        db.notify()
        return answers


class NoteUses(Change[Mapping[bytes, Token]]):
    """Write uses of tokens. The answer has these tokens as they are now, without those that do not exist."""

    uses: Sequence[Use]

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[Mapping[bytes, Token]]:
        """Write the uses that need it, then read the tokens."""
        late = int(max(change.now for change in changes)) - LATE_USE
        uses = [use for change in changes for use in change.uses]
        for statement, extends in ((_NOTE, False), (_NOTE_AND_EXTEND, True)):
            some = [use for use in uses if (use.end is not None) is extends]
            db.execute_each(statement, [{"of": use.digest, "late": late, **_values(use)} for use in some])
        found = map(as_checked_token, db.rows_each(_TOKEN, [{"of": use.digest} for use in uses]))
        return [{token.digest: token for token in found}] * len(changes)


def _values(use: Use) -> dict[str, Instant | None]:
    return {"used_at": use.used_at, "end": use.end, "stale": use.stale, "needed": use.needed}


class PurgeTokens(Change[int]):
    """Delete at most `limit` tokens that have expired; the answer is how many."""

    limit: int

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[int]:
        """Delete the oldest tokens. No cache needs to know: an expired token is refused by its own time."""
        # Tokens expire at whole seconds; compared with a fraction, PostgreSQL would find none of them by an index.
        return [db.execute(_PURGE, {"before": int(change.now), "limit": change.limit}) for change in changes]


class PurgeRevocations(Change[int]):
    """Delete at most `limit` entries of the revocation log that are older than an instant, but never the last."""

    before: Instant
    limit: int

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[int]:
        db.lock("log")
        return [db.execute(_PURGE_REVOCATIONS, {"before": change.before, "limit": change.limit}) for change in changes]


def insert_tokens(db: Transaction, added: Sequence[Token]) -> None:
    """Add tokens."""
    rows = [token_row(token) for token in added]
    plain = [row for row in rows if len(row) == len(PLAIN_COLUMNS)]
    others = [row for row in rows if len(row) > len(PLAIN_COLUMNS)]
    db.execute_each(_INSERT_PLAIN if db.single_writer else _INSERT_PLAIN_CONCURRENTLY, plain)
    db.execute_each(_INSERT if db.single_writer else _INSERT_CONCURRENTLY, others)


def revoke(db: Transaction, digests: Sequence[bytes], now: Instant) -> Sequence[bool]:
    """Delete tokens and log that for every cache; return for each whether it existed."""
    if not digests:
        return []
    db.lock(REVOCATION_LOCK)
    gone = [digest for (digest,) in db.rows_each(_DELETE, [{"digest": digest} for digest in digests])]
    log_revoked(db, gone, now)
    left = dict.fromkeys(gone, True)
    return [left.pop(digest, False) for digest in digests]


def log_revoked(db: Transaction, digests: Sequence[bytes], now: Instant) -> None:
    """Have every cache drop tokens that were deleted, or whose rows have changed. Needs REVOCATION_LOCK."""
    if digests:
        db.execute_each(_LOG, [{"digest": digest, "at": now} for digest in digests])
        db.notify()
