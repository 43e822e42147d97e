"""The contract of every store, in sentences that `tests/contract` holds each of them to.

- Each method is one atomic step.
- Absence is an answer (None, False, 0, an empty list). StoreUnavailable means that the machine is broken.
- A method that wrote and returned has been made durable.
- A store owns no clock: what depends on time takes `now`, in Unix seconds.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from tokenauth.models import Failures, Instant, Token


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

    def news(self) -> Collection[bytes] | None:
        """Return the digests removed since this was last asked; None if some may have been missed.

        Raises StoreUnavailable when it cannot be known.
        """


class FailureStore(Protocol):
    """Counts failed logins by key; who is behind a key cannot be read from it."""

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Return what is counted under these keys; a key that counts nothing is left out."""

    async def fail(self, keys: Sequence[bytes], now: Instant, forget: float) -> None:
        """Count one more failure under each key, from one again if the last is `forget` seconds past."""

    async def clear(self, key: bytes, now: Instant) -> None:
        """Count nothing under this key any more."""

    async def purge_failures(self, before: Instant, limit: int) -> int:
        """Delete at most `limit` keys whose last failure was before an instant; say how many there were."""


class Store(Protocol):
    """A place that keeps everything, and how to begin and end with it."""

    @property
    def tokens(self) -> TokenStore:
        """The tokens."""

    @property
    def failures(self) -> FailureStore:
        """The failed logins."""

    async def start(self) -> Instant:
        """Bring the schema up to date and connect; the answer is the latest `now` that was ever written.

        Raises StartError when the schema is newer than this release or the store cannot be used.
        """

    async def stop(self, now: Instant) -> None:
        """Finish what is being written, remember `now`, and disconnect."""

    async def ready(self) -> str | None:
        """Say what keeps the store from serving, if anything does."""

    async def claim(self, duty: str, now: Instant, until: Instant) -> bool:
        """Take on a duty until an instant, unless somebody has it."""

    async def purge_log(self, before: Instant, limit: int) -> int:
        """Delete at most `limit` entries of the revocation log older than an instant; say how many."""
