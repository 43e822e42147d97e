"""The records of the service and their arithmetic. No I/O."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from operator import attrgetter
from typing import Generic, Literal, NamedTuple, Protocol, Self, TypeVar

from tokenauth.errors import InsufficientScope

T = TypeVar("T")

TokenKind = Literal["login", "named"]
"""The kinds of tokens that users have."""

Instant = float
"""Unix seconds."""

LATE_USE = 60
"""Seconds after the end of a token in which a use of before can still extend it: uses are written later.

So the sweeper keeps a token for that time, and revoking all tokens of a user includes those that could be extended.
"""

ID_BYTES = 12
"""Length of a token's public id: that many leading bytes of its digest."""

SCOPE_PATTERN = r"[\x21\x23-\x5b\x5d-\x7e]+"

NAME_PATTERN = r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,64}"
"""The form of the names of pools and members. They need no encoding in a URL."""

ADMIN = "admin"
"""The scope that may act for other users, and see how the service does."""


_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff"  # default ignorable
    "\u2800\U00013441\U00013442\U00016fe4\U0001d159]"  # blank
)
"""Characters that Unicode calls letters, marks or symbols, and that show nothing or a blank.

The first are all of Default_Ignorable_Code_Point (DerivedCoreProperties.txt) that `str.isprintable` accepts.
"""


def is_visible(text: str) -> bool:
    """Return whether each character of a text is a space or shows something: nothing in it is hidden."""
    return text.isprintable() and not _BLANK.search(text)


def is_scope(word: str) -> bool:
    """Return whether a word is a valid scope: printable ASCII without blank, quote or backslash (RFC 6749 §3.3)."""
    return re.fullmatch(SCOPE_PATTERN, word) is not None


def is_plain_scope(word: str) -> bool:
    """Return whether an answer may repeat a scope that no user has: it is short and plain, like a mistyped name.

    Proxies and clients log answers. The length excludes tokens, halves of them, UUIDs, and most other secrets.
    """
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9._:/-]{0,29}", word) is not None


@dataclass(frozen=True, slots=True)
class Identity:
    """The user a request is authenticated as.

    It has what Starlette expects of `request.user` and `request.auth`, so `@requires` works with it.
    """

    username: str
    scopes: tuple[str, ...] = ()

    @property
    def is_authenticated(self) -> bool:
        return self.username != ""

    @property
    def display_name(self) -> str:
        return self.username

    @property
    def identity(self) -> str:
        return self.username

    def limited_to(self, scopes: Collection[str]) -> "Identity":
        """Return the same user with only those of their scopes that are in `scopes`."""
        return Identity(self.username, tuple(scope for scope in self.scopes if scope in scopes))

    def require_scope(self, scope: str) -> None:
        """Raise InsufficientScope unless the user has the scope."""
        if scope not in self.scopes:
            raise InsufficientScope(scope)


ANONYMOUS = Identity("")
"""The identity of a request that needs no token."""

DATABASE_LOST = "lost"
"""The identity of a database that was moved, deleted or replaced. No database has it."""

PUT_DATABASE_BACK = (
    "put it back, then restart tokenauth: a restart without it begins an empty database, and all logins, leases and"
    " fences are gone"
)
"""What to do when the file of a running server is missing."""


@dataclass
class DatabaseReport:
    """What a look at a database has found.

    problem: why it cannot be read or written. schema: its revision; None if it is empty.
    written_at: the latest time written to it. network: the kind of its file system, if that is on another machine.
    clock_ahead: seconds by which the clock of its machine is ahead of this one's.
    others: tables of other programs.
    """

    name: str
    exists: bool = True
    problem: str | None = None
    schema: str | None = None
    written_at: float | None = None
    network: str | None = None
    clock_ahead: float = 0.0
    others: Sequence[str] = ()


class ServedDatabase(NamedTuple):
    """The database that a server has been serving, for a worker that starts later."""

    identity: str
    """What `Engine.identity` of the earlier workers says."""

    required: bool
    """Whether the start fails without it. Otherwise it succeeds, and every operation raises StoreUnavailable."""


class FileLine(NamedTuple):
    """A line of a file."""

    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}"


@dataclass(frozen=True, slots=True)
class User:
    """A name that may log in, as the configuration defines it.

    origin: the place in another file than the configuration.
    credential: a fingerprint of the password hash. Tokens keep it, so they end when the password changes.
    named_credential: what new named tokens keep: the same, or "" if they outlive a change of the password.
    credentials: both. A token with any other is not valid.
    """

    username: str
    password_hash: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    named_tokens_end_with_password: bool = True
    origin: FileLine | None = field(default=None, compare=False)
    credential: str = field(init=False, repr=False)
    named_credential: str = field(init=False, repr=False)
    credentials: tuple[str, str] = field(init=False, repr=False)
    identity: Identity = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fingerprint = sha256(self.password_hash.encode()).hexdigest()[:16]
        object.__setattr__(self, "credential", fingerprint)
        object.__setattr__(self, "named_credential", fingerprint if self.named_tokens_end_with_password else "")
        object.__setattr__(self, "credentials", (self.credential, self.named_credential))
        object.__setattr__(self, "identity", Identity(self.username, self.scopes))


class Token(NamedTuple):
    """A proof of login, or a named token that its user made for a program. Only the digest of its value is kept.

    This is a tuple because every lookup makes one, and a database row already is one.

    expires_at: when it ends: a whole second, so the time that clients see is exactly the time that is enforced.
    max_expires_at: the latest time to which its use can move `expires_at`; None if its lifetime is fixed. A named token
        that was rotated has its end here, too.
    used_at: the last use that was noted; `issued_at` if none was.
    address, user_agent: who asked for it.
    name: None for a login.
    scopes: what it is limited to; None is no limit. What it may do is decided at each use: see `Tokens.owner`.
    """

    digest: bytes
    username: str
    credential: str
    issued_at: Instant
    expires_at: int
    max_expires_at: int | None
    used_at: Instant
    address: str = ""
    user_agent: str = ""
    name: str | None = None
    scopes: tuple[str, ...] | None = None

    @classmethod
    def new(
        cls,
        digest: bytes,
        username: str,
        credential: str,
        issued_at: Instant,
        expires_at: int,
        address: str = "",
        user_agent: str = "",
        *,
        max_expires_at: int | None = None,
        name: str | None = None,
        scopes: tuple[str, ...] | None = None,
    ) -> Self:
        """Return a token that has not been used yet. Without `max_expires_at`, its lifetime is fixed."""
        return cls(
            digest,
            username,
            credential,
            issued_at,
            expires_at,
            max_expires_at,
            issued_at,
            address,
            user_agent,
            name,
            scopes,
        )

    @property
    def is_extendable(self) -> bool:
        """Whether use can move `expires_at`."""
        return self.max_expires_at is not None and self.expires_at < self.max_expires_at

    @property
    def last_used_at(self) -> Instant | None:
        """When a use was last noted; None if none was since its issue."""
        return self.used_at if self.used_at > self.issued_at else None

    @property
    def kind(self) -> TokenKind:
        return "login" if self.name is None else "named"

    @property
    def id(self) -> str:
        """The public id: it names the token and cannot be used as one."""
        return public_id(self.digest)

    def __repr__(self) -> str:
        return f"Token(id={self.id!r}, username={self.username!r}, expires_at={self.expires_at!r})"


class Login(NamedTuple):
    """A valid token and the user it belongs to."""

    user: Identity
    token: Token


class Validator(Protocol):
    """Checks tokens: the service itself, or a client of it."""

    async def identify(self, value: bytes) -> Login | None:
        """Return the login that a token value proves, or None if the token is not valid.

        Raises Refusal if the token cannot be checked now.
        """


def public_id(digest: bytes) -> str:
    """Return the public id of a token: the first 24 hexadecimal digits of its digest."""
    return digest[:ID_BYTES].hex()


class Use(NamedTuple):
    """A use of a token that is to be written to the store.

    used_at: when it was used.
    end: the time to which `expires_at` moves, unless `max_expires_at` is earlier; None: it does not move.
    stale: written if the last use that the store knows is not after this.
    needed: also written if the token can be extended and ends before this.
    """

    digest: bytes
    used_at: Instant
    end: int | None
    stale: Instant
    needed: Instant


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """The result of a login. It is the only place where `value` exists: it cannot be read again later."""

    value: str = field(repr=False)
    token: Token


class Member(NamedTuple):
    """The token of one thing with a name, such as a device, as the configuration defines it."""

    name: str
    labels: tuple[str, ...] = ()
    note: str = ""

    def has(self, labels: Collection[str]) -> bool:
        """Return whether each of `labels` is a label of this member, or its name."""
        return all(label in self.labels or label == self.name for label in labels)


@dataclass(frozen=True, slots=True)
class Pool:
    """The settings of a pool. They apply to all of its tokens, also to those made under earlier settings.

    lease_ttl: seconds that a lease lasts, unless its request asks for less.
    lease_max: seconds after its start in which a lease ends, however often it is kept alive.
    token_ttl: seconds that a token stays free before it expires.
    reclaim_delay: seconds after a lease lapsed in which its token is not leased again. Until then it counts as leased.
    per_user: maximum number of tokens that one user leases; None is no limit.
    members: the only tokens that the pool has, by name. Without any, its tokens are generated.
    capacity: maximum number of live tokens (free + leased); None is no limit.
    prefill: always keep the pool at its capacity.
    scope: needed to use the pool.
    manage_scope: needed to generate, delete and list all tokens, and to end leases of other users.
    log_leases: log each lease and each release; what lapses is logged in any case.
    ages_while_leased: the time of a lease that *lapsed* (ended by itself, not by a release) counts towards `token_ttl`.
    """

    name: str
    lease_ttl: float
    token_ttl: float = math.inf
    capacity: int | None = None
    prefill: bool = False
    scope: str | None = None
    manage_scope: str = ADMIN
    ages_while_leased: bool = False
    lease_max: float = math.inf
    reclaim_delay: float = 0
    per_user: int | None = None
    log_leases: bool = False
    members: Mapping[str, Member] = field(default_factory=dict, hash=False)

    @property
    def is_selective(self) -> bool:
        """Whether a user may be unable to lease a token that is free."""
        return bool(self.members) or self.per_user is not None

    def managed_by(self, user: Identity) -> bool:
        return self.manage_scope in user.scopes

    def cutoff(self, now: Instant) -> Instant:
        """Return the expiry cutoff: tokens that have been free since then or earlier have expired."""
        return now - self.token_ttl

    def lapsed_cutoff(self, now: Instant) -> Instant:
        """Return the expiry cutoff of tokens whose last lease lapsed.

        A token never expires during its lease, nor before it can be leased again.
        """
        return min(self.reclaim_cutoff(now), self.cutoff(now) + (self.lease_ttl if self.ages_while_leased else 0))

    def reclaim_cutoff(self, now: Instant) -> Instant:
        """Return the cutoff of `reclaim_delay`: tokens whose lease lapsed then or earlier can be leased again."""
        return now - self.reclaim_delay

    def is_taken(self, token: "PoolToken", now: Instant) -> bool:
        """Return whether a token counts as leased: its lease lasts, or lapsed less than `reclaim_delay` ago."""
        return token.holder is not None and self.reclaim_cutoff(now) < token.free_at

    def is_free(self, token: "PoolToken", now: Instant) -> bool:
        """Return whether a token can be leased by anyone or, if it is reserved, by the user it is reserved for."""
        known = not self.members or token.member in self.members
        return known and not self.is_taken(token, now) and self.is_live(token, now)

    def can_lease(self, token: "PoolToken", username: str | None, labels: Collection[str], now: Instant) -> bool:
        """Return whether a user can lease this token if they ask for `labels`. `per_user` is not considered."""
        if not self.is_free(token, now) or not self.has(token, labels):
            return False
        reservation = self.reservation(token, now)
        return reservation is None or (username is not None and reservation.username == username)

    def reservation(self, token: "PoolToken", now: Instant) -> "Reservation | None":
        """Return the reservation of a member, also if the member is still leased."""
        found = token.reservation if token.member in self.members else None
        return found if found is not None and now < found.until else None

    def next_free_at(self, members: "Iterable[PoolToken]", username: str | None, now: Instant) -> Instant | None:
        """Return when a user can lease the first of these members, if nothing changes before."""
        instants = []
        for token in members:
            if not token.retired and token.member in self.members:
                free_at = token.free_at if token.holder is None else token.free_at + self.reclaim_delay
                reservation = self.reservation(token, now)
                if reservation is not None and (username is None or reservation.username != username):
                    free_at = max(free_at, reservation.until)
                instants.append(free_at)
        return min(instants, default=None)

    def count(self, tokens: "Iterable[PoolToken]", now: Instant) -> "MemberCounts":
        """Count members: those that anyone can lease, those that count as leased, and those that are reserved."""
        free = leased = reserved = 0
        for token in tokens:
            if self.is_taken(token, now):
                leased += 1
            elif self.is_free(token, now):
                if self.reservation(token, now) is None:
                    free += 1
                else:
                    reserved += 1
        return MemberCounts(free, leased, reserved)

    def has(self, token: "PoolToken", labels: Collection[str]) -> bool:
        """Return whether a token is a member with all of these labels. A token without a name has no label."""
        member = None if token.member is None else self.members.get(token.member)
        return not labels if member is None else member.has(labels)

    def matching(self, labels: Collection[str]) -> float:
        """Return how many tokens with these labels the pool can have at most."""
        if self.members:
            return sum(member.has(labels) for member in self.members.values())
        return 0 if labels else math.inf if self.capacity is None else self.capacity

    def is_live(self, token: "PoolToken", now: Instant) -> bool:
        """Return whether a token is leased, or free and not expired."""
        if token.holder is not None and now < token.free_at:  # a call takes twice as long
            return True
        cutoff = self.cutoff(now) if token.holder is None else self.lapsed_cutoff(now)
        return not token.retired and cutoff < token.free_at

    def duration(self, ttl: float | None) -> float:
        """Return how many seconds a new lease lasts, if it is not kept alive; `ttl` None is `lease_ttl`."""
        return min(self.lease_ttl if ttl is None else ttl, self.lease_max)

    def leased(
        self, token: "PoolToken", holder: str, username: str | None, now: Instant, ttl: float | None = None
    ) -> "PoolToken":
        """Return the token with a new lease that starts now, and lasts `ttl` seconds instead of `lease_ttl`."""
        return token.changed(now + self.duration(ttl), holder, token.fence + 1, username, now, ttl)

    def extended(self, token: "PoolToken", now: Instant) -> "PoolToken":
        """Return the token with its lease extended to its full time from now: not past `lease_max`, never shortened."""
        start = now if token.leased_at is None else token.leased_at
        ttl = self.lease_ttl if token.lease_ttl is None else token.lease_ttl
        end = max(token.free_at, min(now + ttl, start + self.lease_max))
        return token.changed(end, token.holder, token.fence, token.username, start, token.lease_ttl)

    def released(self, token: "PoolToken", now: Instant) -> "PoolToken":
        """Return the token, free from now on."""
        return token.changed(now, None, token.fence, None, None, None)

    def lease_ends_by(self, token: "PoolToken") -> Instant | None:
        """Return the latest time to which the lease of a token can be kept alive; None if there is none."""
        return None if token.leased_at is None or math.isinf(self.lease_max) else token.leased_at + self.lease_max

    def expires_at(self, token: "PoolToken") -> Instant | None:
        """Return when the token expires if nothing changes it before; None is never."""
        if token.retired:
            return token.free_at
        if math.isinf(self.token_ttl):
            return None
        if token.holder is None:
            return token.free_at + self.token_ttl
        aged = self.lease_ttl if self.ages_while_leased else 0
        return token.free_at + max(self.reclaim_delay, self.token_ttl - aged)


class PoolToken(NamedTuple):
    """A token of a pool, free or leased.

    No process has to act when a lease or a free token expires: both follow from comparing `free_at` with now.

    free_at: when it became free or, under a lease, when the lease ends.
    fence: number of leases so far (a fencing token).
    retired: it is not leased again.
    username: the user of the latest lease; None if a dialect granted it without a login.
    leased_at: when the lease started; None if the token is free, and after its lapse was logged.
    lease_ttl: seconds that this lease lasts; None for the pool's.
    member: its name in the configuration, if the pool has members.
    reservation: keeps it from being leased; None if it has none, or one that has ended and was deleted.
    """

    pool: str
    value: str
    free_at: Instant
    holder: str | None = None
    fence: int = 0
    retired: bool = False
    username: str | None = None
    leased_at: Instant | None = None
    lease_ttl: float | None = None
    member: str | None = None
    reservation: "Reservation | None" = None

    def is_leased(self, now: Instant) -> bool:
        return self.holder is not None and now < self.free_at

    @property
    def unlogged(self) -> "PoolToken | None":
        """The token itself if its lease is over, has lapsed, and nothing has logged that."""
        return None if self.leased_at is None or self.holder is None else self

    def lease(self, now: Instant) -> "Lease | None":
        """Return the lease that it is under now."""
        return Lease(self.holder, self.free_at) if self.holder is not None and now < self.free_at else None

    def changed(
        self,
        free_at: Instant,
        holder: str | None,
        fence: int,
        username: str | None,
        leased_at: Instant | None,
        lease_ttl: float | None,
    ) -> "PoolToken":
        # Every write calls this, and `_replace` takes three times as long.
        pool, value, _, _, _, retired, _, _, _, member, reservation = self
        return PoolToken(
            pool, value, free_at, holder, fence, retired, username, leased_at, lease_ttl, member, reservation
        )

    def __repr__(self) -> str:
        # Without the value: it may be a secret.
        return f"PoolToken(pool={self.pool!r}, free_at={self.free_at!r}, holder={self.holder!r}, fence={self.fence!r})"


class Lease(NamedTuple):
    """A holder's right to a token, until an instant."""

    holder: str
    until: Instant


class Reservation(NamedTuple):
    """What keeps a member of a pool from being leased until an instant, except by one user if `username` names one.

    by: the manager who made it; empty for a command on the server.
    """

    until: Instant
    username: str | None
    note: str
    by: str


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """A request for leases of a pool that has a place in its waiting line, or had one and was granted.

    id: chosen by the client, or made for it; one user's requests for a pool have different ones.
    count: number of tokens, which are leased together.
    priority: one point is worth as much as one minute of waiting.
    ttl: seconds that the leases are to last; None for the pool's.
    labels: which a token must have, all of them.
    since: when it joined the line.
    turn: its place is before those of a later turn, and of a later number.
    kept_until: when the place lapses unless the client asks again; once granted, until when this is remembered.
    granted_at: when it was granted; None while it waits.
    leases: the numbers and fences of its tokens; None while it waits, and after its leases are known to be over.
    asks: how often a client has asked to wait for it: only the last one is served.
    answers: how many answers have its leases, without those whose client is known to have gone before it got them.
    """

    number: int
    pool: str
    username: str
    id: str
    holder: str
    count: int
    priority: int
    ttl: float | None
    labels: tuple[str, ...]
    since: Instant
    turn: Instant
    kept_until: Instant
    granted_at: Instant | None = None
    leases: tuple[tuple[int, int], ...] | None = None
    asks: int = 1
    answers: int = 0

    @property
    def key(self) -> "RequestKey":
        return self.username, self.id

    @property
    def cursor(self) -> "PlaceCursor":
        """Its position in the line, of which the order is that of these values."""
        return self.turn, self.number

    def has(self, number: int, token: PoolToken) -> bool:
        """Return whether a token, with this number, is under a lease that this request was granted."""
        # A token that replaced another one has its number, and may reach the same fence, but with a later start.
        return (number, token.fence) in (self.leases or ()) and token.leased_at == self.granted_at

    @property
    def terms(self) -> tuple[object, ...]:
        """What must be the same when the request is repeated."""
        return self.holder, self.count, self.priority, self.ttl, self.labels


RequestKey = tuple[str, str]
"""The user and the id: no two requests for one pool have the same pair."""


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """What a client asks for.

    id: its own id of the request; None if it has none.
    wait: seconds that it waits for its turn; None if it takes no place in the line.
    ttl: how long the leases last, in seconds or as "2m"; None for the pool's `lease_ttl`.
    The others are those of a `LeaseRequest`.
    """

    holder: str
    id: str | None = None
    wait: float | None = None
    count: int = 1
    priority: int = 0
    ttl: int | str | None = None
    labels: tuple[str, ...] = ()


class Grant(NamedTuple):
    """The leases that a request was granted: all of its tokens, as they were before and as they are now.

    `before` is empty if they had been granted already, and where the same batch answers the request once more.
    """

    request: LeaseRequest
    tokens: Sequence[PoolToken]
    before: Sequence[PoolToken] = ()


class Lapsed(NamedTuple):
    """What lapsed in a pool, and was not known to have: leases, by their tokens, and places in line."""

    leases: Sequence[PoolToken]
    places: Sequence[LeaseRequest]


class Place(NamedTuple):
    """A place in the waiting line: how many are before it and itself, of how many."""

    position: int
    waiting: int


TokenCursor = tuple[int, bytes]
"""A position in a list of tokens, the latest end first: an end and the start of a digest. A page starts after it."""

START_OF_TOKENS: TokenCursor = (2**62, b"")
"""Before all of them."""

LeaseCursor = tuple[Instant, int]
"""A position in a list of leases: the end of a lease and its row number. A page starts after it."""

START_OF_LEASES: LeaseCursor = (0.0, 0)

PlaceCursor = tuple[Instant, int]
"""A position in a waiting line: the turn of a request and its number. A page starts after it."""

START_OF_LINE: PlaceCursor = (-math.inf, 0)


class ListPart(NamedTuple, Generic[T]):
    """What was found in a part of a list, how many rows were looked at, and where the next part begins, if any does."""

    found: Sequence[T]
    examined: int
    following: tuple[Instant, int] | None


ListKind = Literal["leases", "places"]

STARTS: Mapping[ListKind, LeaseCursor | PlaceCursor] = {"leases": START_OF_LEASES, "places": START_OF_LINE}
"""Where lists begin."""


class ListCursor(NamedTuple):
    """A position in a list of leases or in a waiting line, of one of the pools. A page starts after it."""

    kind: ListKind
    pool: str
    cursor: LeaseCursor | PlaceCursor


class LeasesAndPlaces(NamedTuple):
    """What a user has leased, and where the user waits. `following`: where the next page begins."""

    leases: Sequence[tuple[Pool, PoolToken]]
    places: Sequence[tuple[Pool, LeaseRequest, Place]]
    following: ListCursor | None


class LeaseCheck(NamedTuple):
    """What must be true of a token's current lease before it is extended or released. None is not compared."""

    holder: str | None = None
    fence: int | None = None
    username: str | None = None

    def matches(self, token: PoolToken, now: Instant) -> bool:
        """Return whether the token is leased now and its lease has these properties."""
        return (
            token.holder is not None
            and now < token.free_at
            and (self.username is None or self.username == token.username)
            and (self.holder is None or self.holder == token.holder)
            and (self.fence is None or self.fence == token.fence)
        )

    def matches_user(self, token: PoolToken) -> bool:
        return self.username is None or self.username == token.username


ANY_LEASE = LeaseCheck()
"""Matches every current lease."""


class PoolCounts(NamedTuple):
    """The number of free and of leased tokens in a pool."""

    available: int
    leased: int


class MemberCounts(NamedTuple):
    """The number of members of a pool that are free, leased, and reserved but not leased."""

    available: int
    leased: int
    reserved: int


class Assignment(NamedTuple):
    """The result of a request for a token: the token, or when the next lease ends, if any is live.

    `left` is how many more tokens can be leased, if the caller asked for that. `over_limit`: the user has leased as
    many as one user may. `lapsed` is the token before, if its lease lapsed and nothing has logged that.
    """

    token: PoolToken | None
    next_end: Instant | None = None
    left: int | None = None
    over_limit: bool = False
    lapsed: PoolToken | None = None


class ForcedEnd(NamedTuple):
    """How a manager ended a lease of a token: the last one that was ended so.

    fence, username, holder: those of the lease.
    by: the manager; empty for a command on the server.
    taken: whether the manager got the token in the same step.
    """

    fence: int
    username: str | None
    holder: str
    by: str
    reason: str | None
    taken: bool

    def was_of(self, check: LeaseCheck, token: PoolToken, now: Instant) -> bool:
        """Return whether it ended the lease that a request is about, which does not match that of the token now."""
        # A user without a lease who sends no fence means the latest lease, before that of another user.
        latest = token.fence - (token.is_leased(now) and not check.matches_user(token))
        return (
            self.username == check.username
            and self.fence == (latest if check.fence is None else check.fence)
            and check.holder in {None, self.holder}
        )


class LeaseChange(NamedTuple):
    """A token before a request to change its lease or reservation, and after it; None if the request was refused."""

    before: PoolToken
    after: PoolToken | None

    @property
    def granted(self) -> bool:
        return self.after is not None

    @property
    def token(self) -> PoolToken:
        """The token as it is now."""
        return self.before if self.after is None else self.after


class CountUpdate(NamedTuple):
    """A change to the `Failures` under one key.

    increment: is added to `count`, which never falls below 0.
    cutoff: if `last_at` is not after it, the count starts again at 0.
    at: `last_at` is raised to this instant if it is earlier, and then moved by `shift` seconds.
    initial: is the `count` of a new key, if it is not incremented.
    """

    key: bytes
    increment: int = 0
    cutoff: Instant = 0.0
    at: Instant = 0.0
    shift: float = 0.0
    initial: int = 0


class ShareUpdate(NamedTuple):
    """A change to the share of a bucket, as a CountUpdate changes `last_at`.

    Its `count` is that of the bucket. If it has another one, the bucket has been cleared since: the share is empty.
    """

    key: bytes
    bucket: bytes
    at: Instant
    shift: float


@dataclass(frozen=True, slots=True)
class Failures:
    """What the store keeps under one throttle key: the number of failures in a row, and when the last one happened.

    For a leaky bucket, `last_at` is the instant at which it will be empty, and `count` changes when it is cleared (see
    `tokenauth.throttle`).
    """

    count: int
    last_at: Instant


MAX_THROTTLED = 100
"""Maximum number of Throttled in one list."""


class Throttled(NamedTuple):
    """Logins that are refused for a while, because of earlier ones that failed.

    kind: "user": the logins of `user` from `address`; "network": all logins from that range of addresses; "unknown":
    those with a name that no user has, which may be a password, from that range.
    failures: how many are counted.
    """

    kind: Literal["user", "network", "unknown"]
    user: str | None
    address: str
    failures: int
    until: Instant

    @property
    def key(self) -> tuple[str, str | None, str]:
        """Which logins are refused."""
        return self[:3]


def longest_waits(throttled: Iterable[Throttled]) -> list[Throttled]:
    """Return the longest waits first, one of each key, at most MAX_THROTTLED."""
    found: dict[object, Throttled] = {}
    for each in sorted(throttled, key=attrgetter("until"), reverse=True):
        found.setdefault(each.key, each)
    return [*found.values()][:MAX_THROTTLED]
