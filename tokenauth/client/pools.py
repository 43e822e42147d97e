"""PoolClient and AsyncPoolClient: lease a token, keep the lease alive while it is used, release it.

One uses a thread for each lease, the other a task. What they send and how they read it is in `tokenauth.client.lease`.
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
from tokenauth.client.lease import ClientLease, RequestArguments
from tokenauth.clock import Clock, boottime

redaction.install()

SyncLease = ClientLease[threading.Event]
AsyncLease = ClientLease[asyncio.Event]


class _ExpiringEvent:
    """An event that is also set when the lease has expired, even if the thread or task that keeps it alive is late."""

    def __init__(self, lease: ClientLease[Any]) -> None:
        super().__init__()
        self._lease = lease

    def is_set(self) -> bool:
        return self._lease._check_lost()


class _LostEvent(_ExpiringEvent, threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left := end - time.monotonic()) > 0:
            super().wait(min(left, self._lease._sleep_time()))
        return self.is_set()


class _AsyncLostEvent(_ExpiringEvent, asyncio.Event):
    async def wait(self) -> Literal[True]:
        while not self.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease._sleep_time()):
                    await super().wait()
        return True


class PoolClient(contextlib.AbstractContextManager["PoolClient"]):
    """Leases tokens from the pools of tokenauth.

    One client can hold many leases, in many threads.

    Usage:

    ```python
    auth = TokenAuth("https://auth.example.com", "ci", "the-password-of-ci")
    with PoolClient("https://auth.example.com", auth=auth) as pools:
        with pools.lease("gpu", wait=60) as lease:
            while not lease.lost.is_set():
                train_one_batch(fence=lease.fence)
    ```

    **Parameters:**

    * **url** - Where tokenauth is, such as `"https://auth.example.com"`, with its path if it has one.
    * **timeout** - Seconds that each request may take.
    * **monotonic** - The clock that leases are timed by. It must never go back.
    * **options** - Further arguments of `httpx.Client`, such as `auth`, `headers` or `verify`.
    """

    def __init__(self, url: str, *, timeout: float = 5, monotonic: Clock = boottime, **options: Any) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout, **options)
        self._timeout, self._monotonic = timeout, monotonic

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Leases that are still live are no longer kept alive."""
        self._http.close()

    @contextlib.contextmanager
    def lease(self, pool: str, *, holder: str | None = None, wait: float = 0) -> Iterator[SyncLease]:
        """Hold a lease for the body of a `with` statement, and release it at the end.

        The lease is kept alive during the body. If that fails for too long, `lost` of the lease is set, but the body
        still runs: look at `lost`, or call `check()`, before each step that needs the token.

        **Parameters:**

        * **pool** - The name of the pool.
        * **holder** - The name of the holder, shown in listings; by default, the name of the user.
        * **wait** - Seconds for which to try again while no token is free.

        Raises `NoFreeToken`, `UnknownPool`, `InsufficientScope`, `InvalidToken`, `InvalidRequest` or
        `IssuerUnavailable` of `tokenauth.errors`, and what `auth` raises.
        """
        lease = SyncLease(pool, holder, wait, self._timeout, self._monotonic, _LostEvent)
        try:
            while (pause := lease._acquired(self._http.request(**lease._acquire_request()))) is not None:
                time.sleep(pause)
        except httpx.HTTPError as error:
            raise errors.IssuerUnavailable from error
        keeper = threading.Thread(target=self._keep_alive, args=(lease,), name="lease-keeper", daemon=True)
        keeper.start()
        try:
            lease.check()
            yield lease
        finally:
            self._try(lease._release_request())
            keeper.join(self._timeout)

    def _keep_alive(self, lease: SyncLease) -> None:
        while not lease.lost.wait(lease._sleep_time(lease._keep_alive_at)):
            if lease._keep_alive_due():
                lease._kept_alive(self._try(lease._keep_alive_request()))
        self._try(lease._release_request())  # a late keep-alive may have extended the lost lease on the server

    def _try(self, arguments: RequestArguments | None) -> httpx.Response | None:
        with contextlib.suppress(Exception):  # any failure of the network or of `auth`: the lease ends by itself
            return None if arguments is None else self._http.request(**arguments)
        return None


class AsyncPoolClient(contextlib.AbstractAsyncContextManager["AsyncPoolClient"]):
    """Leases tokens from the pools of tokenauth, for asyncio.

    Usage:

    ```python
    auth = TokenAuth("https://auth.example.com", "ci", "the-password-of-ci")
    async with AsyncPoolClient("https://auth.example.com", auth=auth) as pools:
        async with pools.lease("gpu", wait=60) as lease:
            await train(fence=lease.fence)
    ```

    The parameters are those of `PoolClient`; **options** are arguments of `httpx.AsyncClient`, and `lost` of a lease is
    an `asyncio.Event`.
    """

    def __init__(self, url: str, *, timeout: float = 5, monotonic: Clock = boottime, **options: Any) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, **options)
        self._timeout, self._monotonic = timeout, monotonic
        self._releasing: set[asyncio.Task[None]] = set()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Wait until tokens that are being released are released, and close the connections."""
        if self._releasing:
            await asyncio.wait(self._releasing)
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def lease(self, pool: str, *, holder: str | None = None, wait: float = 0) -> AsyncIterator[AsyncLease]:
        """Hold a lease for the body of an `async with` statement, as `PoolClient.lease` does.

        It is released also when the task is cancelled.
        """
        lease = AsyncLease(pool, holder, wait, self._timeout, self._monotonic, _AsyncLostEvent)
        try:
            while (pause := lease._acquired(await self._acquire(lease))) is not None:  # noqa: ASYNC110 - it waits for a server
                await asyncio.sleep(pause)
        except httpx.HTTPError as error:
            raise errors.IssuerUnavailable from error
        keeper = asyncio.create_task(self._keep_alive(lease))
        try:
            lease.check()
            yield lease
        finally:
            await asyncio.shield(self._start(self._release(lease, keeper)))

    async def _acquire(self, lease: AsyncLease) -> httpx.Response:
        """Request a token. If this is cancelled, the token that may still be granted is released."""
        request = asyncio.create_task(self._http.request(**lease._acquire_request()))
        try:
            return await asyncio.shield(request)
        except asyncio.CancelledError:
            self._start(self._release_unused(lease, request))
            raise

    async def _release_unused(self, lease: AsyncLease, request: "asyncio.Task[httpx.Response]") -> None:
        with contextlib.suppress(Exception):
            if lease._acquired(await request) is None:
                await self._try(lease._release_request())

    def _start(self, release: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task that `aclose` waits for."""
        task = asyncio.create_task(release)
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        return task

    async def _keep_alive(self, lease: AsyncLease) -> None:
        while not lease.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(lease._sleep_time(lease._keep_alive_at)):
                    await lease.lost.wait()
            if lease._keep_alive_due():
                lease._kept_alive(await self._try(lease._keep_alive_request()))
        await self._try(lease._release_request())

    async def _release(self, lease: AsyncLease, keeper: asyncio.Task[None]) -> None:
        await self._try(lease._release_request())
        await asyncio.wait([keeper])

    async def _try(self, arguments: RequestArguments | None) -> httpx.Response | None:
        with contextlib.suppress(Exception):
            return None if arguments is None else await self._http.request(**arguments)
        return None
