"""A store whose operations fail when a test says so."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenauth.models import Instant, Token, TokenKind
from tokenauth.stores.store import TokenStore


class Faulty:
    """The tokens of a real store. It can be made to raise errors."""

    def __init__(self, tokens: TokenStore) -> None:
        self._tokens = tokens
        self.reading: Exception | None = None
        self.writing: Exception | None = None
        self.poison: bytes | None = None
        self.poisoned = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)

    async def get(self, digest: bytes) -> Token | None:
        if self.reading is not None:
            raise self.reading
        return await self._tokens.get(digest)

    async def issue(
        self, token: Token, per_user: int, now: Instant, on_commit: Callable[[Sequence[bytes]], object] | None = None
    ) -> Sequence[bytes]:
        if self.writing is not None:
            raise self.writing
        return await self._tokens.issue(token, per_user, now, on_commit)

    async def revoke(self, digest: bytes, now: Instant, on_commit: Callable[[bool], object] | None = None) -> bool:
        self.poisoned |= digest == self.poison
        if self.writing is not None or digest == self.poison:
            raise self.writing or ZeroDivisionError
        return await self._tokens.revoke(digest, now, on_commit)

    async def revoke_all(
        self,
        username: str | None,
        now: Instant,
        keep: bytes | None = None,
        kind: TokenKind | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        if self.writing is not None:
            raise self.writing
        return await self._tokens.revoke_all(username, now, keep, kind, progress)
