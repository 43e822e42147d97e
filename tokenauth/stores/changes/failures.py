"""Changes to the counts of failed logins."""

from collections import ChainMap
from collections.abc import Sequence
from operator import itemgetter
from typing import Self

from sqlalchemy import Float, Integer, LargeBinary, bindparam, select, text, update

from tokenauth.models import CountUpdate, Failures, Instant, ShareUpdate
from tokenauth.stores.engine import Change, Transaction
from tokenauth.stores.sql import delete_oldest
from tokenauth.stores.tables import failures

_UPDATE = text("""
    INSERT INTO failures (key, count, last_at)
    VALUES (:key, CASE WHEN :increment > 0 THEN :increment ELSE :initial END, :at + :shift)
    ON CONFLICT (key) DO UPDATE SET
        count = CASE
            WHEN failures.last_at <= :cutoff THEN excluded.count
            WHEN failures.count + :increment < 0 THEN 0
            ELSE failures.count + :increment
        END,
        last_at = CASE WHEN failures.last_at > :at THEN failures.last_at ELSE :at END + :shift
""").bindparams(
    bindparam("increment", type_=Integer),
    bindparam("initial", type_=Integer),
    bindparam("at", type_=Float),
    bindparam("shift", type_=Float),
    bindparam("cutoff", type_=Float),
)
_UPDATE_SHARE = text("""
    INSERT INTO failures (key, count, last_at)
    SELECT :key, bucket.count, :at + :shift FROM failures AS bucket WHERE bucket.key = :bucket
    ON CONFLICT (key) DO UPDATE SET
        count = excluded.count,
        last_at = CASE
            WHEN failures.count = excluded.count AND failures.last_at > :at THEN failures.last_at
            ELSE :at
        END + :shift
""").bindparams(
    bindparam("key", type_=LargeBinary),
    bindparam("bucket", type_=LargeBinary),
    bindparam("at", type_=Float),
    bindparam("shift", type_=Float),
)
_LOCK = (
    select(failures.c.key, failures.c.count, failures.c.last_at)
    .where(failures.c.key == bindparam("wanted"))
    .with_for_update()
)
_SET = (
    update(failures)
    .where(failures.c.key == bindparam("wanted"))
    .values(count=bindparam("number"), last_at=bindparam("until"))
)
_PURGE = delete_oldest(failures.c.key, failures.c.last_at, failures.c.last_at < bindparam("before"))


class UpdateFailures(Change[None]):
    """Update several counts and then shares, each key at most once."""

    updates: Sequence[CountUpdate]
    shares: Sequence[ShareUpdate] = ()

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[None]:
        """Update in the order of the keys, and shares last, so that no two transactions deadlock."""
        updates = [update._asdict() for change in changes for update in change.updates]
        db.execute_each(_UPDATE, sorted(updates, key=itemgetter("key")))
        shares = [share._asdict() for change in changes for share in change.shares]
        if shares:
            db.execute_each(_UPDATE_SHARE, sorted(shares, key=itemgetter("key")))
        return [None] * len(changes)


class RefundFailures(Change[None]):
    """Remove the failures that a successful login refunds from all counts they were added to."""

    own: bytes
    """Key of the failures in a row of the name at the location. The count becomes 0."""
    streak: bytes | None
    """Key of the failures in a row of the name in its network. The count falls by what `own` had."""
    shares: Sequence[tuple[bytes, bytes]]
    """Keys of a share and of its bucket. The bucket loses what the share still holds, and the share becomes empty.

    A share whose count is not that of the bucket is from before the bucket was cleared: nothing of it is left.
    """
    cutoff: Instant
    """`own` counts as 0 if it was last changed at or before this instant."""

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[None]:
        """Remove exactly the failures that are stored, read under a lock."""
        wanted, shares = set[bytes](), set[bytes]()
        for change in changes:
            wanted.update([change.own], [] if change.streak is None else [change.streak])
            wanted.update(bucket for _, bucket in change.shares)
            shares.update(share for share, _ in change.shares)
        # in the order in which UpdateFailures locks them
        locked = db.rows_each(_LOCK, [{"wanted": key} for key in (*sorted(wanted), *sorted(shares))])
        found = {key: Failures(count, last_at) for key, count, last_at in locked}
        changed: dict[bytes, Failures] = {}
        for change in changes:
            kept = ChainMap(changed, found)
            own = kept.get(change.own)
            if own is not None:
                changed[change.own] = Failures(0, own.last_at)
                streak = None if change.streak is None or own.last_at <= change.cutoff else kept.get(change.streak)
                if change.streak is not None and streak is not None:
                    changed[change.streak] = Failures(max(0, streak.count - own.count), streak.last_at)
            for share, bucket in change.shares:
                if share not in kept or bucket not in kept or kept[share].count != kept[bucket].count:
                    continue
                left = kept[share].last_at - change.now
                full = kept[bucket].last_at - change.now
                if left > 0:
                    changed[share] = Failures(kept[share].count, change.now)
                    changed[bucket] = Failures(kept[bucket].count, change.now + max(0.0, full - left))
        db.execute_each(
            _SET,
            [{"wanted": key, "number": each.count, "until": each.last_at} for key, each in sorted(changed.items())],
        )
        return [None] * len(changes)


class PurgeFailures(Change[int]):
    """Delete at most `limit` keys whose instant is before an instant."""

    before: Instant
    limit: int

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[int]:
        return [db.execute(_PURGE, {"before": change.before, "limit": change.limit}) for change in changes]
