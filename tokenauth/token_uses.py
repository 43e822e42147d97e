"""Uses of tokens: noted in memory, and written to the store many at a time. They extend logins that slide."""

import asyncio
import math
from contextlib import suppress
from contextvars import Context
from itertools import islice

from tokenauth.clock import Clock
from tokenauth.errors import InvalidToken, NotRenewable, Overloaded, RetryLater
from tokenauth.logs import log, safe_traceback
from tokenauth.models import LATE_USE, Instant, Token, Use
from tokenauth.stores.store import TokenStore

STALE = 3600.0
"""Seconds after which the last use of a token is written again, unless `idle / 4` is more."""

MAX_NOTES = 100_000
"""Maximum number of uses that wait to be written: about 15 MB."""

BATCH = 200
"""Maximum number of uses that one transaction writes. With 500, other requests waited up to 80 ms."""

MAX_INTERVAL = 5.0
"""Seconds for which a use waits to be written, at most, while the store works."""

_PAUSE = 0.02
"""Seconds between two batches, in which others can write."""

_CLOSE_TIMEOUT = 5.0
"""Seconds for which a worker that stops still writes."""

_RENEW_ATTEMPTS = 50


class Uses:
    """The uses that were not written yet.

    With `idle`, a login ends between `idle` and 1.25 `idle` after its last use. A use is due to be written when the
    token would otherwise end less than `idle` after it: at most once in `idle / 4`.
    """

    def __init__(self, store: TokenStore, clock: Clock, idle: int | None) -> None:
        self._store = store
        self._clock = clock
        self._idle = idle
        self._stale = STALE if idle is None else max(STALE, idle / 4)
        self.period = STALE if idle is None else idle / 4 - 1
        """Seconds after the last use that was written before which no use is due. Ends are whole seconds: hence 1."""
        self._interval = MAX_INTERVAL if idle is None else min(idle / 16, MAX_INTERVAL)
        self._notes: dict[bytes, Instant] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._failed = self._full = self._urgent = False

    def first_end(self, now: Instant, max_expires_at: int) -> int:
        """Return when a token that slides ends if it is never used."""
        return min(self._end(now), max_expires_at)

    def note(self, token: Token, now: Instant) -> None:
        """Note that a token was used, if that is due to be written."""
        if not self._is_due(token, now):
            return
        if token.digest not in self._notes and len(self._notes) >= MAX_NOTES:
            if not self._full:
                self._full = True
                log.error("too_many_uses", held=len(self._notes), action="logins may end early until the store is back")
            return
        self._notes[token.digest] = now
        if len(self._notes) == BATCH or (token.is_extendable and token.expires_at - now < 2 * self._interval):
            self._urgent = True
        self._schedule(0 if self._urgent else self._interval)

    def extended(self, token: Token, now: Instant) -> Token | None:
        """Return an expired token with its later end, if it was used before in this process, which is not written yet.

        The store takes that use until LATE_USE seconds after the end.
        """
        used_at = self._notes.get(token.digest)
        if used_at is None or token.max_expires_at is None or now >= token.expires_at + LATE_USE:
            return None
        end = min(self._end(used_at), token.max_expires_at)
        return token._replace(expires_at=end) if now < end else None

    async def renew(self, token: Token) -> Token:
        """Extend a token as a use does, and at once. Return it as it is then.

        Raises NotRenewable, InvalidToken if it has ended, or StoreUnavailable.
        """
        if self._idle is None or token.max_expires_at is None or token.kind != "login":
            raise NotRenewable
        for _ in range(_RENEW_ATTEMPTS):
            now = self._clock()
            end = self._end(now)
            found = await self._store.note_uses([Use(token.digest, now, end, stale=now, needed=end)], now)
            renewed = found.get(token.digest)
            if renewed is None or now >= renewed.expires_at:
                raise InvalidToken
            if not renewed.is_extendable or renewed.expires_at >= end:
                return renewed
            await asyncio.sleep(_PAUSE)  # others are writing the token
        raise Overloaded

    async def flush(self) -> None:
        """Write the uses that are noted now, in batches. Raises RetryLater."""
        left = len(self._notes)
        while left > 0 and self._notes:
            batch = dict(islice(self._notes.items(), min(left, BATCH)))
            await self._write(batch)
            left -= len(batch)
            if left > 0:
                await asyncio.sleep(_PAUSE)

    async def close(self) -> None:
        """Write what is noted, if that is possible soon."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self.flush()
        except Exception as error:
            log.warning("uses_lost", count=len(self._notes))
            if not isinstance(error, RetryLater | TimeoutError):
                log.error("unexpected_error", at=safe_traceback(error))

    def _end(self, used_at: Instant) -> int:
        idle = self._idle or 0
        return int(used_at) + idle + idle // 4

    def _needed(self, used_at: Instant) -> Instant:
        """Return before when the end of a token is too early for a use."""
        return -math.inf if self._idle is None else used_at + self._idle

    def _is_due(self, token: Token, now: Instant) -> bool:
        # as the store compares: a use that is due here and not there would be written again and again
        return token.used_at <= now - self._stale or (token.is_extendable and token.expires_at < self._needed(now))

    async def _write(self, batch: dict[bytes, Instant]) -> None:
        uses = [
            Use(
                digest,
                used_at,
                None if self._idle is None else self._end(used_at),
                used_at - self._stale,
                self._needed(used_at),
            )
            for digest, used_at in sorted(batch.items())
        ]
        now = self._clock()
        found = await self._store.note_uses(uses, now)
        for digest in batch:
            latest = self._notes.pop(digest, None)
            token = found.get(digest)
            if latest is not None and token is not None and int(now) < token.expires_at + LATE_USE:
                self.note(token, latest)  # it was used again, or others were writing it
        self._full = False

    def _schedule(self, seconds: float) -> None:
        """Write in that time, unless that is going on; after a failure, not before the next attempt."""
        if self._task is not None or (self._timer is not None and (seconds > 0 or self._failed)):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._start)

    def _start(self) -> None:
        self._timer = None
        self._task = asyncio.create_task(self._run(), context=Context())

    async def _run(self) -> None:
        self._failed, self._urgent = True, False
        try:
            await self.flush()
            self._failed = False
        except RetryLater:  # the store has logged that
            pass
        except Exception as error:
            log.error("unexpected_error", at=safe_traceback(error))
        finally:
            self._task = None
        if self._notes:
            self._schedule(_PAUSE if self._urgent and not self._failed else self._interval)
