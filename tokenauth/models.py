"""The nouns of the service and their arithmetic: no input, no output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

Instant = float
"""Unix seconds."""

Clock = Callable[[], Instant]
"""Says what time it is. Production passes `time.time`."""

ID_BYTES = 12
"""So many leading bytes of a token's digest are its public id."""


@dataclass(frozen=True, slots=True)
class User:
    """A name that may log in; it stands in the configuration."""

    username: str
    password_hash: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    credential: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Derive the fingerprint by which a token remembers this password."""
        fingerprint = sha256(self.password_hash.encode()).hexdigest()[:16]
        object.__setattr__(self, "credential", fingerprint)


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


def public_id(digest: bytes) -> str:
    """Name a token by the beginning of its digest: 24 hexadecimal digits."""
    return digest[:ID_BYTES].hex()


@dataclass(frozen=True, slots=True)
class Issued:
    """What a login returns, once: after it nobody can learn `value` again."""

    value: str = field(repr=False)
    token: Token


@dataclass(frozen=True, slots=True)
class Failures:
    """Logins that failed in a row for one key, and when the last of them did."""

    count: int
    last_at: Instant


class ForwardClock:
    """A clock that never goes back.

    When `wall` is set back, time goes on from where it was at the pace of `ticks`, a clock that nobody
    can set, so that nothing which had expired is valid again and nothing lives longer than it should.
    """

    def __init__(self, wall: Clock, ticks: Clock) -> None:
        self._wall = wall
        self._ticks = ticks
        self._offset = wall() - ticks()

    def __call__(self) -> Instant:
        """Read the time, in Unix seconds; never less than any time that was read before."""
        now = self._wall()
        floor = self._ticks() + self._offset
        if now < floor:
            return floor
        self._offset += now - floor
        return now

    def advance(self, instant: Instant) -> float:
        """Never again say less than `instant`; the answer is by how many seconds `wall` was behind it."""
        behind = instant - self()
        if behind > 0:
            self._offset += behind
        return max(behind, 0.0)
