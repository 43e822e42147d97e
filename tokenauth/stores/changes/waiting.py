"""Changes to the waiting line of a pool. Each has the pool to itself."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Self

from tokenauth.errors import LeaseLost, NoFreeToken, PlaceLost, Refusal, RequestDiffers, TooManyLeases, TooManyPlaces
from tokenauth.models import Grant, Instant, LeaseChange, LeaseCheck, LeaseRequest, PoolToken, RequestKey
from tokenauth.stores.changes.pool_rows import PoolRows
from tokenauth.stores.changes.pools import PoolChange, Release, running
from tokenauth.stores.changes.request_rows import RequestRows
from tokenauth.waiting_line import KEPT, LAST, MAX_PLACES, REMEMBERED, Row, new_request

_NAMELESS = "\0"
"""Begins the ids of requests without one. No client can send it."""

_OVER = "This request was granted, and its lease is over: use a new id for a new lease."


class Ask(PoolChange[Grant | LeaseRequest | Refusal]):
    """Serve a request for leases if it is its turn; otherwise give it a place in the line, or keep its place.

    id: None for a request that cannot be repeated: nothing is kept of it.
    keep: seconds for which the place is kept; None if it is to get none.
    known: whether it is served only if it has a place, or was granted before.
    """

    username: str
    id: str | None
    holder: str
    count: int
    priority: int
    ttl: float | None
    labels: tuple[str, ...]
    keep: float | None
    known: bool = False
    shares_pool = False

    def request(self, since: Instant, now: Instant, number: int) -> LeaseRequest:
        id = f"{_NAMELESS}{number}" if self.id is None else self.id
        terms = self.holder, self.count, self.priority, self.ttl, self.labels
        return new_request(self.pool, self.username, id, *terms, since, now + (self.keep or 0), number)

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[Grant | LeaseRequest | Refusal]:
        """Find what is repeated, share out the free tokens once, and write what has changed."""
        requests = rows.requests()
        waiting, latest = requests.summary()
        since = max(rows.now, latest)  # a later request must not get an earlier place
        known = requests.find(change.id for change in changes if change.id is not None)
        lapsed = [request for request in known.values() if not _waits(request, rows.now) and request.granted_at is None]
        for request in lapsed:
            del known[request.key]
        places: dict[RequestKey, LeaseRequest] = {}
        joining: set[RequestKey] = set()
        repeated: dict[RequestKey, LeaseRequest] = {}
        answers: dict[int, Grant | Refusal] = {}
        asking = [change.request(since, rows.now, LAST + position) for position, change in enumerate(changes)]
        for position, (change, asked) in enumerate(zip(changes, asking, strict=True)):
            place = places.get(asked.key) or known.get(asked.key)
            if place is not None and place.terms != asked.terms:
                answers[position] = RequestDiffers()
            elif place is not None and place.granted_at is not None:
                tokens = running(rows, place)
                later = max(place.kept_until, rows.now + REMEMBERED)
                place = replace(place, kept_until=later, answers=place.answers + (tokens is not None))
                answers[position] = LeaseLost(_OVER) if tokens is None else Grant(place, tokens)
                repeated[asked.key] = known[asked.key] = place
            elif change.known:
                answers[position] = PlaceLost()
            elif place is None and change.keep is not None and _has_too_many(requests, asked, waiting, joining):
                answers[position] = TooManyPlaces()
            elif place is None:
                places[asked.key] = asked
            elif change.keep is not None:
                asks = place.asks + (change.keep > KEPT)
                kept_until = max(place.kept_until, asked.kept_until)  # a copy that waits less shortens no wait
                places[asked.key] = replace(place, kept_until=kept_until, asks=asks)
            else:
                places[asked.key] = place
            if asked.key in places and change.keep is not None:
                joining.add(asked.key)
        new = [place for place in places.values() if place.number >= LAST]
        served = rows.share_out(sum(place.count for place in places.values()), places.keys(), new)
        copies = {position: asked.key for position, asked in enumerate(asking) if position not in answers}
        granted = _grant(rows, served, Counter(copies.values()))
        last = {key: position for position, key in copies.items()}
        for position, key in copies.items():
            if key in granted:
                grant = granted[key]
                answers[position] = grant if position == last[key] else grant._replace(before=())
        requests.delete(lapsed)
        left = {key: place for key, place in places.items() if key not in granted and key in joining}
        written = [*(grant.request for grant in granted.values()), *left.values()]
        requests.insert(request for request in written if request.number >= LAST and request.id[0] != _NAMELESS)
        requests.update([*repeated.values(), *(request for request in written if request.number < LAST)])
        return [
            answers.get(position) or (_refusal(rows, places[asked.key]) if change.keep is None else places[asked.key])
            for position, (change, asked) in enumerate(zip(changes, asking, strict=True))
        ]


class TakeTurns(PoolChange[Sequence[Grant]]):
    """Serve those of some requests whose turn it is: only theirs, since no client may wait for others any more.

    asks: the requests, and for each how often it had been asked for. Where that is more now, another process serves it.
    """

    asks: Mapping[RequestKey, int]
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[Sequence[Grant]]:
        return [_take_turns(rows, change.asks) for change in changes]


class HandOver(PoolChange[tuple[LeaseChange | None, Sequence[Grant]]]):
    """End a lease, and serve those of some requests whose turn it is then.

    The answer has those of `Release` and of `TakeTurns`. Nobody is served if no lease was ended.
    """

    value: str
    check: LeaseCheck
    asks: Mapping[RequestKey, int]
    shares_pool = False

    @classmethod
    def make_in_pool(
        cls, rows: PoolRows, changes: Sequence[Self]
    ) -> Sequence[tuple[LeaseChange | None, Sequence[Grant]]]:
        """End all leases, then share the tokens out once; each caller gets the grants of its own requests."""
        ended = Release.make_in_pool(rows, [Release(change.pool, change.value, change.check) for change in changes])
        left: Sequence[Grant] = ()
        if any(each is not None and each.granted for each in ended):
            left = _take_turns(rows, {key: asks for change in changes for key, asks in change.asks.items()})
        answers = []
        for change, each in zip(changes, ended, strict=True):
            answers.append((each, [grant for grant in left if grant.request.key in change.asks]))
            left = [grant for grant in left if grant.request.key not in change.asks]
        return answers


class Leave(PoolChange[LeaseRequest | None]):
    """Give up a place in the line, or keep it for `keep` seconds at most; the answer is None if there was none.

    seen: the request when it was last asked for here. One that was asked for again since, anywhere, keeps its place.
    """

    key: RequestKey
    keep: float | None = None
    seen: LeaseRequest | None = None
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[LeaseRequest | None]:
        requests = rows.requests()
        known = requests.find(change.key[1] for change in changes)
        answers: list[LeaseRequest | None] = []
        for change in changes:
            place = known.get(change.key)
            left = place is not None and _waits(place, rows.now)
            if place is not None and change.seen is not None:
                left &= (place.kept_until, place.asks) == (change.seen.kept_until, change.seen.asks)
            answers.append(place if left else None)
            if place is None or not left:
                continue
            if change.keep is None:
                requests.delete([known.pop(change.key)])
            else:
                known[change.key] = replace(place, kept_until=min(place.kept_until, rows.now + change.keep))
                requests.update([known[change.key]])
        return answers


class PutBack(PoolChange[bool]):
    """Take back what was granted to a client that has gone; the answer is whether it was.

    It was not if another answer has the same leases: its client may have got them. With `keep` the request has its
    place again, for that many seconds.
    """

    request: LeaseRequest
    keep: float | None
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[bool]:
        requests = rows.requests()
        known = requests.find(change.request.id for change in changes if change.request.id[0] != _NAMELESS)
        answers = []
        for change in changes:
            key = change.request.key
            request = change.request if change.request.id[0] == _NAMELESS else known.pop(key, None)
            found = request is not None and request.granted_at == change.request.granted_at
            answers.append(found and request is not None and request.answers == 1)
            if request is None or not found:
                continue
            if request.answers > 1:
                known[key] = replace(request, answers=request.answers - 1)
                requests.update([known[key]])
                continue
            held = rows.numbered(number for number, _ in request.leases or ())
            rows.update_leases(
                {
                    number: rows.pool.released(token, rows.now)
                    for number, token in held.items()
                    if request.has(number, token) and token.is_leased(rows.now)
                }
            )
            if request.id[0] == _NAMELESS:
                continue
            if change.keep is None:
                requests.delete([request])
            else:
                until = rows.now + change.keep
                requests.update([replace(request, granted_at=None, leases=None, kept_until=until, answers=0)])
        return answers


def _take_turns(rows: PoolRows, asks: Mapping[RequestKey, int]) -> Sequence[Grant]:
    served = [each for each in rows.share_out(0, asks) if each[0].asks == asks[each[0].key]]
    granted = [*_grant(rows, served, dict.fromkeys(asks, 1)).values()]
    rows.requests().update(grant.request for grant in granted)
    return granted


def _waits(request: LeaseRequest, now: Instant) -> bool:
    return request.granted_at is None and now < request.kept_until


def _has_too_many(requests: RequestRows, asked: LeaseRequest, waiting: int, joining: Collection[RequestKey]) -> bool:
    if waiting + len(joining) < MAX_PLACES:
        return False
    own = sum(username == asked.username for username, _ in joining)
    return requests.count_of(asked.username) + own >= MAX_PLACES


def _grant(
    rows: PoolRows, served: Sequence[tuple[LeaseRequest, Sequence[Row]]], answers: Mapping[RequestKey, int]
) -> dict[RequestKey, Grant]:
    """Lease tokens to requests. `answers` counts the answers that each will get. This writes no row of a request."""
    leased: dict[int, PoolToken] = {}
    granted = {}
    for request, found in served:
        after = {
            number: rows.pool.leased(token, request.holder, request.username, rows.now, request.ttl)
            for number, token in found
        }
        leased |= after
        until = max(token.free_at for token in after.values()) + REMEMBERED
        numbers = tuple((number, token.fence) for number, token in after.items())
        done = replace(request, granted_at=rows.now, kept_until=until, leases=numbers, answers=answers[request.key])
        granted[request.key] = Grant(done, [*after.values()], [token for _, token in found])
    rows.update_leases(leased)
    return granted


def _refusal(rows: PoolRows, request: LeaseRequest) -> Refusal:
    end, over_limit = rows.refusal(request)
    if over_limit:
        return TooManyLeases()
    retry_after = None if end is None else max(1, math.ceil(end - rows.now))
    return NoFreeToken(retry_after, NoFreeToken.of_members if rows.pool.members else None)
