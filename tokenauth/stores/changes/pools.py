"""Changes to pools of tokens.

Changes that wait at the same time are made in one transaction, in order of arrival. They share one time: the latest
that any of their callers has read. A change locks the pool or the rows that it reads, so others cannot change them.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Self, TypeVar

from tokenauth.models import (
    Assignment,
    Instant,
    Lapsed,
    LeaseChange,
    LeaseCheck,
    LeaseRequest,
    Pool,
    PoolToken,
    Reservation,
)
from tokenauth.stores.changes.pool_rows import PoolRows
from tokenauth.stores.engine import Change, Transaction
from tokenauth.waiting_line import LAST, REMEMBERED, Row, new_request

_SPARE = 1000
"""Expired tokens that a pool with a capacity deletes for new ones, in addition to one for each new one."""

_STEP = 10_000
"""Surplus tokens that one transaction removes from a pool at most."""

A_co = TypeVar("A_co", covariant=True)


def pool_lock(pool: Pool) -> str:
    """Return the lock of transactions that change a pool."""
    return f"pool {pool.name}"


class PoolChange(Change[A_co]):
    """A change to one pool."""

    pool: Pool
    shares_pool: ClassVar[bool] = True
    """Whether a shared lock on the pool is enough. False for changes that count its tokens."""

    @classmethod
    def shares(cls, pool: Pool) -> bool:
        """Return whether a shared lock on this pool is enough. Members are few, and read all at once."""
        return cls.shares_pool and not pool.members

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[A_co]:
        """Make the changes pool by pool."""
        pool = changes[0].pool
        if all(change.pool is pool for change in changes):  # the usual case
            return cls._lock_and_make(db, pool, changes)
        groups: dict[str, list[int]] = {}
        for position, change in enumerate(changes):
            groups.setdefault(change.pool.name, []).append(position)
        answers: dict[int, A_co] = {}
        for _, positions in sorted(groups.items()):
            group = [changes[position] for position in positions]
            answers.update(zip(positions, cls._lock_and_make(db, group[0].pool, group), strict=True))
        return [answers[position] for position in range(len(changes))]

    @classmethod
    def _lock_and_make(cls, db: Transaction, pool: Pool, changes: Sequence[Self]) -> Sequence[A_co]:
        shared = cls.shares(pool)
        db.lock(pool_lock(pool), shared=shared)
        rows = PoolRows(db, pool, db.now(max(change.now for change in changes)), alone=not shared)
        return cls.make_in_pool(rows, changes)

    @classmethod
    @abstractmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[A_co]:
        """Make the changes of one pool; return one answer for each, in order."""


class Generate(PoolChange[bool]):
    """Add free tokens, all or none; the answer is whether they were within the capacity."""

    values: Sequence[str]
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[bool]:
        """Add the tokens of each caller whose tokens fit."""
        capacity, room = rows.pool.capacity, math.inf
        if capacity is not None:
            # Expired rows are deleted first: if `token_ttl` is raised later, they are live again and count.
            rows.delete_expired(sum(len(change.values) for change in changes) + _SPARE)
            room = capacity - sum(rows.counts())
        answers: list[bool] = []
        values: list[str] = []
        for change in changes:
            fits = len(change.values) <= room
            if fits:
                room -= len(change.values)
                values += change.values
            answers.append(fits)
        rows.insert(values)
        return answers


class Fit(PoolChange[int]):
    """Bring a pool with `prefill` or members closer to its capacity; the answer is that of `PoolStore.fit`."""

    values: Sequence[str]
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[int]:
        """Delete or retire surplus tokens, or reinstate retired ones and add new ones."""
        answers = []
        for change in changes:
            if rows.pool.members:
                answers.append(cls._fit_members(rows, change.values))
                continue
            rows.delete_retired()
            free, leased, _ = rows.counts()
            surplus = free + leased - (rows.pool.capacity or 0)
            if surplus > 0:
                step = min(surplus, _STEP)
                rows.retire(step - rows.delete_free(step))
                answers.append(step - surplus)
            else:
                lacking = -surplus - rows.reinstate(-surplus)
                rows.insert(change.values[:lacking])
                answers.append(max(0, lacking - len(change.values)))
        return answers

    @classmethod
    def _fit_members(cls, rows: PoolRows, values: Sequence[str]) -> int:
        """Add members that are missing, and retire those that the configuration does not have: none is deleted."""
        if rows.drop_unnamed(_STEP) == _STEP:
            return -1
        rows.delete_retired()
        found = rows.members()
        names = {token.member for _, token in found}
        rows.set_retired(
            {
                number: not token.retired
                for number, token in found
                if token.retired is (token.member in rows.pool.members)
            }
        )
        lacking = [name for name in rows.pool.members if name not in names]
        rows.insert_members(dict(zip(lacking, values, strict=False)))
        return max(0, len(lacking) - len(values))


class Assign(PoolChange[Assignment]):
    """Lease the token that has been free longest."""

    holder: str
    username: str | None
    counted: bool
    ttl: float | None = None
    labels: Sequence[str] = ()

    @classmethod
    def shares(cls, pool: Pool) -> bool:
        """Return whether a shared lock is enough: not if the leases of a user are counted."""
        return cls.shares_pool and not pool.members and pool.per_user is None

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[Assignment]:
        """Lease free tokens, but none that is withheld."""
        (withheld, someone_waits), left = rows.obstacles(), None
        if someone_waits or rows.pool.is_selective:
            return cls._share_out(rows, changes)
        if withheld:  # two transactions must not count what they withhold at the same time
            rows.lock_withheld()
            withheld, _ = rows.obstacles()
        if any(change.counted for change in changes):
            left = max(0, rows.counts()[0] - withheld)
        found = rows.leasable(len(changes), withheld)
        leased = {
            number: rows.pool.leased(token, change.holder, change.username, rows.now, change.ttl)
            for (number, token), change in zip(found, changes, strict=False)
        }
        rows.update_leases(leased)
        answers = [
            Assignment(token, None, None if left is None else left - place, lapsed=before.unlogged)
            for place, (token, (_, before)) in enumerate(zip(leased.values(), found, strict=True), 1)
        ]
        if len(answers) < len(changes):
            answers += [Assignment(None, rows.next_end(), 0)] * (len(changes) - len(answers))
        return answers

    @classmethod
    def _share_out(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[Assignment]:
        """Lease what each can use, when those who wait have what they could use."""
        requests = [
            new_request(
                rows.pool,
                change.username or "",
                str(number),
                change.holder,
                ttl=change.ttl,
                labels=tuple(change.labels),
                since=rows.now,
                number=number,
            )
            for number, change in enumerate(changes, LAST)
        ]
        leased: dict[int, tuple[int, PoolToken, PoolToken]] = {
            request.number: (
                number,
                token,
                rows.pool.leased(token, request.holder, request.username or None, rows.now, request.ttl),
            )
            for request, [(number, token)] in rows.share_out(len(changes), {one.key for one in requests}, requests)
        }
        rows.update_leases({number: after for number, _, after in leased.values()})
        left = rows.left() if any(change.counted for change in changes) else None
        answers = []
        for request in requests:
            if request.number in leased:
                _, before, after = leased[request.number]
                answers.append(Assignment(after, None, left, lapsed=before.unlogged))
            else:
                next_end, over_limit = rows.refusal(request)
                answers.append(Assignment(None, next_end, 0, over_limit))
        return answers


class LeaseUpdate(PoolChange[LeaseChange | None]):
    """Change the lease of one token if its check matches; the answer is None if there is no such token."""

    value: str
    check: LeaseCheck

    @abstractmethod
    def changed(self, pool: Pool, token: PoolToken, now: Instant) -> PoolToken | None:
        """Return the token after the change; None if the change is refused."""

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[LeaseChange | None]:
        pool, now = rows.pool, rows.now
        found = rows.find(change.value for change in changes)
        changed: dict[int, PoolToken] = {}
        answers: list[LeaseChange | None] = []
        for change in changes:
            if change.value not in found:
                answers.append(None)
                continue
            number, token = found[change.value]
            after = change.changed(pool, token, now)
            answers.append(LeaseChange(token, after))
            if after is None:
                continue
            changed[number] = after
            if after.retired and not pool.is_live(after, now):  # it ends with its lease
                del found[change.value]
            else:
                found[change.value] = number, after
        rows.update_leases(changed)
        return answers


class KeepAlive(LeaseUpdate):
    """Extend a lease to its full time from now. With `include_free`, extend the life of a free token, too."""

    include_free: bool

    def changed(self, pool: Pool, token: PoolToken, now: Instant) -> PoolToken | None:
        if self.check.matches(token, now):
            return pool.extended(token, now)
        if not self.include_free or token.is_leased(now):
            return None
        return token if pool.is_taken(token, now) else pool.released(token, now)


class Release(LeaseUpdate):
    """End a lease."""

    def changed(self, pool: Pool, token: PoolToken, now: Instant) -> PoolToken | None:
        return pool.released(token, now) if self.check.matches(token, now) else None


class ReleaseNext(PoolChange[tuple[bool, int]]):
    """End the lease that would end first, of one user or of all (None); the answer also has the free tokens left."""

    username: str | None
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[tuple[bool, int]]:
        """End the next leases, each at most once."""
        free, _, retired = rows.counts()
        leased: dict[str | None, Iterator[Row]] = {}
        for username in {change.username for change in changes}:
            found = rows.leased(len(changes), username)
            if retired:
                found += rows.leased_and_retired(len(changes), username)
            leased[username] = iter(sorted(found, key=lambda row: row[1].free_at))
        released: dict[int, PoolToken] = {}
        answers = []
        for change in changes:
            number, token = next((row for row in leased[change.username] if row[0] not in released), (0, None))
            if token is not None:
                released[number] = rows.pool.released(token, rows.now)
                free, retired = (free, retired - 1) if token.retired else (free + 1, retired)
            answers.append((token is not None, max(0, free - retired)))
        rows.update_leases(released)
        return answers


class Delete(PoolChange[PoolToken | None]):
    """Delete one token or replace it by `successor`; the answer is the token as it was, or None."""

    value: str
    successor: str | None

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[PoolToken | None]:
        """Delete or replace tokens; a retired one without a name is not replaced."""
        found = rows.find(change.value for change in changes)
        answers: list[PoolToken | None] = []
        for change in changes:
            number, token = found.pop(change.value, (0, None))
            if token is not None:
                if token.member is not None and change.successor is not None:
                    rows.replace(number, change.successor, token.fence)  # the same thing: its fences go on
                elif change.successor is None or token.retired:
                    rows.delete(number)
                else:
                    rows.replace(number, change.successor, 0)
            answers.append(token)
        return answers


class Reserve(PoolChange[LeaseChange | None]):
    """Reserve a member, or end its reservation (None); the answer is None if there is no such member."""

    member: str
    reservation: Reservation | None
    replace: bool
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[LeaseChange | None]:
        """Reserve members that no other manager has reserved; with `replace`, all."""
        found = {token.member: (number, token) for number, token in rows.members() if not token.retired}
        answers: list[LeaseChange | None] = []
        changed: dict[int, PoolToken] = {}
        for change in changes:
            if change.member not in found:
                answers.append(None)
                continue
            number, token = found[change.member]
            earlier, later = rows.pool.reservation(token, rows.now), change.reservation
            if later is not None and earlier is not None and earlier.by != later.by and not change.replace:
                answers.append(LeaseChange(token, None))
                continue
            changed[number] = after = token._replace(reservation=later)
            found[change.member] = number, after
            answers.append(LeaseChange(token, after))
        rows.reserve(changed)
        return answers


class KeepAliveFree(PoolChange[int]):
    """Extend the life of at most `limit` tokens that have been free since before an instant."""

    before: Instant
    limit: int
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[int]:
        return [rows.extend_free(change.before, change.limit) for change in changes]


class PurgePool(PoolChange[int]):
    """Delete at most `limit` tokens that have expired, or were retired and whose lease is over.

    Requests whose leases have been over for long are deleted, too, and counted.
    """

    limit: int
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[int]:
        answers = []
        for change in changes:
            retired = rows.delete_retired(change.limit)
            count = retired + rows.delete_expired(change.limit - retired)
            answers.append(count + forget(rows, change.limit - count))
        return answers


class NoteLapsed(PoolChange[Lapsed]):
    """Note that leases lapsed since an instant, and delete lapsed places: at most `limit` of each, each once."""

    since: Instant
    limit: int
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[Lapsed]:
        answers = []
        for change in changes:
            found = rows.unlogged(change.since, change.limit)
            rows.update_leases({number: token._replace(leased_at=None) for number, token in found})
            requests = rows.requests()
            places = requests.lapsed(change.limit)
            requests.delete(places)
            answers.append(Lapsed([token for _, token in found], places))
        return answers


def forget(rows: PoolRows, limit: int) -> int:
    """Delete granted requests whose leases have been over for long enough; return how many were looked at."""
    requests = rows.requests()
    old = requests.old(limit)
    over = [request for request in old if request.leases is None]
    requests.delete(over)
    later = rows.now + REMEMBERED
    requests.update(
        replace(request, kept_until=later, leases=request.leases if running(rows, request) else None)
        for request in old
        if request.leases is not None
    )
    return len(old)


def running(rows: PoolRows, request: LeaseRequest) -> Sequence[PoolToken] | None:
    """Return the tokens of a granted request if all of its leases run; None if one is over."""
    found = rows.numbered(number for number, _ in request.leases or ())
    tokens = [token for number, token in found.items() if request.has(number, token) and token.is_leased(rows.now)]
    return tokens if tokens and len(tokens) == request.count else None
