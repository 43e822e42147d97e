"""The rows of the waiting line of one pool at one instant, read and changed within a transaction."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Float,
    bindparam,
    exists,
    func,
    insert,
    select,
    text,
    tuple_,
)

from tokenauth.models import START_OF_LINE, Instant, LeaseRequest, PlaceCursor, RequestKey
from tokenauth.stores.engine import Transaction
from tokenauth.stores.sql import elements
from tokenauth.stores.tables import as_lease_request, pool_request_columns, pool_requests
from tokenauth.waiting_line import KEPT

_PAGE = 100
"""Requests that one query reads of the line. Most often the first few take all free tokens."""

_MAX_KEPT = 10_000
"""Maximum number of places that are kept after an outage."""

_NOTICED = 5.0
"""Seconds in which an outage is noticed at the latest: the longest that an operation takes."""

_number, _turn, _kept = pool_requests.c.number, pool_requests.c.turn, pool_requests.c.kept_until
_limit: BindParameter[int] = bindparam("limit")
_pool = pool_requests.c.pool == bindparam("name")
_waiting = (_pool, pool_requests.c.granted_at.is_(None), _kept > bindparam("now"))
_place = tuple_(_turn, _number)
_of_place = tuple_(bindparam("turn", type_=Float()), bindparam("number", type_=BigInteger()))

SOMEONE_WAITS = exists().where(*_waiting)
LINE = select(*pool_request_columns).where(*_waiting, _place > _of_place).order_by(_turn, _number).limit(_limit)
LABELS = select(pool_requests.c.labels).where(*_waiting).distinct()
LABELS_BY_USER = select(pool_requests.c.labels, pool_requests.c.username).where(*_waiting).distinct()
COUNT = select(func.count()).select_from(pool_requests).where(*_waiting)
NEWEST = select(func.count(), func.max(_number), func.min(_turn)).where(*_waiting)
PLACE = select(COUNT.where(_place <= _of_place).scalar_subquery(), COUNT.scalar_subquery())
FIND = select(*pool_request_columns).where(
    _pool, pool_requests.c.id == bindparam("id"), pool_requests.c.username == bindparam("username")
)
_SUMMARY = select(func.count(), func.max(pool_requests.c.since)).where(*_waiting)
_COUNT_OF_USER = COUNT.where(pool_requests.c.username == bindparam("username"))
_FIND_MANY = select(*pool_request_columns).where(
    _pool, pool_requests.c.id.in_(select(elements(bindparam("ids"), "wanted").c.value))
)
WAITS_STILL = select(pool_requests.c.username, pool_requests.c.id, pool_requests.c.asks).where(
    *_waiting, pool_requests.c.id.in_(select(elements(bindparam("ids"), "wanted").c.value))
)
_INSERT = insert(pool_requests).inline()
_GRANT = text("""
    UPDATE pool_requests SET granted_at = :granted_at, leases = :leases, kept_until = :kept_until, asks = :asks,
        answers = :answers
    WHERE number = :number AND pool = :name
""")
_DELETE = text("DELETE FROM pool_requests WHERE number = :number AND pool = :name")
_lapsed = (_pool, pool_requests.c.granted_at.is_(None), _kept <= bindparam("now"))
LAPSED = select(*pool_request_columns).where(*_lapsed).order_by(_kept).limit(_limit)
_OLD = (
    select(*pool_request_columns)
    .where(_pool, pool_requests.c.granted_at.is_not(None), _kept <= bindparam("now"))
    .order_by(_kept)
    .limit(_limit)
)


def keep_places(seconds: float, now: Instant) -> str:
    """Return the statement with which those keep their places who waited when an outage began, `seconds` ago.

    Their clients could not ask again, and can within KEPT seconds from now on. It may be run several times. Of very
    many, those in front keep theirs: an outage must not last because they are many. Other nodes may not have been
    cut off: places that lapsed there meanwhile come back, too.
    """
    began = now - seconds - _NOTICED
    waited = f"granted_at IS NULL AND kept_until > {began!r} AND kept_until < {now + KEPT!r}"
    first = f"SELECT number FROM pool_requests WHERE {waited} ORDER BY turn, number LIMIT {_MAX_KEPT}"  # noqa: S608 - numbers
    return f"UPDATE pool_requests SET kept_until = {now + KEPT!r} WHERE {waited} AND number IN ({first})"  # noqa: S608


def beyond(cursor: PlaceCursor) -> Mapping[str, object]:
    """Return the parameters of a cursor in the line."""
    return dict(zip(("turn", "number"), cursor, strict=True))


class RequestRows:
    """The requests for the leases of a pool at the instant `now`. Its user has an exclusive lock on the pool."""

    def __init__(self, db: Transaction, name: str, now: Instant) -> None:
        self._db = db
        self._now = now
        self._parameters = {"name": name, "now": now}

    def line(self) -> Iterator[LeaseRequest]:
        """Yield those who wait, in order. Only as much is read as is used."""
        place, more = START_OF_LINE, True
        while more:
            page = self._db.rows(LINE, {**self._parameters, **beyond(place), "limit": _PAGE})
            for request in map(as_lease_request, page):
                yield request
                place = request.cursor
            more = len(page) == _PAGE

    def summary(self) -> tuple[int, Instant]:
        """Return how many wait, and when the last of them came."""
        count, latest = self._db.rows(_SUMMARY, self._parameters)[0]
        return count, latest or 0.0

    def count_of(self, username: str) -> int:
        """Return how many requests of a user wait."""
        return int(self._db.rows(_COUNT_OF_USER, {**self._parameters, "username": username})[0][0])

    def find(self, ids: Iterable[str]) -> dict[RequestKey, LeaseRequest]:
        """Return the requests with these ids, also granted ones and lapsed ones."""
        rows = self._db.rows(_FIND_MANY, {**self._parameters, "ids": json.dumps(list(ids))})
        return {request.key: request for request in map(as_lease_request, rows)}

    def insert(self, requests: Iterable[LeaseRequest]) -> None:
        """Add requests; the database numbers them."""
        self._db.execute_each(_INSERT, [_row(request) for request in requests])

    def update(self, requests: Iterable[LeaseRequest]) -> None:
        """Write until when requests are kept, and what they were granted."""
        self._db.execute_each(
            _GRANT,
            [
                {
                    "name": request.pool,
                    "number": request.number,
                    "granted_at": request.granted_at,
                    "leases": None if request.leases is None else json.dumps(request.leases),
                    "kept_until": request.kept_until,
                    "asks": request.asks,
                    "answers": request.answers,
                }
                for request in requests
            ],
        )

    def delete(self, requests: Iterable[LeaseRequest]) -> None:
        self._db.execute_each(_DELETE, [{"name": request.pool, "number": request.number} for request in requests])

    def lapsed(self, limit: int) -> Sequence[LeaseRequest]:
        """Return lapsed places, the oldest first."""
        return [as_lease_request(row) for row in self._db.rows(LAPSED, {**self._parameters, "limit": limit})]

    def old(self, limit: int) -> Sequence[LeaseRequest]:
        """Return granted requests that were to be remembered until now."""
        if limit <= 0:
            return ()
        return [as_lease_request(row) for row in self._db.rows(_OLD, {**self._parameters, "limit": limit})]


def _row(request: LeaseRequest) -> Mapping[str, object]:
    return {
        "pool": request.pool,
        "username": request.username,
        "id": request.id,
        "holder": request.holder,
        "count": request.count,
        "priority": request.priority,
        "ttl": request.ttl,
        "labels": json.dumps(request.labels),
        "since": request.since,
        "turn": request.turn,
        "kept_until": request.kept_until,
        "granted_at": request.granted_at,
        "leases": None if request.leases is None else json.dumps(request.leases),
        "asks": request.asks,
        "answers": request.answers,
    }
