"""What a pool must be, kept in a dict by rules of its own: nothing here asks `Pool` for its arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from tests.support.servers import START
from tokenauth.models import ForcedEnd, LeaseCheck, Pool, PoolToken
from tokenauth.stores.changes.forced_ends import KEPT


@dataclass
class Model:
    """The tokens by value, also those that have expired, and what time it is."""

    pool: Pool
    now: float = START
    made: list[str] = field(default_factory=list)
    there: dict[str, PoolToken] = field(default_factory=dict)
    forced_ends: dict[str, tuple[float, ForcedEnd]] = field(default_factory=dict)

    def new_values(self, count: int) -> list[str]:
        """Return values whose order is arbitrary."""
        start = len(self.made)
        self.made += [sha256(b"%d" % number).hexdigest()[:6] for number in range(start, start + count)]
        return self.made[start:]

    def end(self, token: PoolToken) -> float:
        """Return when a token expires if nothing changes it."""
        if token.holder is None:
            return token.free_at + self.pool.token_ttl
        aged = self.pool.lease_ttl if self.pool.ages_while_leased else 0
        return token.free_at + max(self.pool.reclaim_delay, self.pool.token_ttl - aged)

    def free_again(self, token: PoolToken) -> float:
        """Return when a leased token can be leased again if its lease lapses."""
        return token.free_at + (0 if token.holder is None else self.pool.reclaim_delay)

    def taken(self) -> list[PoolToken]:
        """Return the tokens that count as leased: also those whose lease has just lapsed."""
        return [token for token in self.there.values() if self.now < self.free_again(token)]

    def leased(self) -> list[PoolToken]:
        """Return the leased tokens, ordered by the end of their lease."""
        return sorted(
            (token for token in self.there.values() if self.now < token.free_at), key=lambda token: token.free_at
        )

    def free(self) -> list[PoolToken]:
        """Return the free tokens, the one that has been free longest first."""
        free = (token for token in self.there.values() if self.free_again(token) <= self.now < self.end(token))
        return sorted((token for token in free if not token.retired), key=lambda token: token.free_at)

    def retired(self) -> list[PoolToken]:
        """Return the tokens that count as leased, and are deleted then."""
        return [token for token in self.taken() if token.retired]

    def live(self) -> list[PoolToken]:
        """Return the live tokens, by value. A retired one is live during its lease only."""
        waiting = [token for token in self.taken() if token.free_at <= self.now and not token.retired]
        return sorted(self.leased() + waiting + self.free(), key=lambda token: token.value)

    def dead(self) -> int:
        """Return how many tokens neither count as leased nor are free."""
        return len(self.there) - len(self.taken()) - len(self.free())

    def available(self) -> int:
        """Return how many tokens can be leased."""
        return max(0, len(self.free()) - len(self.retired()))

    def leasable(self, count: int) -> list[float]:
        """Return since when the tokens that are leased next have been free."""
        return [token.free_at for token in self.free()[: min(count, self.available())]]

    def pick(self, number: int) -> str:
        """Choose a token; from 7 on one that may be gone, or may never have existed."""
        live = [token.value for token in self.live()]
        return live[number % len(live)] if live and number < 7 else self.made[-number % len(self.made)]

    def find(self, value: str) -> PoolToken | None:
        """Return the live token with this value."""
        return next((token for token in self.live() if token.value == value), None)

    def holds(self, token: PoolToken, check: LeaseCheck) -> bool:
        """Return whether the check matches the lease of a token."""
        expected = {"holder": check.holder, "fence": check.fence, "username": check.username}
        wrong = [key for key, value in expected.items() if value not in {None, getattr(token, key)}]
        return self.now < token.free_at and not wrong

    def put(self, *changed: PoolToken) -> None:
        """Store changed tokens."""
        self.there.update((token.value, token) for token in changed)

    def add(self, values: Sequence[str]) -> None:
        """Store new tokens."""
        self.put(*(PoolToken(self.pool.name, value, self.now) for value in values))

    def freed(self, token: PoolToken) -> PoolToken:
        """Return a token after its release."""
        return token._replace(free_at=self.now, holder=None, username=None, leased_at=None)

    def end_by_force(self, token: PoolToken, reason: str | None, taken: bool) -> None:
        """Note that the manager `ops` has ended the lease of a token."""
        end = ForcedEnd(token.fence, token.username, token.holder or "", "ops", reason, taken)
        self.forced_ends[token.value] = self.now, end

    def forget_forced_ends(self) -> None:
        """Forget, as each attempt to end a lease by force does, what is older than a day."""
        kept = {value: (at, end) for value, (at, end) in self.forced_ends.items() if at >= self.now - KEPT}
        self.forced_ends = kept

    def forced_end(self, value: str) -> ForcedEnd | None:
        return self.forced_ends[value][1] if value in self.forced_ends else None

    def lease(self, got: PoolToken, holder: str, leasable: list[float], user: str | None = None) -> None:
        """Lease a token, and check that it may be leased."""
        token = self.there[got.value]
        assert token in self.free(), f"not free: {token}"
        assert token.free_at in leasable, f"another token has been free longer: {token}"
        assert got == token._replace(
            free_at=self.now + self.pool.lease_ttl,
            holder=holder,
            fence=token.fence + 1,
            username=user,
            leased_at=self.now,
        )
        self.put(got)
        assert self.pool.capacity is None or len(self.taken()) <= self.pool.capacity, "more leases than the capacity"

    def forget(self, count: int) -> None:
        """Delete this many expired tokens."""
        dead = self.there.keys() - {token.value for token in self.taken() + self.free()}
        for value in sorted(dead, key=lambda value: self.there[value].free_at)[:count]:
            del self.there[value]

    def edges(self) -> list[float]:
        """Return the instants at which leases and tokens end."""
        ends = [at for token in self.there.values() for at in (token.free_at, self.free_again(token), self.end(token))]
        return sorted(end for end in ends if self.now < end < math.inf)
