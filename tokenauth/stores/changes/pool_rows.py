"""The rows of one pool at one instant, read and changed within a transaction."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import merge
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    BindParameter,
    ClauseElement,
    ColumnElement,
    CompoundSelect,
    ScalarSelect,
    Select,
    and_,
    any_,
    bindparam,
    case,
    delete,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    true,
    union_all,
    update,
)

from tokenauth.models import Instant, LeaseRequest, Pool, PoolCounts, PoolToken, RequestKey
from tokenauth.stores.changes.request_rows import SOMEONE_WAITS, RequestRows
from tokenauth.stores.engine import LockConflict, Transaction
from tokenauth.stores.sql import SelectedRows, elements
from tokenauth.stores.tables import as_pool_token, as_reservation, pool_token_columns, pool_tokens
from tokenauth.waiting_line import Row, find_use, share_out, skip_hopeless

_number, _at = pool_tokens.c.number, pool_tokens.c.free_at
ROW = (_number, *pool_token_columns)
_limit: BindParameter[int] = bindparam("limit")
_pool = pool_tokens.c.pool == bindparam("name")
_live = _at > bindparam("now")
_unclaimed = _at <= bindparam("reclaim_cutoff")  # `reclaim_delay` is over: before, a lapsed token counts as leased
_claimed = _at > bindparam("reclaim_cutoff")

# Ranges of the index `pool_tokens_by_turn`. `_idle` rows were never leased or have been released; `_taken` rows are
# leased, or their lease has lapsed: those may expire earlier than idle ones.
_idle = (_pool, pool_tokens.c.retired == false(), pool_tokens.c.idle == true())
_taken = (_pool, pool_tokens.c.retired == false(), pool_tokens.c.idle == false())
_retired = (_pool, pool_tokens.c.retired == true(), pool_tokens.c.idle == false())
_retired_idle = (_pool, pool_tokens.c.retired == true(), pool_tokens.c.idle == true())
_unexpired = (*_idle, _at > bindparam("cutoff"))
_lapsed = (*_taken, _at > bindparam("lapsed_cutoff"), _unclaimed)
_lapsed_or_claimed = (*_taken, _at > bindparam("lapsed_cutoff"))
_expired = ((*_idle, _at <= bindparam("cutoff")), (*_taken, _at <= bindparam("lapsed_cutoff")))

Range = tuple[ColumnElement[bool], ...]

_AHEAD = 1000
"""Free tokens that are read for those who wait, if anyone does: those in front may need that many."""

MARGIN = 100
"""Rows that other transactions may have locked before a wider range must be read."""


def _count(*conditions: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).select_from(pool_tokens).where(*conditions).scalar_subquery()


def _earliest(*conditions: ColumnElement[bool]) -> ScalarSelect[float]:
    return select(func.min(_at)).where(*conditions).scalar_subquery()


def _rows(*ranges: Range) -> Select[Any] | CompoundSelect[Any]:
    """Select the rows with the smallest `free_at` in some ranges; no range is read beyond the limit."""
    each = [select(*ROW).where(*conditions) for conditions in ranges]
    if len(each) == 1:
        return each[0].order_by(_at, _number).limit(_limit)
    return union_all(*each).order_by("free_at", "number").limit(_limit)


def _rows_by_range(*ranges: Range) -> CompoundSelect[Any]:
    """Select the same rows, each range with its own order and limit: otherwise PostgreSQL sorts whole ranges."""
    each = [_rows(conditions).subquery() for conditions in ranges]
    return union_all(*map(select, each)).order_by("free_at", "number").limit(_limit)


def _oldest(*ranges: Range) -> ColumnElement[bool]:
    return SelectedRows(_pool, _number, select(_rows_by_range(*ranges).subquery().c.number))


def _latest(*conditions: ColumnElement[bool]) -> ScalarSelect[float]:
    return select(func.max(_at)).where(*conditions).scalar_subquery()


# Statements are constants: compiling one costs more than running it.
COUNT = select(_count(*_unexpired) + _count(*_lapsed), _count(*_taken, _claimed), _count(*_retired, _claimed))
MEMBERS = (
    select(*pool_token_columns)
    .where(_pool, pool_tokens.c.value > bindparam("after"))
    .where(or_(and_(pool_tokens.c.idle == false(), _live), and_(*_unexpired), and_(*_lapsed_or_claimed)))
    .order_by(pool_tokens.c.value)
    .limit(_limit)
)
# of the form of which both databases make one range of the index
_after_cursor = (_at >= bindparam("end"), or_(_at > bindparam("end"), _number > bindparam("number")))
LEASES = _rows_by_range((*_taken, *_after_cursor), (*_retired, *_after_cursor))
OBSTACLES = select(_count(*_retired, _claimed).label("withheld"), SOMEONE_WAITS.label("someone_waits"))
_NEXT_END = select(_earliest(*_taken, _claimed), _earliest(*_retired, _claimed))
# Nearly each lease, release and lapse changes one of these, and reading them costs the same for any number of tokens.
ENDS = select(
    *(_earliest(*rows) for rows in (_idle, (*_taken, _live), (*_retired, _live))),
    *(_latest(*rows) for rows in (_idle, (*_taken, _live), (*_retired, _live))),
)
_FREE = _rows(_unexpired, _lapsed)
_FREE_BY_RANGE = _rows_by_range(_unexpired, _lapsed)
_free = _FREE_BY_RANGE.subquery()
_FREE_AND_WITHHELD = select(_free, _count(*_retired, _claimed)).order_by(_free.c.free_at, _free.c.number)
# The rows are selected by number, so that there is only one plan to read them. Their conditions are checked again.
FREE_UNLOCKED = (
    select(*ROW)
    .where(
        _number == any_(func.array(select(_rows_by_range(_unexpired, _lapsed).subquery().c.number).scalar_subquery()))
    )
    .where(case((or_(and_(*_unexpired), and_(*_lapsed)), true()), else_=false()))
    .order_by(_at, _number)
    .limit(bindparam("wanted"))
    .with_for_update(skip_locked=True)
)
_some_free = select(func.count()).select_from(select(literal(1)).where(*_unexpired).limit(_AHEAD).subquery())
_some_lapsed = select(func.count()).select_from(select(literal(1)).where(*_lapsed).limit(_AHEAD).subquery())
SOME_FREE = select(_some_free.scalar_subquery() + _some_lapsed.scalar_subquery() - _count(*_retired, _claimed))
_over = (_at >= bindparam("since"), _at <= bindparam("now"), pool_tokens.c.leased_at.is_not(None))
UNLOGGED = _rows_by_range((*_taken, *_over), (*_retired, *_over))
_COUNT_FREE = select(func.count()).select_from(_rows_by_range(_unexpired, _lapsed).subquery())
_LEASED = _rows((*_taken, _live))
_LEASED_AND_RETIRED = _rows((*_retired, _live))
# No index has the usernames: the pool is read in this order, and rows of other users are skipped.
_of_user = pool_tokens.c.username == bindparam("username")
_COUNT_HELD = select(_count(*_taken, _claimed, _of_user) + _count(*_retired, _claimed, _of_user))
_held = union_all(
    *(select(pool_tokens.c.username).where(*conditions, _claimed) for conditions in (_taken, _retired))
).subquery()
HELD = select(_held.c.username, func.count()).group_by(_held.c.username)
_LEASED_TO = _rows((*_taken, _live, _of_user))
_LEASED_TO_AND_RETIRED = _rows((*_retired, _live, _of_user))
_values = select(elements(bindparam("values"), "wanted").c.value)
_BY_VALUE = select(*ROW).where(_pool, pool_tokens.c.value.in_(_values))
_wanted = elements(bindparam("values"), "wanted")
_found = (  # each by its own look-up: PostgreSQL would rather read a pool that was small when it made its plan
    select(*ROW).where(_pool, pool_tokens.c.value == _wanted.c.value).offset(0).with_for_update().lateral("found")
)
_BY_VALUE_LOCKED = select(_found).join_from(_wanted, _found, true())
_BY_NUMBER = select(*ROW).where(_pool, _number == bindparam("number"))
_INSERT = insert(pool_tokens).inline()
_UPDATE_LEASE = text("""
    UPDATE pool_tokens SET free_at = :free_at, holder = :holder, fence = :fence, username = :username,
        leased_at = :leased_at, lease_ttl = :lease_ttl
    WHERE number = :number AND pool = :name
""")
_REPLACE = text("""
    UPDATE pool_tokens SET value = :value, free_at = :now, holder = NULL, fence = :fence, username = NULL,
        leased_at = NULL, lease_ttl = NULL
    WHERE number = :number AND pool = :name
""")
_DELETE = text("DELETE FROM pool_tokens WHERE number = :number AND pool = :name")
_earlier = _at < bindparam("before")
_EXTEND_FREE = (
    update(pool_tokens)
    .where(_oldest((*_unexpired, _earlier), (*_lapsed, _earlier)))
    .values(free_at=bindparam("now"), holder=None, username=None, leased_at=None, lease_ttl=None)
)
_RETIRE = update(pool_tokens).where(_oldest((*_taken, _claimed))).values(retired=True)
_REINSTATE = update(pool_tokens).where(_oldest((*_retired, _claimed))).values(retired=False)
_DELETE_FREE = delete(pool_tokens).where(_oldest(_unexpired, _lapsed))
_DELETE_EXPIRED = delete(pool_tokens).where(_oldest(*_expired))
_unnamed = pool_tokens.c.member.is_(None)
# A retired member stays: if its name returns to the configuration, its fences go on.
_DELETE_RETIRED = delete(pool_tokens).where(_oldest((*_retired, _unclaimed, _unnamed), (*_retired_idle, _unnamed)))
_DELETE_UNNAMED = delete(pool_tokens).where(_oldest((*_idle, _unnamed), (*_taken, _unclaimed, _unnamed)))
_RETIRE_UNNAMED = update(pool_tokens).where(_oldest((*_taken, _claimed, _unnamed))).values(retired=True)
_named = (_pool, pool_tokens.c.member.is_not(None))
NAMED = select(*ROW).where(*_named).order_by(_number)
_SET_RETIRED = text("UPDATE pool_tokens SET retired = :retired WHERE number = :number AND pool = :name")
_KEEP_FORCED_END = text("""
    INSERT INTO forced_ends (pool, value, at, "end") VALUES (:name, :value, :now, :end)
    ON CONFLICT (pool, value) DO UPDATE SET at = excluded.at, "end" = excluded."end"
""")
_FORGET_FORCED_ENDS = text("DELETE FROM forced_ends WHERE pool = :name AND at < :before")
_RESERVE = text("UPDATE pool_tokens SET reservation = :reservation WHERE number = :number AND pool = :name")


def parsed(rows: Iterable[Any]) -> list[Row]:
    """Return the numbers and the tokens of selected rows."""
    return [  # every lease is read here: a call of `as_pool_token` takes twice as long
        (
            number,
            PoolToken(
                *(pool, value, end, holder, fence, bool(retired), user, start, ttl, name),
                None if kept is None else as_reservation(kept),
            ),
        )
        for number, pool, value, end, holder, fence, retired, user, start, ttl, name, kept in rows
    ]


def free_members(pool: Pool, members: Iterable[Row], now: Instant) -> list[Row]:
    """Return the members that are free, those that are reserved first: only some can use them."""
    free = ((number, token) for number, token in members if pool.is_free(token, now))
    return sorted(free, key=lambda row: (pool.reservation(row[1], now) is None, row[1].free_at, row[0]))


class _Quotas(dict[str, int]):
    """How many more tokens each user may lease. Each is counted when it is first needed."""

    def __init__(self, rows: "PoolRows") -> None:
        self._rows = rows

    def __missing__(self, username: str) -> int:
        self[username] = quota = self._rows.quota(username)
        return quota


def as_pool_counts(free: int, leased: int, retired: int) -> PoolCounts:
    """Return how many tokens can be leased and how many are, from the numbers that COUNT selects."""
    return PoolCounts(max(0, free - retired), leased + retired)


def parameters(pool: Pool, now: Instant) -> dict[str, object]:
    """Return the parameters that statements about a pool share."""
    return {
        "name": pool.name,
        "now": now,
        "cutoff": pool.cutoff(now),
        "lapsed_cutoff": pool.lapsed_cutoff(now),
        "reclaim_cutoff": pool.reclaim_cutoff(now),
    }


class PoolRows:
    """The rows of a pool at the instant `now`: free, leased, expired, and retired ones whose lease is live."""

    def __init__(self, db: Transaction, pool: Pool, now: Instant, alone: bool = False) -> None:
        """`alone`: whether no other transaction can lease, extend or release a token of the pool until this ends."""
        self.pool = pool
        self.now = now
        self.alone = alone or db.exclusive
        self._db = db
        self._parameters = parameters(pool, now)

    def lock_withheld(self) -> None:
        """Exclude other transactions that withhold free tokens, until this one ends."""
        self._db.lock(f"turn {self.pool.name}")

    def counts(self) -> tuple[int, int, int]:
        """Count the free tokens, the leased ones, and the retired ones whose lease is live."""
        free, leased, retired = self._db.rows(COUNT, self._parameters)[0]
        return free, leased, retired

    def obstacles(self) -> tuple[int, bool]:
        """Return what may keep free tokens from being leased: how many are withheld, and whether anyone waits in line.

        One is withheld for each retired token whose lease is live.
        """
        count, someone_waits = self._db.rows(OBSTACLES, self._parameters)[0]
        return count, bool(someone_waits)

    def requests(self) -> RequestRows:
        """Return the waiting line. Raises LockConflict unless this transaction is alone."""
        if not self.alone:
            raise LockConflict
        return RequestRows(self._db, self.pool.name, self.now)

    def leasable(self, limit: int, withheld: int) -> list[Row]:
        """Return the tokens that have been free longest, without as many as are `withheld`.

        If the pool has members, all free ones, first those that are reserved: only some can use them.
        """
        if self.pool.members:
            return free_members(self.pool, self.members(), self.now)
        found = self.free(limit + withheld)
        return found[: max(0, len(found) - withheld)]

    def _leasable_to_line(self) -> list[Row]:
        """Return what `leasable` does of the tokens that those who wait may need, with one query."""
        if self.pool.members:
            return self.leasable(_AHEAD, 0)
        rows = self._db.rows(_FREE_AND_WITHHELD, {**self._parameters, "limit": _AHEAD})
        withheld = rows[0][-1] if rows else 0
        if withheld and len(rows) == _AHEAD:
            return self.leasable(_AHEAD, withheld)
        return parsed(row[:-1] for row in rows[: max(0, len(rows) - withheld)])

    def share_out(
        self, wanted: int, own: Collection[RequestKey], new: Collection[LeaseRequest] = ()
    ) -> Sequence[tuple[LeaseRequest, Sequence[Row]]]:
        """Find the requests of `own` that can be served now, and their tokens. Nothing is written.

        wanted: how many tokens they need at most. new: those of them that have no row, in the order of their numbers.
        """
        if not own:
            return ()
        if new:
            withheld, someone_waits = self.obstacles()
            free = self.leasable(wanted + (_AHEAD if someone_waits else 0), withheld)
        else:
            free, someone_waits = self._leasable_to_line(), True
        if not free:
            return ()
        line = skip_hopeless(self.pool, self.requests().line()) if someone_waits else ()
        cursor = attrgetter("cursor")
        in_order = merge(line, sorted(new, key=cursor), key=cursor)
        quotas = None if self.pool.per_user is None else _Quotas(self)
        return [
            served
            for served in share_out(in_order, free, find_use(self.pool, self.now), quotas)
            if served[0].key in own
        ]

    def quota(self, username: str) -> int:
        """Return how many more tokens a user may lease by `per_user`."""
        assert self.pool.per_user is not None
        return self.pool.per_user - int(self._db.rows(_COUNT_HELD, {**self._parameters, "username": username})[0][0])

    def left(self) -> int:
        """Return how many more tokens could be leased to someone who asks now, when those who wait have theirs."""
        free, _, retired = self.counts()
        left = free - retired
        quotas = None if self.pool.per_user is None else _Quotas(self)
        line = skip_hopeless(self.pool, self.requests().line()) if left > 0 and self.obstacles()[1] else ()
        for request in line:
            if quotas is not None and request.username:
                if quotas[request.username] < request.count:
                    continue
                quotas[request.username] -= request.count
            left -= request.count
            if left <= 0:
                break
        return max(0, left)

    def refusal(self, request: LeaseRequest) -> tuple[Instant | None, bool]:
        """Return when the next token is free that a refused request could use, and whether its user has enough."""
        if self.pool.per_user is not None and request.username and self.quota(request.username) < request.count:
            return None, True
        if not self.pool.members:
            return self.next_end(), False
        fitting = (token for _, token in self.members() if self.pool.has(token, request.labels))
        return self.pool.next_free_at(fitting, request.username or None, self.now), False

    def numbered(self, numbers: Iterable[int]) -> dict[int, PoolToken]:
        """Return the existing tokens with these numbers."""
        rows = self._db.rows_each(_BY_NUMBER, [{**self._parameters, "number": number} for number in numbers])
        found = {row[0]: as_pool_token(row[1:]) for row in rows}
        return {number: token for number, token in found.items() if self.pool.is_live(token, self.now)}

    def next_end(self) -> Instant | None:
        """Return when the next leased token can be leased again if nothing changes its lease."""
        ends = [end for end in self._db.rows(_NEXT_END, self._parameters)[0] if end is not None]
        return min(ends) + self.pool.reclaim_delay if ends else None

    def members(self) -> list[Row]:
        """Return the tokens that have a name, with their numbers, also those that were retired long ago.

        They are not locked: a change that reads them has an exclusive lock on the pool.
        """
        return self._found(NAMED)

    def free(self, limit: int) -> list[Row]:
        """Return the tokens that have been free longest, with their numbers, except rows that others have locked."""
        if self._db.single_writer:
            return self._found(_FREE, limit=limit)
        if self.alone and not self._db.exclusive:  # no other change to the pool runs, so no row is locked
            return self._found(_FREE_BY_RANGE, limit=limit)
        breadth = limit + MARGIN
        while True:
            found = self._found(FREE_UNLOCKED, wanted=limit, limit=breadth)
            if len(found) == limit:
                return found
            count = self._db.rows(_COUNT_FREE, {**self._parameters, "limit": breadth})[0][0]
            if count < breadth:
                if count > len(found) and not self._db.exclusive:
                    raise LockConflict  # other rows may be free: locked only to be read, or just released
                return found
            breadth *= 8

    def leased(self, limit: int, username: str | None = None) -> list[Row]:
        """Return the leased tokens of a user, or of all, whose leases end first, with their numbers; none retired."""
        if username is None:
            return self._found(_LEASED, limit=limit)
        return self._found(_LEASED_TO, limit=limit, username=username)

    def leased_and_retired(self, limit: int, username: str | None = None) -> list[Row]:
        """Return the retired tokens of a user, or of all, whose leases end first, with their numbers."""
        if username is None:
            return self._found(_LEASED_AND_RETIRED, limit=limit)
        return self._found(_LEASED_TO_AND_RETIRED, limit=limit, username=username)

    def unlogged(self, since: Instant, limit: int) -> list[Row]:
        """Return the tokens whose lease lapsed since an instant, if nothing has logged that, with their numbers."""
        return self._found(UNLOGGED, since=since, limit=limit)

    def find(self, values: Iterable[str]) -> dict[str, Row]:
        """Return the existing tokens with these values, with their numbers, and lock them."""
        query = _BY_VALUE if self._db.single_writer else _BY_VALUE_LOCKED
        found = self._found(query, values=json.dumps(sorted(set(values))))  # rows are locked in this order
        return {token.value: (number, token) for number, token in found if self.pool.is_live(token, self.now)}

    def insert(self, values: Iterable[str]) -> None:
        """Add free tokens."""
        self._insert(PoolToken(self.pool.name, value, self.now) for value in values)

    def insert_members(self, values: Mapping[str, str]) -> None:
        """Add free members; `values` has their values by name."""
        self._insert(PoolToken(self.pool.name, value, self.now, member=name) for name, value in values.items())

    def _insert(self, tokens: Iterable[PoolToken]) -> None:
        self._db.execute_each(_INSERT, [token._asdict() for token in tokens])

    def update_leases(self, changed: Mapping[int, PoolToken]) -> None:
        """Write the leases of tokens, by number."""
        self._db.execute_each(
            _UPDATE_LEASE,
            [
                {
                    "name": self.pool.name,
                    "number": number,
                    "free_at": token.free_at,
                    "holder": token.holder,
                    "fence": token.fence,
                    "username": token.username,
                    "leased_at": token.leased_at,
                    "lease_ttl": token.lease_ttl,
                }
                for number, token in changed.items()
            ],
        )

    def replace(self, number: int, value: str, fence: int) -> None:
        """Replace a token by a new free one."""
        self._db.execute(_REPLACE, {**self._parameters, "number": number, "value": value, "fence": fence})

    def set_retired(self, retired: Mapping[int, bool]) -> None:
        """Retire members, or undo that, by number."""
        self._db.execute_each(
            _SET_RETIRED,
            [{"name": self.pool.name, "number": number, "retired": each} for number, each in retired.items()],
        )

    def reserve(self, changed: Mapping[int, PoolToken]) -> None:
        """Write the reservations of members, by number."""
        self._db.execute_each(
            _RESERVE,
            [
                {
                    "name": self.pool.name,
                    "number": number,
                    "reservation": None if token.reservation is None else json.dumps(token.reservation),
                }
                for number, token in changed.items()
            ],
        )

    def keep_forced_end(self, value: str, end: str) -> None:
        self._db.execute(_KEEP_FORCED_END, {**self._parameters, "value": value, "end": end})

    def forget_forced_ends(self, before: Instant) -> None:
        self._db.execute(_FORGET_FORCED_ENDS, {**self._parameters, "before": before})

    def delete(self, number: int) -> None:
        self._db.execute(_DELETE, {**self._parameters, "number": number})

    def extend_free(self, before: Instant, limit: int) -> int:
        """Make tokens that were free before an instant free from now on."""
        return self._change_oldest(_EXTEND_FREE, limit, before=before)

    def retire(self, limit: int) -> int:
        """Retire leased tokens."""
        return self._change_oldest(_RETIRE, limit)

    def reinstate(self, limit: int) -> int:
        """Undo the retirement of leased tokens."""
        return self._change_oldest(_REINSTATE, limit)

    def delete_free(self, limit: int) -> int:
        """Delete free tokens."""
        return self._change_oldest(_DELETE_FREE, limit)

    def drop_unnamed(self, limit: int) -> int:
        """Delete the tokens without a name that are free, and retire the others; return how many were changed."""
        deleted = self._change_oldest(_DELETE_UNNAMED, limit)
        return deleted + self._change_oldest(_RETIRE_UNNAMED, limit - deleted)

    def delete_expired(self, limit: int) -> int:
        """Delete tokens that have been free for too long."""
        return self._change_oldest(_DELETE_EXPIRED, limit)

    def delete_retired(self, limit: int = 2**31 - 1) -> int:
        """Delete retired tokens without a name whose lease is over."""
        return self._change_oldest(_DELETE_RETIRED, limit)

    def _found(self, query: ClauseElement, **more: object) -> list[Row]:
        return parsed(self._db.rows(query, {**self._parameters, **more}))

    def _change_oldest(self, statement: ClauseElement, limit: int, **more: object) -> int:
        """Change at most `limit` rows, the oldest first, and return how many."""
        return self._db.execute(statement, {**self._parameters, "limit": limit, **more}) if limit > 0 else 0
