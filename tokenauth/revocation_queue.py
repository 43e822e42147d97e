"""Revocations that the store could not take yet: held in memory, and written as soon as it can."""

import asyncio
from collections import Counter
from contextlib import suppress

from tokenauth.errors import RetryLater, StoreUnavailable
from tokenauth.logs import log, whereabouts
from tokenauth.models import Clock, public_id
from tokenauth.stores.base import Store

MAX_HELD = 100_000
"""Revocations that are held at the most: about 15 MB."""

MAX_OF_NETWORK = 1_000
"""Of these, how many one network may have: a stranger who sends made-up tokens must not fill the queue."""

RETRY = 1.0
"""Seconds between two attempts to write them."""

_TOGETHER = 100
"""How many are written at a time; they share a commit."""

_LAST_CHANCE = 5.0
"""Seconds in which they are still written when the worker stops."""


class RevocationQueue:
    """Holds what has been revoked until it is written.

    When no more can be held it is full, and it is not known any more which tokens are revoked: then none may be
    accepted. Once the store can be written again, all tokens end, and the queue is empty.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.held: dict[bytes, str] = {}
        self._of_network = Counter[str]()
        self._store = store
        self._clock = clock
        self._dropped = 0
        self._writing: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str | None:
        """Say why no token can be accepted, if none can."""
        return "too many revocations wait to be written: no token is accepted until then" if self._dropped else None

    def refuses(self, digest: bytes) -> bool:
        """Whether a token is revoked here. Raises StoreUnavailable while that cannot be known."""
        if self._dropped:
            raise StoreUnavailable
        return digest in self.held

    def add(self, digest: bytes, network: str) -> bool:
        """Take a revocation that could not be written; return False if the network has its share of the queue."""
        if digest in self.held:
            return True
        if self._of_network[network] >= MAX_OF_NETWORK:
            return False
        if self._dropped or len(self.held) >= MAX_HELD:
            if not self._dropped:
                log.error("revocation_queue_full", held=len(self.held), action="all tokens end when the store is back")
            self._dropped += 1
        else:
            self.held[digest] = network
            log.error("revocation_held_in_memory", id=public_id(digest), held=len(self.held))
        self._of_network[network] += 1
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_later())
        return True

    async def close(self) -> None:
        """Try a last time to write what is held, and log what is lost."""
        if self._writing is not None:
            self._writing.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_CHANCE):
                await self._write()
        for digest in self.held:
            log.error("revocation_lost", id=public_id(digest), action="revoke it by id once the store is back")
        if self._dropped:
            log.error("revocations_lost", count=self._dropped, action="revoke all tokens once the store is back")

    async def _write_later(self) -> None:
        try:
            while self.held:
                await asyncio.sleep(RETRY)
                await self._write()
        finally:
            self._writing = None

    async def _write(self) -> None:
        """Write what is held, one first: if that fails, the others would fail likewise."""
        if self._dropped:
            await self._end_all()
            return
        together = 1
        while self.held:
            batch = list(self.held)[:together]
            if not any(await asyncio.gather(*map(self._write_one, batch))):
                return
            together = _TOGETHER

    async def _end_all(self) -> None:
        dropped = self._dropped
        try:
            count = await self._store.tokens.remove_all(None, self._clock())
        except Exception as error:
            _note(error)
            return
        log.warning("tokens_revoked", user="(all)", count=count, reason="revocation_queue_full")
        if dropped == self._dropped:  # none came while that was done
            self.held.clear()
            self._of_network.clear()
            self._dropped = 0

    async def _write_one(self, digest: bytes) -> bool:
        try:
            await self._store.tokens.remove(digest, self._clock())
        except Exception as error:
            _note(error)
            if digest in self.held:  # to the end with it: one that cannot be written must not keep the others waiting
                self.held[digest] = self.held.pop(digest)
            return False
        network = self.held.pop(digest, None)
        if network is not None:
            self._of_network[network] -= 1
            self._of_network += Counter()  # without those that have none left
        log.info("token_revoked", id=public_id(digest), late=True)
        return True


def _note(error: Exception) -> None:
    """Log what is not merely a store that is down: that is known."""
    if not isinstance(error, RetryLater):
        log.error("unexpected", at=whereabouts(error))
