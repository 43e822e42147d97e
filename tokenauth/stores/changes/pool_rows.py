"""The rows of one pool at one moment: what they can be asked, and told, within a transaction."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import (
    BindParameter,
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
    or_,
    select,
    text,
    true,
    union_all,
    update,
)

from tokenauth.models import Instant, Pool, PoolCounts, PoolToken
from tokenauth.stores.engine import Disturbed, Transaction, elements
from tokenauth.stores.tables import pool_token_columns, pool_tokens

_number, _at = pool_tokens.c.number, pool_tokens.c.free_at
_row = (_number, *pool_token_columns)
_limit: BindParameter[int] = bindparam("limit")
_pool = pool_tokens.c.pool == bindparam("name")
_lent = _at > bindparam("now")

# The ranges of the index `pool_tokens_by_turn`. What was lent and not given back may expire earlier than the idle.
_idle = (_pool, pool_tokens.c.retired == false(), pool_tokens.c.idle == true())
_taken = (_pool, pool_tokens.c.retired == false(), pool_tokens.c.idle == false())
_retired = (_pool, pool_tokens.c.retired == true(), pool_tokens.c.idle == false())
_given_back = (_pool, pool_tokens.c.retired == true(), pool_tokens.c.idle == true())
_waiting = (*_idle, _at > bindparam("floor"))
_lapsed = (*_taken, _at > bindparam("lapsed_floor"), _at <= bindparam("now"))
_expired = ((*_idle, _at <= bindparam("floor")), (*_taken, _at <= bindparam("lapsed_floor")))

Range = tuple[ColumnElement[bool], ...]

_BESIDE = 100
"""Tokens that others may be taking at the same moment, without a second look being needed."""


def _number_of(*conditions: ColumnElement[bool]) -> ScalarSelect[int]:
    return select(func.count()).select_from(pool_tokens).where(*conditions).scalar_subquery()


def _first_of(*conditions: ColumnElement[bool]) -> ScalarSelect[float]:
    return select(func.min(_at)).where(*conditions).scalar_subquery()


def _rows(*ranges: Range) -> Select[Any] | CompoundSelect[Any]:
    """Look up the rows with the least `free_at` in some ranges, which are read side by side, and no further."""
    each = [select(*_row).where(*one) for one in ranges]
    if len(each) == 1:
        return each[0].order_by(_at, _number).limit(_limit)
    return union_all(*each).order_by("free_at", "number").limit(_limit)


def _rows_in_turn(*ranges: Range) -> CompoundSelect[Any]:
    """Look up the same rows; PostgreSQL sorts whole ranges unless it is told that each is wanted in order."""
    each = [_rows(one).subquery() for one in ranges]
    return union_all(*map(select, each)).order_by("free_at", "number").limit(_limit)


def _oldest(*ranges: Range) -> ColumnElement[bool]:
    return _number.in_(select(_rows_in_turn(*ranges).subquery().c.number))


# Statements are made once: making one costs more than running it.
COUNT = select(_number_of(*_waiting) + _number_of(*_lapsed), _number_of(*_taken, _lent), _number_of(*_retired, _lent))
MEMBERS = (
    select(*pool_token_columns)
    .where(_pool, pool_tokens.c.value > bindparam("after"))
    .where(or_(and_(pool_tokens.c.idle == false(), _lent), and_(*_waiting), and_(*_lapsed)))
    .order_by(pool_tokens.c.value)
    .limit(_limit)
)
_behind = (_lent, or_(_at > bindparam("end"), and_(_at == bindparam("end"), _number > bindparam("number"))))
LEASES = _rows((*_taken, *_behind), (*_retired, *_behind))
_COUNT_RETIRED = select(_number_of(*_retired, _lent))
_NEXT_END = select(_first_of(*_taken, _lent), _first_of(*_retired, _lent))
_FREE = _rows(_waiting, _lapsed)
# The rows are known by their numbers, and no plan may look for them in another way; what holds of them must still.
_FREE_TO_TAKE = (
    select(*_row)
    .where(_number == any_(func.array(select(_rows_in_turn(_waiting, _lapsed).subquery().c.number).scalar_subquery())))
    .where(case((or_(and_(*_waiting), and_(*_lapsed)), true()), else_=false()))
    .order_by(_at, _number)
    .limit(bindparam("wanted"))
    .with_for_update(skip_locked=True)
)
_COUNT_FREE = select(func.count()).select_from(_rows_in_turn(_waiting, _lapsed).subquery())
_LENT = _rows((*_taken, _lent))
_LENT_AND_RETIRED = _rows((*_retired, _lent))
# No index has the users: of a pool that is read in this order, the rows of others are passed over.
_of_user = pool_tokens.c.username == bindparam("username")
_LENT_TO = _rows((*_taken, _lent, _of_user))
_LENT_TO_AND_RETIRED = _rows((*_retired, _lent, _of_user))
_values = select(elements(bindparam("values"), "named").c.value)
_NAMED = select(*_row).where(_pool, pool_tokens.c.value.in_(_values))
_NAMED_TO_CHANGE = (
    select(*_row)
    .where(_pool, pool_tokens.c.value == any_(func.array(_values.scalar_subquery())))
    .order_by(_number)
    .with_for_update()
)
_INSERT = insert(pool_tokens).inline()
_PUT = text("""
    UPDATE pool_tokens SET free_at = :free_at, holder = :holder, fence = :fence, username = :username
    WHERE number = :number AND pool = :name
""")
_SUCCEED = text("""
    UPDATE pool_tokens SET value = :value, free_at = :now, holder = NULL, fence = 0, username = NULL
    WHERE number = :number AND pool = :name
""")
_DELETE = text("DELETE FROM pool_tokens WHERE number = :number AND pool = :name")
_earlier = _at < bindparam("before")
_EXTEND_FREE = (
    update(pool_tokens)
    .where(_oldest((*_waiting, _earlier), (*_lapsed, _earlier)))
    .values(free_at=bindparam("now"), holder=None, username=None)
)
_RETIRE = update(pool_tokens).where(_oldest((*_taken, _lent))).values(retired=True)
_REINSTATE = update(pool_tokens).where(_oldest((*_retired, _lent))).values(retired=False)
_DELETE_FREE = delete(pool_tokens).where(_oldest(_waiting, _lapsed))
_DELETE_EXPIRED = delete(pool_tokens).where(_oldest(*_expired))
_DELETE_RETIRED = delete(pool_tokens).where(_oldest((*_retired, _at <= bindparam("now")), _given_back))


def counts(free: int, lent: int, retired: int) -> PoolCounts:
    """Make of what COUNT found how many tokens can be lent, and how many are."""
    return PoolCounts(max(0, free - retired), lent + retired)


def terms(pool: Pool, now: Instant) -> dict[str, Any]:
    """Say what statements about a pool need to know of it."""
    return {"name": pool.name, "now": now, "floor": pool.cutoff(now), "lapsed_floor": pool.lapsed_cutoff(now)}


class PoolRows:
    """The rows of a pool as they stand `now`: free, lent, expired, and the retired ones that are still lent."""

    def __init__(self, db: Transaction, pool: Pool, now: Instant) -> None:
        self.pool = pool
        self.now = now
        self._db = db
        self._terms = terms(pool, now)

    def take_turns(self) -> None:
        """Hold off all others, until the end, who say the same."""
        self._db.hold(f"turn {self.pool.name}")

    def counts(self) -> tuple[int, int, int]:
        """Count the free, the lent, and the retired tokens that are still lent."""
        free, lent, retired = self._db.rows(COUNT, self._terms)[0]
        return free, lent, retired

    def retired(self) -> int:
        """Count the retired tokens that are still lent."""
        return int(self._db.rows(_COUNT_RETIRED, self._terms)[0][0])

    def next_end(self) -> Instant | None:
        """Say when the next lease ends."""
        return min((end for end in self._db.rows(_NEXT_END, self._terms)[0] if end is not None), default=None)

    def free(self, limit: int) -> list[tuple[int, PoolToken]]:
        """Look up the tokens that have been free longest, with their numbers; without those that others now take."""
        if self._db.alone:
            return self._found(_FREE, limit=limit)
        breadth = limit + _BESIDE
        while True:
            found = self._found(_FREE_TO_TAKE, wanted=limit, limit=breadth)
            if len(found) == limit:
                return found
            count = self._db.rows(_COUNT_FREE, {**self._terms, "limit": breadth})[0][0]
            if count < breadth:
                if count > len(found) and not self._db.undisturbed:
                    raise Disturbed  # some others may only look at, or have just given back
                return found
            breadth *= 8

    def lent(self, limit: int, username: str | None = None) -> list[tuple[int, PoolToken]]:
        """Look up the tokens, of a user or all, whose leases end first, with their numbers; no retired ones."""
        if username is None:
            return self._found(_LENT, limit=limit)
        return self._found(_LENT_TO, limit=limit, username=username)

    def lent_and_retired(self, limit: int, username: str | None = None) -> list[tuple[int, PoolToken]]:
        """Look up the retired tokens, of a user or all, whose leases end first, with their numbers."""
        if username is None:
            return self._found(_LENT_AND_RETIRED, limit=limit)
        return self._found(_LENT_TO_AND_RETIRED, limit=limit, username=username)

    def named(self, values: Iterable[str]) -> dict[str, tuple[int, PoolToken]]:
        """Look up the tokens of these values that are in being, with their numbers, and hold them."""
        found = self._found(_NAMED if self._db.alone else _NAMED_TO_CHANGE, values=json.dumps(list(values)))
        return {token.value: (number, token) for number, token in found if self.pool.is_live(token, self.now)}

    def insert(self, values: Iterable[str]) -> None:
        """Add free tokens."""
        self._db.change_each(_INSERT, [PoolToken(self.pool.name, value, self.now)._asdict() for value in values])

    def put(self, changed: Mapping[int, PoolToken]) -> None:
        """Write what has become of leases, by number."""
        self._db.change_each(
            _PUT,
            [
                {
                    "name": self.pool.name,
                    "number": number,
                    "free_at": token.free_at,
                    "holder": token.holder,
                    "fence": token.fence,
                    "username": token.username,
                }
                for number, token in changed.items()
            ],
        )

    def succeed(self, number: int, value: str) -> None:
        """Put a new free token in the place of one."""
        self._db.change(_SUCCEED, {**self._terms, "number": number, "value": value})

    def delete(self, number: int) -> None:
        """Delete one token."""
        self._db.change(_DELETE, {**self._terms, "number": number})

    def extend_free(self, before: Instant, limit: int) -> int:
        """Let tokens that are free since before an instant be free since now."""
        return self._some(_EXTEND_FREE, limit, before=before)

    def retire(self, limit: int) -> int:
        """Retire lent tokens."""
        return self._some(_RETIRE, limit)

    def reinstate(self, limit: int) -> int:
        """Take back that lent tokens were retired."""
        return self._some(_REINSTATE, limit)

    def delete_free(self, limit: int) -> int:
        """Delete free tokens."""
        return self._some(_DELETE_FREE, limit)

    def delete_expired(self, limit: int) -> int:
        """Delete tokens that have been free for too long."""
        return self._some(_DELETE_EXPIRED, limit)

    def delete_retired(self, limit: int = 2**31 - 1) -> int:
        """Delete retired tokens whose lease is over."""
        return self._some(_DELETE_RETIRED, limit)

    def _found(self, statement: Any, **more: Any) -> list[tuple[int, PoolToken]]:
        rows = self._db.rows(statement, {**self._terms, **more})
        return [
            (number, PoolToken(pool, value, free_at, holder, fence, bool(retired), username))
            for number, pool, value, free_at, holder, fence, retired, username in rows
        ]

    def _some(self, statement: Any, limit: int, **more: Any) -> int:
        """Run a change of at most `limit` rows, the oldest first; say how many they were."""
        return self._db.change(statement, {**self._terms, "limit": limit, **more}) if limit > 0 else 0
