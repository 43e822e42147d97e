"""Revocations that the store could not take yet: held in memory, and written as soon as it can."""

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from time import monotonic

from tokenauth.clock import Clock
from tokenauth.errors import RetryLater, StoreUnavailable
from tokenauth.logs import log, whereabouts
from tokenauth.models import public_id
from tokenauth.revocation_ledger import MAX_HELD, News, log_lost
from tokenauth.stores.store import Store

MAX_OF_NETWORK = 1_000
"""Held revocations of one network at the most: a stranger who sends made-up tokens must not fill the queue."""

RETRY = 1.0
"""Seconds between two attempts to write them."""

_TOGETHER = 100
"""How many are written at a time; they share a commit."""

_LAST_CHANCE = 5.0
"""Seconds, at least, in which they are still written when the worker stops."""


class RevocationQueue:
    """Holds what has been revoked until it is written, and tells the other workers of the machine, who do the same.

    When no more can be held it is full, and it is not known any more which tokens are revoked: then none may be
    accepted. Once the store can be written again, all tokens end, and the queue is empty.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.held: dict[bytes, str] = {}
        self.busy = False
        """Whether anything is held or was dropped: only then `refuses` need be asked."""
        self.tell: Callable[[News], None] | None = None
        """Tells the main process; None where there is none."""
        self.close_by = 0.0
        """Until when, by the clock of the event loop, `close` may go on trying."""
        self.handed_over = False
        """Whether other workers go on when this one stops."""
        self._of_network = Counter[str]()
        self._store = store
        self._clock = clock
        self._dropped = 0
        self._dropped_at = 0.0
        self._started = self._closing = False
        self._writing: asyncio.Task[None] | None = None
        self._news: News | None = None

    @property
    def trouble(self) -> str | None:
        """Say why no token can be accepted, if none can."""
        return "too many revocations wait to be written: no token is accepted until then" if self._dropped else None

    def refuses(self, digest: bytes) -> bool:
        """Whether a token is revoked here. Raises StoreUnavailable while that cannot be known."""
        if self._dropped:
            raise StoreUnavailable
        return digest in self.held

    def start(self) -> None:
        """Begin to write: the store has started."""
        self._started = True
        self._tell_now()
        self._changed()

    def add(self, digest: bytes, network: str) -> bool:
        """Take a revocation that could not be written; return False if the network has its share of the queue.

        The main process is told in the next turn of the event loop.
        """
        if digest in self.held:
            return True
        if self._of_network[network] >= MAX_OF_NETWORK:
            return False
        if self._hold(digest, network):
            log.error("revocation_held_in_memory", id=public_id(digest), held=len(self.held))
            self._to_tell().held[digest] = network
        self._changed()
        return True

    def take(self, news: News) -> None:
        """Hold what another worker holds, too, and end what it has ended."""
        for digest, network in news.held.items():
            if digest not in self.held:
                self._hold(digest, network)
        if news.dropped:
            self._dropped += news.dropped
            self._dropped_at = monotonic()
        self._all_ended(news.all_ended)
        self._changed()

    async def close(self) -> None:
        """Go on trying to write what is held, for a while, and log what is lost. What others hold is left to them."""
        self._closing = True
        if self._writing is not None:
            self._writing.cancel()
        if not self.handed_over:
            last_chance = asyncio.get_running_loop().time() + _LAST_CHANCE
            with suppress(TimeoutError):
                async with asyncio.timeout_at(max(self.close_by, last_chance)):
                    await self._write_all()
        self._tell_now()
        if self.tell is None:  # else the main process knows whether another worker has written it
            log_lost(self.held, self._dropped)

    def _hold(self, digest: bytes, network: str) -> bool:
        """Hold one more; return False if it was dropped."""
        self._of_network[network] += 1
        if not self._dropped and len(self.held) < MAX_HELD:
            self.held[digest] = network
            return True
        if not self._dropped:
            log.error("revocation_queue_full", held=len(self.held), action="all tokens end when the store is back")
        self._dropped += 1
        self._dropped_at = monotonic()
        news = self._to_tell()
        news.dropped += 1
        news.dropped_at = self._dropped_at
        return False

    def _changed(self) -> None:
        self.busy = bool(self.held or self._dropped)
        if self.busy and self._started and not self._closing and self._writing is None:
            self._writing = asyncio.create_task(self._write_later())

    def _to_tell(self) -> News:
        """Return the news that will be told in the next turn of the event loop."""
        if self._news is None:
            self._news = News()
            if self._started:
                asyncio.get_running_loop().call_soon(self._tell_now)
        return self._news

    def _tell_now(self) -> None:
        news, self._news = self._news, None
        if news is not None and self.tell is not None:
            self.tell(news)

    async def _write_later(self) -> None:
        try:
            await asyncio.sleep(RETRY)
            await self._write_all()
        finally:
            self._writing = None

    async def _write_all(self) -> None:
        while self.busy:
            await self._write()
            if self.busy:
                await asyncio.sleep(RETRY)

    async def _write(self) -> None:
        """Write what is held, one first: if that fails, the others would fail likewise."""
        if self._dropped:
            await self._end_all()
            return
        together = 1
        while self.held:
            batch = list(islice(self.held, together))
            if not any(await asyncio.gather(*map(self._write_one, batch))):
                return
            together = _TOGETHER

    async def _end_all(self) -> None:
        began = monotonic()
        try:
            count = await self._store.tokens.remove_all(None, self._clock())
        except Exception as error:
            _note(error)
            return
        log.warning("tokens_revoked", user="(all)", count=count, reason="revocation_queue_full")
        self._to_tell().all_ended = began
        self._all_ended(began)

    def _all_ended(self, began: float) -> None:
        """Hold nothing any more if all tokens were ended after the last revocation that was dropped."""
        if self._dropped and self._dropped_at < began:
            self.held.clear()
            self._of_network.clear()
            self._dropped = 0
            self._changed()

    async def _write_one(self, digest: bytes) -> bool:
        try:
            removed = await self._store.tokens.remove(digest, self._clock())
        except Exception as error:
            _note(error)
            if digest in self.held:  # to the end with it: one that cannot be written must not keep the others waiting
                self.held[digest] = self.held.pop(digest)
            return False
        network = self.held.pop(digest, None)
        if network is not None:
            self._of_network[network] -= 1
            if not self._of_network[network]:
                del self._of_network[network]
        self._to_tell().written.append(digest)
        self._changed()
        if removed:
            log.info("token_revoked", id=public_id(digest), late=True)
        return True


def _note(error: Exception) -> None:
    """Log what is not merely a store that is down: that is known."""
    if not isinstance(error, RetryLater):
        log.error("unexpected", at=whereabouts(error))
