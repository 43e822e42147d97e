"""The contract of every store, in sentences that `tests/contract` holds each of them to.

- Each method is one atomic step.
- Absence is an answer (None, False, 0, an empty list). StoreUnavailable means that the machine is broken.
- A method that wrote and returned has been made durable.
- No text that is kept has a NUL character in it.
- What depends on time takes `now`, in Unix seconds. A store that several machines write to may know better.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from tokenauth.clock import Clock
from tokenauth.models import ANY_LEASE, Failures, Instant, LeaseCheck, LeaseCursor, Pool, PoolCounts, PoolToken, Token


class TokenStore(Protocol):
    """Keeps tokens by the digest of their value."""

    async def add(self, token: Token, per_user: int, now: Instant) -> None:
        """Keep a token; if its user then has more than `per_user` live ones, the oldest of them end.

        0 is any number.
        """

    async def get(self, digest: bytes) -> Token | None:
        """Return the token with this digest, live or expired, unless it has been removed."""

    async def find(self, id: str) -> Token | None:
        """Return the token with this public id, live or expired, unless it has been removed."""

    async def remove(self, digest: bytes, now: Instant) -> bool:
        """End one token; False if there was none. Once this has returned, no `get` returns it."""

    async def remove_all(self, username: str | None, now: Instant, keep: bytes | None = None) -> int:
        """End all live tokens of a user, or of everybody, but the one with the digest `keep`; say how many."""

    async def list(self, username: str | None, now: Instant, limit: int) -> Sequence[Token]:
        """Return the live tokens of a user, or of everybody, newest first, `limit` at the most."""

    async def purge(self, now: Instant, limit: int) -> int:
        """Delete at most `limit` tokens that have expired, oldest first; say how many there were."""


class Feed(Protocol):
    """Says which tokens were removed, by whomever."""

    def sure(self) -> bool:
        """Say whether all news have come that must have come by now; while not, only the store is to be believed."""

    def news(self) -> Collection[bytes] | None:
        """Return the digests removed since this was last asked; None if some may have been missed.

        Raises StoreUnavailable when it cannot be known.
        """


class Lent(NamedTuple):
    """What came of asking for a token: the token, or when the next lease ends, if one does.

    `left` is how many more can be lent, for who asked for that.
    """

    token: PoolToken | None
    next_end: Instant | None = None
    left: int | None = None


class Touched(NamedTuple):
    """The token that was named, as it is now, and whether what was asked for has been done to it."""

    token: PoolToken
    done: bool


class PoolStore(Protocol):
    """Keeps the tokens that are lent, by pool and value. What has expired is absent, also while its row is there.

    Values and names of holders are printable text, and no value is ever used twice.
    """

    async def add(self, pool: Pool, values: Sequence[str], now: Instant) -> bool:
        """Add free tokens; False, and none is added, when the pool would have more than its capacity."""

    async def fit(self, pool: Pool, values: Sequence[str], now: Instant) -> int:
        """Bring a pool with `prefill` closer to its capacity; say how many values it still lacks, or 0.

        It is below 0 when there are so many tokens too many that they have not all been seen to yet. Free tokens that
        are too many go. Of lent ones the leases go on: so many as are too many are retired, and until they have ended
        as many free ones stay behind. Values are taken from `values` as far as they are needed.
        """

    async def lease(
        self, pool: Pool, holder: str, now: Instant, username: str | None = None, counted: bool = False
    ) -> Lent:
        """Lease the token that has been free longest to a user; `counted`: and say how many are left after this one."""

    async def extend(
        self, pool: Pool, value: str, now: Instant, claim: LeaseCheck = ANY_LEASE, free_too: bool = False
    ) -> Touched | None:
        """Let a lease run for its full time from now, if the claim holds; None if there is no such token.

        `free_too`: a token that is not lent waits for its full time from now.
        """

    async def extend_free(self, pool: Pool, before: Instant, now: Instant, limit: int) -> int:
        """Let free tokens wait for their full time from now: at most `limit` of those free since before an instant."""

    async def release(self, pool: Pool, value: str, now: Instant, claim: LeaseCheck = ANY_LEASE) -> Touched | None:
        """End a lease, if the claim holds; the token is free from now on. None if there is no such token."""

    async def release_next(self, pool: Pool, now: Instant, username: str | None = None) -> tuple[bool, int]:
        """End the lease of a user, or of anybody, that would end first; False if there is none.

        The number is how many tokens can be lent then, to anybody.
        """

    async def remove(self, pool: Pool, value: str, now: Instant, successor: str | None = None) -> bool:
        """Delete a token, free or lent; False if there was none. A `successor` takes its place, free from now on."""

    async def get(self, pool: Pool, value: str, now: Instant) -> PoolToken | None:
        """Return the token of this value."""

    async def count(self, pool: Pool, now: Instant) -> PoolCounts:
        """Say how many tokens can be lent, and how many are."""

    async def members(self, pool: Pool, now: Instant, after: str, limit: int) -> Sequence[PoolToken]:
        """Return tokens ordered by value, at most `limit`, from the first whose value comes after `after`."""

    async def leases(
        self, pool: Pool, now: Instant, after: LeaseCursor, limit: int
    ) -> Sequence[tuple[LeaseCursor, PoolToken]]:
        """Return at most `limit` leased tokens after a place, with their places, ordered by the end of their leases."""

    async def purge(self, pool: Pool, now: Instant, limit: int) -> int:
        """Delete at most `limit` tokens that have expired, oldest first; say how many there were."""


class Note(NamedTuple):
    """A change of what is kept of past logins under one key: of a count, and of the instant that goes with it."""

    key: bytes
    plus: int = 0
    """Added to the count, which never falls below 0."""
    expired: Instant = 0.0
    """What was last changed at or before this instant counts as 0."""
    at: Instant = 0.0
    """The instant becomes at least this ..."""
    later: float = 0.0
    """... and then so many seconds later, or earlier."""


class TakeBack(NamedTuple):
    """Failures that a successful login removes from the counts they were added to."""

    own: bytes
    """Counts the failures of the user at the place; becomes 0."""
    row: bytes | None
    """Loses as many as `own` had."""
    shares: Sequence[tuple[bytes, bytes]]
    """Pairs: a share of a bucket, and the bucket. The bucket loses what is left of the share; the share is emptied."""
    expired: Instant
    """`own` counts as 0 when it was last changed at or before this instant."""
    now: Instant


class FailureStore(Protocol):
    """Keeps what is remembered of past logins, by key; who is behind a key cannot be read from it."""

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Return what is kept under these keys; a key with nothing is left out."""

    async def note(self, notes: Sequence[Note], now: Instant) -> None:
        """Make all of these changes, in one step. Each key is named once."""

    async def take_back(self, failed: TakeBack) -> None:
        """Remove failures from the counts. What has been taken back once is not there a second time."""

    async def purge_failures(self, before: Instant, limit: int) -> int:
        """Delete at most `limit` keys whose instant is before this one; say how many there were."""


Hear = Callable[[Instant], object]
"""Is told what time it has been."""


def unheard(_: Instant) -> None:
    """Hear nothing."""


class Store(Protocol):
    """A place that keeps everything, and how to begin and end with it."""

    @property
    def clock(self) -> Clock:
        """What all who use this store agree is the time."""

    @property
    def tokens(self) -> TokenStore:
        """The tokens."""

    @property
    def pools(self) -> PoolStore:
        """The tokens that are lent."""

    @property
    def failures(self) -> FailureStore:
        """The failed logins."""

    async def start(self, hear: Hear = unheard) -> Instant:
        """Bring the schema up to date and connect; the answer is the latest `now` that is known to have been.

        From then on, and not before, `hear` is told of later ones that others have remembered, soon after they have,
        so that the caller can compare its own clock with the answer. Raises StartError
        when the schema is newer than this release or the store cannot be used.
        """

    async def stop(self, now: Instant) -> None:
        """Finish what is being written, remember `now`, and disconnect."""

    async def remember(self, now: Instant) -> None:
        """Let it be known that it has been `now`, to all who use this store."""

    async def ready(self) -> str | None:
        """Say what keeps the store from serving, if anything does."""

    async def claim(self, duty: str, now: Instant, until: Instant) -> bool:
        """Take on a duty until an instant, unless somebody has it."""

    async def purge_log(self, before: Instant, limit: int) -> int:
        """Delete at most `limit` entries of the revocation log older than an instant; say how many."""
