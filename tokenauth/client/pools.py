"""PoolClient and AsyncPoolClient: take a lease, keep it alive while it is used, and give it back.

What to ask, how to read the answer, when to ask again and when it is over stands in `Lease`, which does no input or
output. The two clients carry it out: one with a thread for each lease, the other with a task.
"""

import asyncio
import contextlib
import math
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx

from tokenauth import errors
from tokenauth.client import redaction
from tokenauth.models import Clock, steady

redaction.install()

Event = TypeVar("Event", threading.Event, asyncio.Event)

Question = dict[str, Any]
"""A request, as the `request` of both of httpx's clients takes it."""

Grant = tuple[str, str, int, int]
"""Token, holder, fence, and for how many seconds."""

_KINDS = (errors.LeaseLost, errors.NotFound, errors.UnknownPool, errors.InvalidToken, errors.TokenRequired)
_PLAIN = {kind.code: kind for kind in _KINDS}


class Lease(Generic[Event]):
    """A token that is lent to this program, for as long as the program may count on that.

    `lost` is set from the instant on at which the time is up by the program's own clock, or the issuer says that
    the lease is over, or the token was given back. What is lost stays lost.
    """

    def __init__(
        self, pool: str, holder: str | None, wait: float, timeout: float, ticks: Clock, lost: Callable[..., Event]
    ) -> None:
        """Begin as the wish for a token, for `wait` seconds; `lost` makes the event."""
        self.token, self.holder, self.fence = "", holder or "", 0
        self._url = f"/api/pools/{quote(pool, safe='')}/leases"
        self._wanted = {} if holder is None else {"holder": holder}
        self._timeout = timeout
        self._ticks = ticks
        self._sent = ticks()
        self._patience = self._sent + wait
        self._ttl = self._due = self._until = math.inf
        self._over = self._returned = False
        self.lost: Event = lost(self)

    def __repr__(self) -> str:
        """Show what may stand in a log."""
        return f"<Lease holder={self.holder!r} fence={self.fence!r}>"

    def check(self) -> None:
        """Raise LeaseLost if the lease is over."""
        if self._is_over():
            raise errors.LeaseLost

    def _wish(self) -> Question:
        """Ask for a token."""
        self._sent = self._ticks()
        return {"method": "POST", "url": self._url, "json": self._wanted}

    def _granted(self, answer: httpx.Response) -> float | None:
        """Take the answer to that; not None: wait for so long, then ask again. Raises Refusal."""
        try:
            self._begin(_read(answer))
        except errors.NoFreeToken:
            left = self._patience - self._ticks()
            if left <= 0:
                raise
            return min(left, random.uniform(0.5, 1))  # noqa: S311 # not Retry-After: it is longer, and tokens are given back
        return None

    def _begin(self, grant: Grant) -> None:
        """Count from before the request was sent: the issuer counts from later on."""
        self.token, self.holder, self.fence, self._ttl = grant
        self._due = self._sent + self._ttl / 3
        self._until = self._sent + self._ttl

    def _is_over(self) -> bool:
        if self._ticks() >= self._until:
            self._over = True  # and for good, even if an answer that prolongs it is being read at this moment
        return self._over

    def _nap(self, until: float = math.inf) -> float:
        """Say how long nobody need look at the clock: not long, since waits do not count the sleep of a machine."""
        return max(0.0, min(1, self._ttl / 100, min(until, self._until) - self._ticks()))

    def _is_due(self) -> bool:
        return self._ticks() >= self._due and not self._is_over()

    def _answered(self, answer: httpx.Response | None) -> None:
        """Take the answer to that, if there was any; one that comes too late changes nothing."""
        self._due = self._ticks() + min(1, self._ttl / 10) * random.uniform(0.5, 1)  # noqa: S311
        try:
            grant = _read(answer) if answer is not None else None
        except (errors.LeaseLost, errors.NotFound):
            self._returned = True
            self._lose()
        except errors.Refusal:
            return
        else:
            if grant is not None and not self._is_over():
                self._begin(grant)

    def _return(self) -> Question | None:
        """Give the token back, once; None: that is done, or it is somebody else's by now."""
        self._lose()
        done, self._returned = self._returned, True
        return None if done else self._claim("DELETE")

    def _lose(self) -> None:
        self._over = True
        self.lost.set()

    def _claim(self, method: str) -> Question:
        """Ask for more time, or that the lease be ended."""
        self._sent = self._ticks()
        url = f"{self._url}/{quote(self.token, safe='')}"
        timeout = min(self._timeout, self._ttl / 3)  # a keep-alive that hangs leaves time for a second one
        return {"method": method, "url": url, "json": {"holder": self.holder, "fence": self.fence}, "timeout": timeout}


def _read(answer: httpx.Response) -> Grant:
    """Read what is granted. Raises Refusal."""
    with contextlib.suppress(ValueError):
        match answer.json():
            case {"token": str(token), "holder": str(holder), "fence": int(fence), "expires_in": int(ttl)} if ttl > 0:
                return token, holder, fence, ttl
            case {"error": str(code), "error_description": str(description)}:
                raise _refusal(answer.headers, code, description)
    raise errors.IssuerUnavailable


def _refusal(headers: httpx.Headers, code: str, description: str) -> errors.Refusal:
    retry_after = headers.get("retry-after", "")
    seconds = int(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
    if code == errors.NoFreeToken.code:
        return errors.NoFreeToken(seconds)
    if code == errors.InsufficientScope.code:
        scope = re.search('scope="([^"]*)"', headers.get("www-authenticate", ""))
        return errors.InsufficientScope(*(scope[1].split() if scope else ()))
    if code == errors.InvalidRequest.code:
        return errors.InvalidRequest(description)
    return _PLAIN[code]() if code in _PLAIN else errors.IssuerUnavailable(retry_after=seconds or 1)


SyncLease = Lease[threading.Event]
AsyncLease = Lease[asyncio.Event]


class _Timed:
    """An event that time sets, too: whoever asks or waits does not rely on a thread that may be held up."""

    def __init__(self, lease: Lease[Any]) -> None:
        super().__init__()
        self._lease = lease

    def is_set(self) -> bool:
        return self._lease._is_over()


class _Lost(_Timed, threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            super().wait(min(left, self._lease._nap()))
        return self.is_set()


class _AsyncLost(_Timed, asyncio.Event):
    async def wait(self) -> Literal[True]:
        while not self.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease._nap()):
                    await super().wait()
        return True


class PoolClient(contextlib.AbstractContextManager["PoolClient"]):
    """Borrows from the pools of the issuer at `url`; one client may hold many leases, in many threads.

    `timeout` is for each request, in seconds; leases are counted by `ticks`, a clock that never goes back; `options`
    are what httpx.Client takes: `auth` above all.
    """

    def __init__(self, url: str, *, timeout: float = 5, ticks: Clock = steady, **options: Any) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout, **options)
        self._timeout, self._ticks = timeout, ticks

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; leases that still run are not kept alive any more."""
        self._http.close()

    @contextlib.contextmanager
    def lease(self, pool: str, *, holder: str | None = None, wait: float = 0) -> Iterator[SyncLease]:
        """Hold a token of a pool; without `holder` the lease is in the user's name.

        While none is free this tries again, for `wait` seconds, then raises NoFreeToken. Raises UnknownPool,
        InsufficientScope, InvalidToken, InvalidRequest, IssuerUnavailable, and what `auth` raises.
        """
        lease = SyncLease(pool, holder, wait, self._timeout, self._ticks, _Lost)
        try:
            while (pause := lease._granted(self._http.request(**lease._wish()))) is not None:
                time.sleep(pause)
        except httpx.HTTPError as error:
            raise errors.IssuerUnavailable from error
        keeper = threading.Thread(target=self._keep, args=(lease,), name="lease-keeper", daemon=True)
        keeper.start()
        try:
            lease.check()
            yield lease
        finally:
            self._try(lease._return())
            keeper.join(self._timeout)

    def _keep(self, lease: SyncLease) -> None:
        while not lease.lost.wait(lease._nap(lease._due)):
            if lease._is_due():
                lease._answered(self._try(lease._claim("PUT")))
        self._try(lease._return())  # the issuer may have prolonged what is lost here

    def _try(self, question: Question | None) -> httpx.Response | None:
        with contextlib.suppress(Exception):  # whatever the network or `auth` is up to, a lease ends by itself
            return None if question is None else self._http.request(**question)
        return None


class AsyncPoolClient(contextlib.AbstractAsyncContextManager["AsyncPoolClient"]):
    """The same for asyncio: `lost` is an asyncio.Event, and `options` are what httpx.AsyncClient takes."""

    def __init__(self, url: str, *, timeout: float = 5, ticks: Clock = steady, **options: Any) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, **options)
        self._timeout, self._ticks = timeout, ticks
        self._ending: set[asyncio.Task[None]] = set()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Disconnect, after what is being given back."""
        if self._ending:
            await asyncio.wait(self._ending)
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def lease(self, pool: str, *, holder: str | None = None, wait: float = 0) -> AsyncIterator[AsyncLease]:
        """Hold a token of a pool, as PoolClient does; it is given back also when the task is cancelled."""
        lease = AsyncLease(pool, holder, wait, self._timeout, self._ticks, _AsyncLost)
        try:
            while (pause := lease._granted(await self._http.request(**lease._wish()))) is not None:  # noqa: ASYNC110
                await asyncio.sleep(pause)
        except httpx.HTTPError as error:
            raise errors.IssuerUnavailable from error
        keeper = asyncio.create_task(self._keep(lease))
        try:
            lease.check()
            yield lease
        finally:
            ending = asyncio.create_task(self._end(lease, keeper))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.shield(ending)

    async def _keep(self, lease: AsyncLease) -> None:
        while not lease.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(lease._nap(lease._due)):
                    await lease.lost.wait()
            if lease._is_due():
                lease._answered(await self._try(lease._claim("PUT")))
        await self._try(lease._return())

    async def _end(self, lease: AsyncLease, keeper: asyncio.Task[None]) -> None:
        await self._try(lease._return())
        await asyncio.wait([keeper])

    async def _try(self, question: Question | None) -> httpx.Response | None:
        with contextlib.suppress(Exception):
            return None if question is None else await self._http.request(**question)
        return None
