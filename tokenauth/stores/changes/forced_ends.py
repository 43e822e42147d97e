"""Leases that a manager ends, and who did it, and why: kept for the client that had the lease."""

import json
from collections.abc import Sequence
from typing import Self

from tokenauth.models import ForcedEnd, LeaseChange, LeaseCheck
from tokenauth.stores.changes.pool_rows import PoolRows
from tokenauth.stores.changes.pools import PoolChange

KEPT = 86400.0
"""Seconds for which it is kept who has ended a lease."""


class ForceEnd(PoolChange[LeaseChange | None]):
    """End the lease of a token if its check matches, or take it over; the answer is None if there is no such token."""

    value: str
    check: LeaseCheck
    by: str
    reason: str | None
    holder: str | None
    """Under which name the manager takes it over; None if not."""
    shares_pool = False

    @classmethod
    def make_in_pool(cls, rows: PoolRows, changes: Sequence[Self]) -> Sequence[LeaseChange | None]:
        """End the leases one after the other: they are few."""
        rows.forget_forced_ends(rows.now - KEPT)
        return [change._make(rows) for change in changes]

    def _make(self, rows: PoolRows) -> LeaseChange | None:
        number, token = rows.find([self.value]).get(self.value, (0, None))
        if token is None:
            return None
        if token.holder is None or not self.check.matches(token, rows.now):
            return LeaseChange(token, None)
        if self.holder is None:
            after = rows.pool.released(token, rows.now)
        else:
            after = rows.pool.leased(token, self.holder, self.by, rows.now)
        rows.update_leases({number: after})
        end = ForcedEnd(token.fence, token.username, token.holder, self.by, self.reason, self.holder is not None)
        rows.keep_forced_end(self.value, json.dumps(end))
        return LeaseChange(token, after)
