"""A cache in front of any token store that is never wrong: it asks for news before it answers."""

import asyncio
from collections.abc import Sequence

from tokenauth.errors import StoreUnavailable
from tokenauth.models import Instant, Token
from tokenauth.stores.store import Feed, TokenStore

_NOTHING: dict[bytes, Token] = {}


class CachedTokenStore:
    """TokenStore that remembers `size` tokens, and forgets each as soon as anybody has removed it.

    The feed is asked at most once in a turn of the event loop, before the first answer of that turn. Whoever
    could have seen a removal answered sends his next request after it; that request is read from the socket
    in a later turn than any that began before the removal, and so after the news of it.

    A feed that is not sure of its news makes the cache step aside: each token is looked up in the store.

    What has expired is remembered too: whoever judges a token compares its time at each use.
    """

    def __init__(self, store: TokenStore, feed: Feed, size: int) -> None:
        self._store = store
        self._feed = feed
        self._size = size
        self._known: dict[bytes, Token] = {}
        self._believed = self._known
        self._ring: list[bytes] = []  # what was remembered longest is overwritten first
        self._next = 0
        self._editions = 0
        self._current = False

    async def get(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        if not self._current:
            self._catch_up()
        token = self._believed.get(digest)
        if token is None:
            edition = self._editions
            token = await self._store.get(digest)
            if token is None:
                self._gone(digest)
            elif edition == self._editions and self._believed is self._known:
                self._remember(token)
        return token

    async def add(self, token: Token, per_user: int, now: Instant) -> None:
        """Keep a token; those that end by it are news."""
        await self._store.add(token, per_user, now)

    async def find(self, id: str) -> Token | None:
        """Return the token with this public id."""
        return await self._store.find(id)

    async def remove(self, digest: bytes, now: Instant) -> bool:
        """End one token."""
        return await self._store.remove(digest, now)

    async def remove_all(self, username: str | None, now: Instant, keep: bytes | None = None) -> int:
        """End all tokens of a user, or of everybody, but one."""
        return await self._store.remove_all(username, now, keep)

    async def list(self, username: str | None, now: Instant, limit: int) -> Sequence[Token]:
        """Return the live tokens of a user, or of everybody, newest first."""
        return await self._store.list(username, now, limit)

    async def purge(self, now: Instant, limit: int) -> int:
        """Delete tokens that have expired."""
        return await self._store.purge(now, limit)

    def _catch_up(self) -> None:
        """Forget what was removed since the last turn, and everything if that is not known."""
        if self._feed.sure():
            self._believed = self._known
            self._hear()
        else:
            self._believed = _NOTHING
            self._editions += 1
        self._current = True
        asyncio.get_running_loop().call_soon(self._turn_over)

    def _hear(self) -> None:
        try:
            removed = self._feed.news()
        except StoreUnavailable:
            self._forget_all()
            raise
        if removed is None:
            self._forget_all()
        elif removed:
            self._editions += 1
            for digest in removed:
                self._known.pop(digest, None)

    def _gone(self, digest: bytes) -> None:
        """Forget what the store has not, whose news may still be on their way: what was refused is not taken again."""
        if self._known.pop(digest, None) is not None or self._believed is not self._known:
            self._editions += 1

    def _turn_over(self) -> None:
        self._current = False

    def _forget_all(self) -> None:
        self._editions += 1
        self._known.clear()
        self._ring.clear()
        self._next = 0

    def _remember(self, token: Token) -> None:
        if len(self._ring) < self._size:
            self._ring.append(token.digest)
        else:
            self._known.pop(self._ring[self._next], None)
            self._ring[self._next] = token.digest
            self._next = (self._next + 1) % self._size
        self._known[token.digest] = token
