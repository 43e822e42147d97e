"""PoolClient and AsyncPoolClient: take a lease, keep it alive while it is used, and give it back.

They carry out what `tokenauth.client.lease` says: one with a thread for each lease, the other with a task.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Literal

import httpx

from tokenauth import errors
from tokenauth.client import redaction
from tokenauth.client.lease import Lease, Question
from tokenauth.clock import Clock, boottime

redaction.install()

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

    `timeout` is for each request, in seconds; `monotonic` is the clock that leases are timed by; `options` are what
    httpx.Client takes: `auth` above all.
    """

    def __init__(self, url: str, *, timeout: float = 5, monotonic: Clock = boottime, **options: Any) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout, **options)
        self._timeout, self._monotonic = timeout, monotonic

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
        lease = SyncLease(pool, holder, wait, self._timeout, self._monotonic, _Lost)
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

    def __init__(self, url: str, *, timeout: float = 5, monotonic: Clock = boottime, **options: Any) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, **options)
        self._timeout, self._monotonic = timeout, monotonic
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
        lease = AsyncLease(pool, holder, wait, self._timeout, self._monotonic, _AsyncLost)
        try:
            while (pause := lease._granted(await self._ask(lease))) is not None:  # noqa: ASYNC110
                await asyncio.sleep(pause)
        except httpx.HTTPError as error:
            raise errors.IssuerUnavailable from error
        keeper = asyncio.create_task(self._keep(lease))
        try:
            lease.check()
            yield lease
        finally:
            await asyncio.shield(self._start(self._end(lease, keeper)))

    async def _ask(self, lease: AsyncLease) -> httpx.Response:
        """Ask for a token; one that comes when nobody waits for it any more is given back."""
        asking = asyncio.create_task(self._http.request(**lease._wish()))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._start(self._undo(lease, asking))
            raise

    async def _undo(self, lease: AsyncLease, asking: "asyncio.Task[httpx.Response]") -> None:
        with contextlib.suppress(Exception):
            if lease._granted(await asking) is None:
                await self._try(lease._return())

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Do something that must be done before the client disconnects."""
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

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
