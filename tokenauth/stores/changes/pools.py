"""The changes that pools of tokens can be asked for, each written once for many callers at a time.

Callers who wait together are served at one moment, the latest that any of them has read, in the order in which they
came. What a verb has read is still so when it writes: it holds the pool, or the rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

from tokenauth.models import Instant, LeaseCheck, Pool, PoolToken
from tokenauth.stores.changes.pool_rows import PoolRows
from tokenauth.stores.engine import Transaction
from tokenauth.stores.store import Lent, Touched

_SPARE = 1000
"""Expired tokens that a pool with a capacity gives up for new ones, beside as many as there are new ones."""


_STEP = 10_000
"""Tokens that are too many, of which one transaction rids a pool at the most."""


class Add(NamedTuple):
    """Add free tokens, all or none; or, with `prefill`, as many as are lacking."""

    pool: Pool
    values: Sequence[str]
    now: Instant


class Lease(NamedTuple):
    """Lend a token."""

    pool: Pool
    holder: str
    username: str | None
    counted: bool
    now: Instant


class Change(NamedTuple):
    """Extend or release the lease of one token, if the claim holds."""

    pool: Pool
    value: str
    claim: LeaseCheck
    free_too: bool
    now: Instant


class Next(NamedTuple):
    """Release the lease that would end first: of one user, or of anybody."""

    pool: Pool
    username: str | None
    now: Instant


class Remove(NamedTuple):
    """Delete one token, or have another take its place."""

    pool: Pool
    value: str
    successor: str | None
    now: Instant


class Some(NamedTuple):
    """Do something to at most `limit` tokens that are free since before an instant."""

    pool: Pool
    limit: int
    now: Instant
    before: Instant = 0


W = TypeVar("W", Add, Lease, Change, Next, Remove, Some)
A = TypeVar("A")


Serve = Callable[[PoolRows, Sequence[W]], Sequence[A]]


def _verb(shared: bool) -> Callable[[Serve[W, A]], Callable[..., Sequence[A]]]:
    """Make a verb of what serves the callers of one pool; `shared`: while others do the like.

    What counts tokens must not be: nobody may add any, or change how many are too many, at the same time.
    """

    def make(serve: Serve[W, A]) -> Callable[..., Sequence[A]]:
        def serve_pool(db: Transaction, wishes: Sequence[W]) -> Sequence[A]:
            pool = wishes[0].pool
            db.hold(f"pool {pool.name}", shared=shared)
            return serve(PoolRows(db, pool, db.moment(max(wish.now for wish in wishes))), wishes)

        def verb(db: Transaction, wishes: Sequence[W]) -> Sequence[A]:
            pool = wishes[0].pool
            if all(wish.pool is pool for wish in wishes):  # as it nearly always is
                return serve_pool(db, wishes)
            groups: dict[str, list[int]] = {}
            for position, wish in enumerate(wishes):
                groups.setdefault(wish.pool.name, []).append(position)
            answers: dict[int, A] = {}
            for _, positions in sorted(groups.items()):
                group = [wishes[position] for position in positions]
                answers.update(zip(positions, serve_pool(db, group), strict=True))
            return [answers[position] for position in range(len(wishes))]

        return verb

    return make


@_verb(shared=False)
def add_tokens(rows: PoolRows, wishes: Sequence[Add]) -> Sequence[bool]:
    """Add free tokens for everybody whose tokens have room."""
    capacity, room = rows.pool.capacity, math.inf
    if capacity is not None:
        # Expired rows go first, so that rows never outnumber the capacity, whatever `token_ttl` is tomorrow.
        rows.delete_expired(sum(len(wish.values) for wish in wishes) + _SPARE)
        room = capacity - sum(rows.counts())
    answers: list[bool] = []
    values: list[str] = []
    for wish in wishes:
        fits = len(wish.values) <= room
        if fits:
            room -= len(wish.values)
            values += wish.values
        answers.append(fits)
    rows.insert(values)
    return answers


@_verb(shared=False)
def fit_pool(rows: PoolRows, wishes: Sequence[Add]) -> Sequence[int]:
    """Bring a pool closer to its capacity."""
    answers = []
    for wish in wishes:
        rows.delete_retired()
        free, lent, _ = rows.counts()
        surplus = free + lent - (rows.pool.capacity or 0)
        if surplus > 0:
            step = min(surplus, _STEP)
            rows.retire(step - rows.delete_free(step))
            answers.append(step - surplus)
        else:
            lacking = -surplus - rows.reinstate(-surplus)
            rows.insert(wish.values[:lacking])
            answers.append(max(0, lacking - len(wish.values)))
    return answers


@_verb(shared=True)
def lease_tokens(rows: PoolRows, wishes: Sequence[Lease]) -> Sequence[Lent]:
    """Lend the tokens that have been free longest. Each retired one that is still out keeps a free one back."""
    kept, left = rows.retired(), None
    if kept:  # who keeps tokens back must not do so at the same time as another
        rows.take_turns()
        kept = rows.retired()
    if any(wish.counted for wish in wishes):
        left = max(0, rows.counts()[0] - kept)
    found = rows.free(len(wishes) + kept)
    pairs = zip(islice(found, max(0, len(found) - kept)), wishes, strict=False)
    lent = {number: rows.pool.leased(token, wish.holder, wish.username, rows.now) for (number, token), wish in pairs}
    rows.put(lent)
    answers = [
        Lent(token, None, None if left is None else left - place) for place, token in enumerate(lent.values(), 1)
    ]
    if len(answers) < len(wishes):
        answers += [Lent(None, rows.next_end(), 0)] * (len(wishes) - len(answers))
    return answers


@_verb(shared=True)
def extend_leases(rows: PoolRows, wishes: Sequence[Change]) -> Sequence[Touched | None]:
    """Let leases, and free tokens where that is meant too, run for their full time from now."""

    def extended(token: PoolToken, wish: Change) -> PoolToken | None:
        if wish.claim.matches(token, rows.now):
            return rows.pool.extended(token, rows.now)
        return rows.pool.released(token, rows.now) if wish.free_too and not token.is_leased(rows.now) else None

    return _change(rows, wishes, extended)


@_verb(shared=True)
def release_leases(rows: PoolRows, wishes: Sequence[Change]) -> Sequence[Touched | None]:
    """End leases."""

    def released(token: PoolToken, wish: Change) -> PoolToken | None:
        return rows.pool.released(token, rows.now) if wish.claim.matches(token, rows.now) else None

    return _change(rows, wishes, released)


@_verb(shared=False)
def release_next(rows: PoolRows, wishes: Sequence[Next]) -> Sequence[tuple[bool, int]]:
    """End the leases that would end first: each caller's own, or anybody's."""
    free, _, retired = rows.counts()
    lent: dict[str | None, Iterator[tuple[int, PoolToken]]] = {}
    for username in {wish.username for wish in wishes}:
        found = rows.lent(len(wishes), username)
        if retired:
            found += rows.lent_and_retired(len(wishes), username)
        lent[username] = iter(sorted(found, key=lambda row: row[1].free_at))
    released: dict[int, PoolToken] = {}
    answers = []
    for wish in wishes:
        number, token = next((row for row in lent[wish.username] if row[0] not in released), (0, None))
        if token is not None:
            released[number] = rows.pool.released(token, rows.now)
            free, retired = (free, retired - 1) if token.retired else (free + 1, retired)
        answers.append((token is not None, max(0, free - retired)))
    rows.put(released)
    return answers


@_verb(shared=True)
def remove_tokens(rows: PoolRows, wishes: Sequence[Remove]) -> Sequence[bool]:
    """Delete tokens, or replace them."""
    found = rows.named(wish.value for wish in wishes)
    answers = []
    for wish in wishes:
        number, token = found.pop(wish.value, (0, None))
        if token is not None:
            if wish.successor is None or token.retired:
                rows.delete(number)
            else:
                rows.succeed(number, wish.successor)
        answers.append(token is not None)
    return answers


@_verb(shared=False)
def extend_free(rows: PoolRows, wishes: Sequence[Some]) -> Sequence[int]:
    """Let free tokens wait for their full time from now."""
    return [rows.extend_free(wish.before, wish.limit) for wish in wishes]


@_verb(shared=False)
def purge_pool(rows: PoolRows, wishes: Sequence[Some]) -> Sequence[int]:
    """Delete tokens that have expired, and retired ones whose lease is over."""
    answers = []
    for wish in wishes:
        retired = rows.delete_retired(wish.limit)
        answers.append(retired + rows.delete_expired(wish.limit - retired))
    return answers


def _change(
    rows: PoolRows, wishes: Sequence[Change], change: Callable[[PoolToken, Change], PoolToken | None]
) -> Sequence[Touched | None]:
    """Change tokens one after the other, as far as `change` lets them be."""
    found = rows.named(wish.value for wish in wishes)
    changed: dict[int, PoolToken] = {}
    answers: list[Touched | None] = []
    for wish in wishes:
        if wish.value not in found:
            answers.append(None)
            continue
        number, token = found[wish.value]
        after = change(token, wish)
        if after is None:
            answers.append(Touched(token, done=False))
            continue
        answers.append(Touched(after, done=True))
        changed[number] = after
        if rows.pool.is_live(after, rows.now):
            found[wish.value] = number, after
        else:  # a retired token ends with its lease
            del found[wish.value]
    rows.put(changed)
    return answers
