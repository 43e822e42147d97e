"""A cache of tokens that never returns a revoked one: it applies all known revocations before it answers."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping

from tokenauth.errors import MustWait, StoreUnavailable
from tokenauth.models import Token
from tokenauth.stores.engine import Feed

_NOTHING: dict[bytes, Token] = {}


class TokenCache:
    """Caches `size` tokens, and drops each as soon as any process has revoked it.

    Why no client gets a token accepted after it has seen the answer to its revocation:

    1. The client sends its next request after that answer.
    2. So the request is read from its socket in a later iteration of the event loop than any that began before the
       revocation.
    3. In each iteration, the feed is drained before the first answer. So the revocation is applied before the request
       is answered.

    A feed that does not have the commits of other processes at once (`sees_commits`) has revocations before they are
    answered because `TokenStore.share` adds them to it, on each worker of the machine.

    While the feed is not current, nothing is answered from the cache: each token is looked up in the store.

    Expired tokens are cached too: the caller compares the expiry with its time at each use.
    """

    def __init__(
        self,
        look_up: Callable[[bytes], Awaitable[Token | None]],
        feed: Feed,
        size: int,
        look_up_now: Callable[[bytes], Token | None] | None = None,
    ) -> None:
        """`look_up_now` does what `look_up` does, without waiting; None if that is impossible."""
        self._look_up = look_up
        self._look_up_now = look_up_now
        self._feed = feed
        self._size = size
        self._tokens: dict[bytes, Token] = {}
        self._usable = self._tokens  # empty while the feed is not current
        self._ring: list[bytes] = []  # the digests in the order of insertion; the oldest is overwritten first
        self._next = 0
        self._generation = 0  # grows when tokens are dropped: what was looked up before may be revoked
        self._drained = False
        self._looking_up: defaultdict[bytes, int] = defaultdict(int)  # how many look-ups of each digest are running

    def cached(self, digest: bytes) -> Token | None:
        """Return a token if it is cached. Raises StoreUnavailable if revocations cannot be read."""
        if not self._drained:
            self._catch_up()
        return self._usable.get(digest)

    def has_now(self, digest: bytes) -> bool:
        """Return whether `cached` and `look_up_now` will find out about a token without waiting, most likely."""
        return self._look_up_now is not None or digest in self._usable

    def look_up_now(self, digest: bytes) -> Token | None:
        """Do what `look_up` does, without waiting. Raises MustWait if that is impossible."""
        if self._look_up_now is None:
            raise MustWait
        token = self._look_up_now(digest)
        self._keep(digest, token, self._generation)
        return token

    async def look_up(self, digest: bytes) -> Token | None:
        """Look up a token, cached or not, and cache it unless anything was revoked during the look-up."""
        if self._look_up_now is not None:
            return self.look_up_now(digest)
        generation = self._generation
        self._looking_up[digest] += 1
        try:
            token = await self._look_up(digest)
        finally:
            self._looking_up[digest] -= 1
            if not self._looking_up[digest]:
                del self._looking_up[digest]
        self._keep(digest, token, generation)
        return token

    def _keep(self, digest: bytes, token: Token | None, generation: int) -> None:
        """Cache what the store had at a generation."""
        if token is None:
            self._drop(digest)
        elif generation == self._generation and self._usable is self._tokens:
            self._insert(token)

    def forget(self, digests: Collection[bytes]) -> None:
        """Drop tokens that the store did not have, even before their revocations arrive.

        Anyone can name tokens that do not exist. So they keep no other token out of the cache.
        """
        for digest in digests:
            if self._tokens.pop(digest, None) is not None or digest in self._looking_up:
                self._generation += 1

    @property
    def generation(self) -> int:
        """A number that grows when tokens are dropped. Tokens that were read before may be revoked."""
        return self._generation

    def replace(self, digests: Collection[bytes], tokens: Mapping[bytes, Token], generation: int) -> None:
        """Replace those of `digests` that are cached by what the store had at a generation; drop the others."""
        for digest in digests:
            if digest in self._tokens:
                token = tokens.get(digest)
                if token is None:
                    self._drop(digest)
                elif generation == self._generation:
                    self._tokens[digest] = token
                else:
                    del self._tokens[digest]

    def _catch_up(self) -> None:
        """Drop what was revoked since the last iteration of the event loop, or everything if that is not known."""
        if self._feed.is_current():
            self._usable = self._tokens
            self._drain()
        else:
            self._usable = _NOTHING
            self._generation += 1
        self._drained = True
        asyncio.get_running_loop().call_soon(self._next_iteration)

    def _drain(self) -> None:
        try:
            revoked = self._feed.drain()
        except StoreUnavailable:
            self._clear()
            raise
        if revoked is None:
            self._clear()
        elif revoked:
            self._generation += 1
            for digest in revoked:
                self._tokens.pop(digest, None)

    def _drop(self, digest: bytes) -> None:
        """Drop a token the store no longer has, even before its revocation arrives: once refused, never accepted."""
        if self._tokens.pop(digest, None) is not None or self._usable is not self._tokens:
            self._generation += 1

    def _next_iteration(self) -> None:
        self._drained = False

    def _clear(self) -> None:
        self._generation += 1
        self._tokens.clear()
        self._ring.clear()
        self._next = 0

    def _insert(self, token: Token) -> None:
        if token.digest in self._tokens:
            self._tokens[token.digest] = token
            return
        if len(self._ring) < self._size:
            self._ring.append(token.digest)
        else:
            self._tokens.pop(self._ring[self._next], None)
            self._ring[self._next] = token.digest
            self._next = (self._next + 1) % self._size
        self._tokens[token.digest] = token
