"""The nouns of the service and their arithmetic: no input, no output."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import NamedTuple, Protocol

Instant = float
"""Unix seconds."""

Clock = Callable[[], Instant]
"""Says what time it is. Production passes `time.time`."""

steady: Clock = partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
"""A clock that nobody sets, and that goes on while the machine sleeps: Linux's `time.monotonic` does not."""

ID_BYTES = 12
"""So many leading bytes of a token's digest are its public id."""


def is_scope(word: str) -> bool:
    """Whether a word can be a scope: printable ASCII with no blank, quote or backslash (RFC 6749 section 3.3)."""
    return re.fullmatch(r"[\x21\x23-\x5b\x5d-\x7e]+", word) is not None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sent a request, as a guarded app sees it: nobody has an empty name.

    Starlette's `request.user` and `request.auth`, and so its `@requires`, take it for theirs.
    """

    username: str
    scopes: tuple[str, ...] = ()

    @property
    def is_authenticated(self) -> bool:
        """Whether this is anybody."""
        return self.username != ""

    @property
    def display_name(self) -> str:
        """The name, to be shown."""
        return self.username

    @property
    def identity(self) -> str:
        """The name, to be compared."""
        return self.username


NOBODY = Identity("")
"""Who sends a request that no token is asked for."""


@dataclass(frozen=True, slots=True)
class User:
    """A name that may log in; it stands in the configuration."""

    username: str
    password_hash: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    credential: str = field(init=False, repr=False)
    identity: Identity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive the fingerprint by which a token remembers this password, and what others see of the user."""
        fingerprint = sha256(self.password_hash.encode()).hexdigest()[:16]
        object.__setattr__(self, "credential", fingerprint)
        object.__setattr__(self, "identity", Identity(self.username, self.scopes))


class Token(NamedTuple):
    """A login that can be proved. Its value is known to whoever logged in, and to nobody else.

    `expires_at` is a whole second, so that the number which clients are shown is the number that is enforced.
    A tuple, because one is made for each look-up, and a row of a database is one already.
    """

    digest: bytes
    username: str
    credential: str
    issued_at: Instant
    expires_at: int
    address: str = ""
    user_agent: str = ""

    @property
    def id(self) -> str:
        """The public name of this token: it identifies, and proves nothing."""
        return public_id(self.digest)

    def __repr__(self) -> str:
        """Show what may stand in a log."""
        return f"Token(id={self.id!r}, username={self.username!r}, expires_at={self.expires_at!r})"


class Login(NamedTuple):
    """A token that is valid, and whose it is."""

    user: Identity
    token: Token


class Validator(Protocol):
    """Whoever can say whether a token is valid: the service itself, or a client that asks it."""

    async def identify(self, value: bytes) -> Login | None:
        """Return whose token this is; None for one that is not valid. Raises Refusal when that cannot be known."""


def public_id(digest: bytes) -> str:
    """Name a token by the beginning of its digest: 24 hexadecimal digits."""
    return digest[:ID_BYTES].hex()


@dataclass(frozen=True, slots=True)
class Issued:
    """What a login returns, once: after it nobody can learn `value` again."""

    value: str = field(repr=False)
    token: Token


@dataclass(frozen=True, slots=True)
class Pool:
    """The terms on which tokens are lent; they stand in the configuration, and hold as they are now.

    A token waits for at most `token_ttl` seconds until somebody takes it, and is lent for `lease_ttl` seconds.
    `capacity` is how many tokens may be in being, free and lent; with `prefill` always so many are.
    Users with `manage_scope` see and change what is others'.
    `ages_while_lent`: the time for which a token was lent, and not given back, counts as time that it has waited.
    """

    name: str
    lease_ttl: float
    token_ttl: float = math.inf
    capacity: int | None = None
    prefill: bool = False
    scope: str | None = None
    manage_scope: str = "admin"
    ages_while_lent: bool = False

    def managed_by(self, user: Identity) -> bool:
        """Whether the user may generate, delete and see all tokens, and end leases of others."""
        return self.manage_scope in user.scopes

    def floor(self, now: Instant) -> Instant:
        """Say since when a token may have been free, at the latest, to have expired `now`."""
        return now - self.token_ttl

    def lapsed_floor(self, now: Instant) -> Instant:
        """Say the same of a token that was not given back: its lease lapsed. While it is lent it does not expire."""
        return min(now, self.floor(now) + (self.lease_ttl if self.ages_while_lent else 0))

    def lives(self, token: "PoolToken", now: Instant) -> bool:
        """Whether a token is in being: lent, or free and not yet expired."""
        if token.is_leased(now):
            return True
        floor = self.floor(now) if token.holder is None else self.lapsed_floor(now)
        return not token.retired and floor < token.free_at

    def leased(self, token: "PoolToken", holder: str, username: str | None, now: Instant) -> "PoolToken":
        """Return the token as it is leased from `now` on."""
        return token.changed(now + self.lease_ttl, holder, token.fence + 1, username)

    def extended(self, token: "PoolToken", now: Instant) -> "PoolToken":
        """Return a token that is lent, with its lease running anew; it never ends earlier than it was to."""
        return token.changed(max(token.free_at, now + self.lease_ttl), token.holder, token.fence, token.username)

    def released(self, token: "PoolToken", now: Instant) -> "PoolToken":
        """Return a token that is free from `now` on."""
        return token.changed(now, None, token.fence, None)

    def expires_at(self, token: "PoolToken") -> Instant | None:
        """Say when a token is gone unless somebody touches it before; None: never."""
        if token.retired:
            return token.free_at
        if math.isinf(self.token_ttl):
            return None
        aged = self.lease_ttl if self.ages_while_lent and token.holder is not None else 0
        return token.free_at + max(0, self.token_ttl - aged)


class PoolToken(NamedTuple):
    """A permit that waits in a pool, or is lent.

    `free_at` is when it became free, or will: a lease is over the moment its time is up, and a token that has
    been free for too long has expired. Nothing has to notice: the same row simply reads so from then on.
    `fence` counts its leases. A `retired` token is not lent again. `username` is whose the latest lease is; None: the
    lease was granted without a login, by a dialect.
    """

    pool: str
    value: str
    free_at: Instant
    holder: str | None = None
    fence: int = 0
    retired: bool = False
    username: str | None = None

    def is_leased(self, now: Instant) -> bool:
        """Return whether it is under a lease."""
        return self.holder is not None and now < self.free_at

    def lease(self, now: Instant) -> "Lease | None":
        """Return the claim that somebody has on it, if anybody does."""
        return Lease(self.holder, self.free_at) if self.holder is not None and now < self.free_at else None

    def changed(self, free_at: Instant, holder: str | None, fence: int, username: str | None) -> "PoolToken":
        """Return the token with another lease, or none; each write does so, and `_replace` takes thrice the time."""
        return PoolToken(self.pool, self.value, free_at, holder, fence, self.retired, username)

    def __repr__(self) -> str:
        """Show what may stand in a log: a permit must not leak through one."""
        return f"PoolToken(pool={self.pool!r}, free_at={self.free_at!r}, holder={self.holder!r}, fence={self.fence!r})"


class Lease(NamedTuple):
    """One holder's claim on a token, until an instant."""

    holder: str
    until: Instant


Place = tuple[Instant, int]
"""Where a lease is in the list of leases: when it ends, and the number of its row."""

FIRST: Place = (0.0, 0)
"""The place before all leases."""


class Claim(NamedTuple):
    """What a caller knows of its lease, and the user that it is logged in as; what is None is not compared."""

    holder: str | None = None
    fence: int | None = None
    username: str | None = None

    def holds(self, token: PoolToken, now: Instant) -> bool:
        """Whether this is the lease that the token is under."""
        return (
            token.is_leased(now)
            and self.owns(token)
            and (self.holder is None or self.holder == token.holder)
            and (self.fence is None or self.fence == token.fence)
        )

    def owns(self, token: PoolToken) -> bool:
        """Whether the token's latest lease is this user's."""
        return self.username is None or self.username == token.username


ANY_LEASE = Claim()
"""The claim of somebody who does not say which lease he has."""


class PoolCounts(NamedTuple):
    """How many tokens of a pool can be lent, and how many are."""

    available: int
    leased: int


@dataclass(frozen=True, slots=True)
class Failures:
    """What is kept of past logins under one key: logins that failed in a row, and when the last of them did.

    Or, under other keys, no count and an instant until which something holds (see `tokenauth.throttle`).
    """

    count: int
    last_at: Instant


LEAP = 1.0
"""Seconds by which a clock must have run ahead for others to be told."""


class ForwardClock:
    """A clock that never goes back.

    When `wall` is set back, time goes on from where it was at the pace of `ticks`, a clock that nobody
    can set, so that nothing which had expired is valid again and nothing lives longer than it should.
    What `wall` leaps ahead is told to `leapt`: others who share a store must not be behind.
    """

    def __init__(self, wall: Clock, ticks: Clock) -> None:
        self._wall = wall
        self._ticks = ticks
        self._offset = wall() - ticks()
        self.leapt: Callable[[Instant], object] | None = None

    def __call__(self) -> Instant:
        """Read the time, in Unix seconds; never less than any time that was read before."""
        now = self._wall()
        floor = self._ticks() + self._offset
        if now < floor:
            return floor
        self._offset += now - floor
        if now - floor > LEAP and self.leapt is not None:
            self.leapt(now)
        return now

    def advance(self, instant: Instant) -> float:
        """Never again say less than `instant`; the answer is by how many seconds `wall` was behind it."""
        behind = instant - self()
        if behind > 0:
            self._offset += behind
        return max(behind, 0.0)
