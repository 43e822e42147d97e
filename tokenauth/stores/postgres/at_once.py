"""Changes that PostgreSQL makes with one statement, in one round trip that also commits.

A lock is held only while such a statement runs, not while messages travel between a node in a far region and its
database. So nobody who waits for the lock waits for the network, too.

A statement runs in steps, one for each set of its parameters, all in one transaction. A step sees what the steps
before have changed, and what others had committed when it began. So a step that waits for a lock comes first, and then
one that reads what the lock protects.

A client that has got 503 must not be served later. Nobody can take back a statement that commits by itself, neither
while it waits for a lock nor before PostgreSQL has read it. So it fails after PATIENCE, which counts from when
PostgreSQL begins it, and when PostgreSQL's clock passes a deadline, WITHIN seconds after it was sent. Then the changes
are made in an ordinary transaction, whose COMMIT is only sent after all else was answered. A statement whose answer is
lost may still be made until its deadline, so nobody gets 503 before that. The check comes last: only the commit itself
can be delayed further.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, TypeVar, cast

import asyncpg
from sqlalchemy import (
    CTE,
    BindParameter,
    Boolean,
    ClauseElement,
    ColumnElement,
    Float,
    LargeBinary,
    Select,
    String,
    any_,
    bindparam,
    case,
    column,
    delete,
    false,
    func,
    insert,
    literal,
    literal_column,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.sql.elements import Grouping
from sqlalchemy.sql.visitors import replacement_traverse

from tokenauth.models import Assignment, Instant, LeaseChange, Pool, PoolToken
from tokenauth.stores.batching import UNMADE, ChangeKind
from tokenauth.stores.changes import pool_rows
from tokenauth.stores.changes.clock import CLOCK
from tokenauth.stores.changes.pools import Assign, KeepAlive, LeaseUpdate, Release, pool_lock
from tokenauth.stores.changes.tokens import REVOCATION_LOCK, SURPLUS, Issue, Revoke, Surplus, user_lock
from tokenauth.stores.engine import Rows, Values
from tokenauth.stores.postgres.transaction import (
    CHANNEL,
    CLOCK_ROW,
    SERVER_CLOCK,
    PostgresTransaction,
    advisory_key,
)
from tokenauth.stores.tables import pool_tokens, revocations, token_columns, token_row, tokens

TooLate = asyncpg.DivisionByZeroError
"""What a statement raises that has waited for too long, or that PostgreSQL has read too late."""

_now = bindparam("now", type_=Float())
_age = literal_column("extract(epoch FROM clock_timestamp() - transaction_timestamp())", Float())
_patience = bindparam("patience", type_=Float())
_server_clock: ColumnElement[float] = literal_column(SERVER_CLOCK, Float())
_deadline = bindparam("deadline", type_=Float())

# What a statement changes is changed whether anything reads it or not.
_CLOCK_WRITTEN = (
    text(f"""
        INSERT INTO marks (name, at)
        SELECT '{CLOCK}', CAST(:clock AS float8) WHERE CAST(:clock AS float8) IS NOT NULL
        ON CONFLICT (name) DO UPDATE SET at = excluded.at WHERE marks.at < excluded.at
        RETURNING at
    """)
    .columns(column("at", Float()))
    .cte("clock_written")
)
_clock_waited = select(func.count()).select_from(_CLOCK_WRITTEN).scalar_subquery() < 0
# CASE goes in order: the times are read after the wait for the clock row, which is the last that is locked.
_in_time: ColumnElement[Any] = literal_column("1") / case(
    (_clock_waited, literal_column("0")),
    ((_age < _patience) & (_server_clock < _deadline), literal_column("1")),
    else_=literal_column("0"),
)
_LOCKED = (
    text("SELECT count(pg_advisory_xact_lock(key)) AS number FROM unnest(CAST(:locks AS bigint[])) AS key")
    .columns(column("number"))
    .cte("locked")
)

_COLUMNS = [each.name for each in token_columns]
_names = ", ".join(_COLUMNS)
_TYPES = {
    **{"digest": "bytea", "issued_at": "float8", "used_at": "float8"},
    **{"expires_at": "bigint", "max_expires_at": "bigint"},
}
_arrays = ", ".join(f"CAST(:{name} AS {_TYPES.get(name, 'text')}[])" for name in _COLUMNS)
# As in `_insert_concurrently`. Tokens of one statement do not see each other: their places make the numbers grow.
_ADDED = (
    text(f"""
        INSERT INTO tokens (number, {_names})
        SELECT
            greatest(
                CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint),
                (SELECT max(number) + 1 FROM tokens WHERE tokens.username = added.username)
            ) + added.place - 1,
            {_names}
        FROM unnest({_arrays}) WITH ORDINALITY AS added ({_names}, place)
        RETURNING number
    """)  # noqa: S608 - constants
    .columns(column("number"))
    .cte("added")
)


def _revoked(chosen: CTE) -> Select[Any]:
    """Delete and log chosen tokens, and notify the caches. They are logged in the order of their commits."""
    lock = func.pg_advisory_xact_lock(advisory_key(REVOCATION_LOCK))
    lock_if_any = select(lock).select_from(select(literal(1)).select_from(chosen).limit(1).subquery()).cte("log_locked")
    digests = select(chosen.c.digest).join_from(chosen, lock_if_any, true())  # so only after the lock
    gone = (
        delete(tokens)
        .where(tokens.c.digest == any_(func.array(digests.scalar_subquery())))
        .returning(tokens.c.digest, tokens.c.username)
        .cte("gone")
    )
    logged = (
        insert(revocations)
        .from_select(["digest", "at"], select(gone.c.digest, _now), include_defaults=False)
        .returning(revocations.c.digest)
        .cte("logged")
    )
    some = bindparam("notifies", type_=Boolean()) & (func.count() > 0)
    notified = case((some, func.pg_notify(CHANNEL, "")))
    found = select(func.array_agg(gone.c.digest), notified, _in_time, func.array_agg(gone.c.username))
    return found.add_cte(logged, _CLOCK_WRITTEN)


_ISSUE = _revoked(SURPLUS.cte("surplus")).where(select(_LOCKED.c.number).scalar_subquery() >= 0).add_cte(_ADDED)
_digests = func.unnest(bindparam("digests", type_=ARRAY(LargeBinary))).column_valued("digest")
_REVOKE = _revoked(select(_digests.label("digest")).cte("chosen"))


def _issue(db: PostgresTransaction, changes: Sequence[Issue]) -> Sequence[Surplus]:
    """Lock the users whose tokens are counted, add tokens, then revoke the surplus of each user."""
    rows = [token_row(change.token) for change in changes]
    added: Values = {name: [row.get(name) for row in rows] for name in _COLUMNS}
    nothing: Values = {
        **dict.fromkeys(_COLUMNS, ()),
        **{"locks": (), "names": "[]", "per_user": 0, "now": max(change.now for change in changes)},
    }
    limited: dict[int, set[str]] = {}
    for change in changes:
        if change.per_user:
            limited.setdefault(change.per_user, set()).add(change.token.username)
    steps = [{**nothing, **added}]
    if limited:
        names = set(chain.from_iterable(limited.values()))
        steps.insert(0, {**nothing, "locks": sorted(advisory_key(user_lock(name)) for name in names)})
        steps += [
            {**nothing, "names": json.dumps(sorted(each)), "per_user": per_user} for per_user, each in limited.items()
        ]
    revoked = [pair for step in db.steps(_ISSUE, steps) for pair in zip(step[0] or (), step[3] or (), strict=True)]
    return Surplus.divide(changes, revoked)


def _revoke(db: PostgresTransaction, changes: Sequence[Revoke]) -> Sequence[bool]:
    digests = [change.digest for change in changes]
    found = db.steps(_REVOKE, [{"digests": digests, "now": max(change.now for change in changes)}])
    left = dict.fromkeys(_digests_of(found), True)
    return [left.pop(digest, False) for digest in digests]


def _digests_of(steps: Rows) -> Sequence[bytes]:
    return [digest for step in steps for digest in step[0] or ()]


_TIME = (
    text(f"""
        SELECT CASE WHEN CAST(:caller_time AS boolean) THEN CAST(:read AS float8)
               ELSE greatest(CAST(:read AS float8), {SERVER_CLOCK}, {CLOCK_ROW}) END AS now
    """)
    .columns(column("now", Float()))
    .cte("clock")
)
_time: ColumnElement[float] = select(_TIME.c.now).scalar_subquery()
_INSTANTS: Mapping[str, ColumnElement[float]] = {
    "now": _time,
    **{name: _time + bindparam(name, type_=Float()) for name in ("cutoff", "lapsed_cutoff", "reclaim_cutoff")},
}

_Statement = TypeVar("_Statement", bound=ClauseElement)


def _at_that_time(statement: _Statement) -> _Statement:
    """Have a statement about a pool read _TIME. Its other parameters are those of the instant 0."""

    def replace(element: ClauseElement, **_: object) -> ColumnElement[float] | None:
        return _INSTANTS.get(element.key) if isinstance(element, BindParameter) else None

    return cast(_Statement, replacement_traverse(statement, {}, replace))  # it returns what it gets


_POOL_LOCKED = (
    text("SELECT count(pg_advisory_xact_lock_shared(key)) AS number FROM unnest(CAST(:locks AS bigint[])) AS key")
    .columns(column("number"))
    .cte("locked")
)
_lock_pool = select(_POOL_LOCKED.c.number).scalar_subquery() >= 0
_of_pool = pool_tokens.c.pool == bindparam("name")
_in_pool = case((_of_pool, true()), else_=false())  # checked, but no reason to read the whole pool by an index


def _assigned() -> Select[Any]:
    """Lease the tokens that have been free longest, unless somebody waits or tokens are withheld."""
    obstacles = _at_that_time(pool_rows.OBSTACLES).cte("obstacles")
    none = select((obstacles.c.withheld == 0) & ~obstacles.c.someone_waits).scalar_subquery()
    free = _at_that_time(pool_rows.FREE_UNLOCKED).where(none).cte("free")
    # The rows are updated by number, so that there is only one plan to read them.
    numbers = select(func.array_agg(aggregate_order_by(free.c.number, free.c.free_at, free.c.number)).label("all"))
    found = numbers.cte("numbers")
    all_numbers = select(found.c.all).scalar_subquery()

    def asked(name: str, type_: type[Any]) -> ColumnElement[Any]:
        values = bindparam(name, type_=ARRAY(type_))
        return Grouping(values)[func.array_position(all_numbers, pool_tokens.c.number)]

    leased = (
        update(pool_tokens)
        .where(pool_tokens.c.number == any_(func.array(select(free.c.number).scalar_subquery())), _in_pool)
        .values(
            free_at=_time + asked("durations", Float),
            holder=asked("holders", String),
            fence=pool_tokens.c.fence + 1,
            username=asked("usernames", String),
            leased_at=_time,
            lease_ttl=asked("ttls", Float),
        )
        .returning(pool_tokens.c.number)
        .cte("leased")
    )
    granted = select(_in_time, _time, free).where(_lock_pool).order_by(free.c.free_at, free.c.number)
    return granted.add_cte(leased, _CLOCK_WRITTEN)


_ASSIGN = _assigned()
_AT_ONCE_LIMIT = 1000
"""Leases that one statement grants at most."""


def _assign(db: PostgresTransaction, changes: Sequence[Assign]) -> Sequence[object]:
    """Lock the first pool, then grant leases in order. What cannot be granted is left: why is not known."""
    pool = changes[0].pool
    own = [(position, change) for position, change in enumerate(changes) if change.pool.name == pool.name]
    chosen = list(takewhile(lambda each: each[1].pool is pool and _is_plain(each[1]), own))[:_AT_ONCE_LIMIT]
    answers: list[object] = [UNMADE] * len(changes)
    if not chosen:
        return answers
    granted = [change for _, change in chosen]
    nothing = {
        **pool_rows.parameters(pool, 0.0),
        **{"read": max(change.now for change in granted), "locks": (), "wanted": 0, "limit": 0},
        **dict.fromkeys(("durations", "holders", "usernames", "ttls"), ()),
    }
    work = {
        **nothing,
        "wanted": len(granted),
        "limit": len(granted) + pool_rows.MARGIN,
        "durations": [pool.duration(change.ttl) for change in granted],
        "holders": [change.holder for change in granted],
        "usernames": [change.username for change in granted],
        "ttls": [change.ttl for change in granted],
    }
    rows = db.steps(_ASSIGN, [{**nothing, "locks": [advisory_key(pool_lock(pool))]}, work])
    for (position, change), (_, now, *row) in zip(chosen, rows, strict=False):
        [(_, before)] = pool_rows.parsed([row])
        after = pool.leased(before, change.holder, change.username, now, change.ttl)
        answers[position] = Assignment(after, None, None, lapsed=before.unlogged)
    return answers


def _is_plain(change: Assign) -> bool:
    return change.shares(change.pool) and not change.counted


_wanted = func.unnest(bindparam("values", type_=ARRAY(String))).table_valued("value", name="wanted").render_derived()
_found = (  # each by its own look-up, as in `pool_rows`
    select(*pool_rows.ROW).where(_of_pool, pool_tokens.c.value == _wanted.c.value).offset(0).lateral("found")
)
_FIND = select(_time, _found).join_from(_wanted, _found, true())
_BEFORE = ("value", "free_at", "holder", "fence", "retired", "leased_at")
_AFTER = ("free_at", "holder", "fence", "username", "leased_at", "lease_ttl")


def _saved() -> Select[Any]:
    """Write the leases of tokens that are as they were when they were read, and still run or are still live.

    A token that has expired since then may have been replaced before the pool was locked.
    """
    columns = ["number", *(f"old_{name}" for name in _BEFORE), "over", *_AFTER]
    types: dict[str, Any] = {prefix + each.name: each.type for each in pool_tokens.c for prefix in ("", "old_")}
    types["over"] = Float()
    each = (
        func.unnest(*(bindparam(name, type_=ARRAY(types[name])) for name in columns))
        .table_valued(*(column(name, types[name]) for name in columns), name="each")
        .render_derived()
    )
    saved = (
        update(pool_tokens)
        .where(pool_tokens.c.number == each.c.number, _in_pool)
        .where(*(pool_tokens.c[name].is_not_distinct_from(each.c[f"old_{name}"]) for name in _BEFORE))
        .where(pool_tokens.c.free_at > _time + each.c.over)
        .values({name: each.c[name] for name in _AFTER})
        .returning(pool_tokens.c.number)
        .cte("saved")
    )
    return select(_in_time, func.array_agg(saved.c.number)).where(_lock_pool).add_cte(_CLOCK_WRITTEN)


_SAVE = _saved()


def _update_leases(db: PostgresTransaction, changes: Sequence[LeaseUpdate]) -> Sequence[object]:
    """Read tokens, then write those that are still the same: other changes are left, and second ones of a token."""
    pool, read = changes[0].pool, max(change.now for change in changes)
    first: dict[str, int] = {}
    for position, change in enumerate(changes):
        if change.pool is pool and change.shares(pool):
            first.setdefault(change.value, position)
    answers: list[object] = [UNMADE] * len(changes)
    if not first:
        return answers
    of_pool = {"name": pool.name, "read": read}
    rows = db.timed(_FIND, {**of_pool, "values": list(first)})
    now = rows[0][0] if rows else read
    found = {token.value: (number, token) for number, token in pool_rows.parsed(row[1:] for row in rows)}
    changed: list[tuple[int, PoolToken, PoolToken, int]] = []
    for value, position in first.items():
        number, token = found.get(value, (0, None))
        if token is None or not pool.is_live(token, now):
            answers[position] = None
            continue
        after = changes[position].changed(pool, token, now)
        if after is None:
            answers[position] = LeaseChange(token, None)
        else:
            changed.append((number, token, after, position))
    if not changed:
        return answers
    changed.sort(key=lambda each: each[1].value)  # as in `pool_rows`, rows are locked in this order
    work: dict[str, object] = {
        "number": [number for number, *_ in changed],
        "over": [_over(pool, token, now) for _, token, *_ in changed],
        **{f"old_{name}": [getattr(token, name) for _, token, *_ in changed] for name in _BEFORE},
        **{name: [getattr(after, name) for *_, after, _ in changed] for name in _AFTER},
    }
    locked = {**of_pool, **dict.fromkeys(work, ()), "locks": [advisory_key(pool_lock(pool))]}
    saved = db.steps(_SAVE, [locked, {**of_pool, **work, "locks": ()}])[-1][1]
    for number, token, after, position in changed:
        if number in (saved or ()):
            answers[position] = LeaseChange(token, after)
    return answers


def _over(pool: Pool, token: PoolToken, now: Instant) -> float:
    """Return how far after now `free_at` must be while the token is what it is now: leased, lapsed or free."""
    if token.is_leased(now):
        return 0.0
    return pool.cutoff(0.0) if token.holder is None else pool.lapsed_cutoff(0.0)


AT_ONCE: Mapping[ChangeKind, Callable[[PostgresTransaction, Sequence[Any]], Sequence[Any]]] = {
    Issue: _issue,
    Revoke: _revoke,
    Assign: _assign,
    KeepAlive: _update_leases,
    Release: _update_leases,
}
"""What makes the changes of a kind at once, and returns their answers. Any: each kind has its own type of answer."""
