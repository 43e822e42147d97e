"""PoolClient and AsyncPoolClient: lease a token, keep the lease alive while it is used, release it.

One uses a thread for each lease, the other a task. What they send and how they read it is in `tokenauth.client.lease`.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Literal

import httpx

from tokenauth import errors
from tokenauth.client import issuer, redaction
from tokenauth.client.auth import TokenAuth
from tokenauth.client.lease import ClientLease, RequestArguments, Terms
from tokenauth.clock import Clock, boottime

redaction.install()

SyncLease = ClientLease[threading.Event]
AsyncLease = ClientLease[asyncio.Event]
OnWait = Callable[[int, int], object]

_LOG_OUT: RequestArguments = {"method": "DELETE", "url": "/api/token", "timeout": 2}


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
    with PoolClient("https://auth.example.com", auth=auth, log_out=True) as pools:
        with pools.lease("gpu", wait=60) as lease:
            while not lease.lost.is_set():
                train_one_batch(fence=lease.fence)
    ```

    **Parameters:**

    * **url** - Where tokenauth is, such as `"https://auth.example.com"`, with its path if it has one.
    * **timeout** - Seconds to connect, and to wait for each part of an answer.
    * **monotonic** - The clock that leases are timed by. It must never go back.
    * **log_out** - Whether `close` ends the login of `auth`, a `TokenAuth` that no other client uses.
    * **options** - Further arguments of `httpx.Client`, such as `auth`, `headers` or `verify`. It never follows
    redirects.
    """

    def __init__(
        self, url: str, *, timeout: float = 5, monotonic: Clock = boottime, log_out: bool = False, **options: Any
    ) -> None:
        self._http = httpx.Client(base_url=issuer.base_url(url), timeout=timeout, **_checked(options))
        self._timeout, self._monotonic, self._logs_out = timeout, monotonic, log_out

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Leases that are still live are no longer kept alive."""
        if self._logs_out and _logged_in(self._http.auth):
            self._try(_LOG_OUT)
        self._http.close()

    @contextlib.contextmanager
    def lease(
        self,
        pool: str,
        *,
        holder: str | None = None,
        wait: float = 0,
        request: str | None = None,
        count: int = 1,
        labels: Sequence[str] = (),
        priority: int = 0,
        ttl: float | None = None,
        on_wait: OnWait | None = None,
    ) -> Iterator[SyncLease]:
        """Hold a lease for the body of a `with` statement, and release it at the end.

        The lease is kept alive during the body. If that fails for too long, `lost` of the lease is set, but the body
        still runs: look at `lost`, or call `check()`, before each step that needs the token.

        **Parameters:**

        * **pool** - The name of the pool.
        * **holder** - The name of the holder, shown in listings; by default, the name of the user.
        * **wait** - Seconds for which to wait in line if no token is free.
        * **request** - Your own name for this request. With the same name, a program that was restarted keeps its
        place, or gets the lease that it has. By default a random one, which leaves the line when the wait is over.
        * **count** - Lease this many tokens, all or none. `grants` of the lease has them.
        * **labels** - Labels that each token must have, all of them.
        * **priority** - One point counts as a minute of waiting. More than 0 needs the pool's `manage_scope`.
        * **ttl** - Seconds from a keep-alive to the end of the lease, at most the pool's `lease_ttl`.
        * **on_wait** - Called with the position in the line (1 is the next) and the number of requests in it: at once
        if it must wait, then every few seconds.

        Raises `NoFreeToken`, `UnknownPool`, `InsufficientScope`, `InvalidToken`, `InvalidRequest` or
        `IssuerUnavailable` of `tokenauth.errors`, and what `auth` raises.
        """
        terms = Terms(pool, holder, wait, request, count, labels, priority, ttl, on_wait)
        lease = SyncLease(terms, self._timeout, self._monotonic, _LostEvent)
        keeper = threading.Thread(target=self._keep_alive, args=(lease,), name="lease-keeper", daemon=True)
        try:
            while (pause := self._ask(lease)) is not None:
                time.sleep(pause)
        except BaseException:  # KeyboardInterrupt, too
            self._give_up(lease)
            raise
        try:
            keeper.start()
            lease.check()
            yield lease
        finally:
            self._release(lease)
            if keeper.is_alive():
                keeper.join(self._timeout)

    def _ask(self, lease: SyncLease) -> float | None:
        """Ask for the lease. Return None if it was granted, else the seconds to wait before asking again."""
        try:
            response = self._http.request(**lease._acquire_request())
        except (httpx.HTTPError, errors.IssuerUnavailable) as error:
            return lease._not_answered(error)
        return lease._acquired(response)

    def _give_up(self, lease: SyncLease) -> None:
        """Leave the line, and release what was granted meanwhile, unless the caller named the request."""
        if lease._is_named:
            return
        left = self._try(lease._leave_request())
        if left is not None and left.status_code != 204:
            response = self._try(lease._recover_request())
            if response is not None:
                with contextlib.suppress(errors.Refusal):
                    lease._acquired(response)
        self._release(lease)

    def _keep_alive(self, lease: SyncLease) -> None:
        while not lease.lost.wait(lease._sleep_time(lease._next.keep_alive_at)):
            if lease._keep_alive_due():
                held = lease._next
                lease._kept_alive(held, self._send(lease._keep_alive_request(held)))
        if lease._monotonic() >= lease.ends_at:
            self._release(lease)  # a late keep-alive may have extended the lost lease on the server

    def _release(self, lease: SyncLease) -> None:
        for arguments in lease._release_requests():
            if self._try(arguments) is None:
                break

    def _try(self, arguments: RequestArguments | None) -> httpx.Response | None:
        reply = None if arguments is None else self._send(arguments)
        return reply if isinstance(reply, httpx.Response) else None

    def _send(self, arguments: RequestArguments) -> httpx.Response | Exception:
        try:
            return self._http.request(**arguments)
        except Exception as error:  # any failure of the network or of `auth`: the lease ends by itself
            return error


class AsyncPoolClient(contextlib.AbstractAsyncContextManager["AsyncPoolClient"]):
    """Leases tokens from the pools of tokenauth, for asyncio.

    Usage:

    ```python
    auth = TokenAuth("https://auth.example.com", "ci", "the-password-of-ci")
    async with AsyncPoolClient("https://auth.example.com", auth=auth, log_out=True) as pools:
        async with pools.lease("gpu", wait=60) as lease:
            await train(fence=lease.fence)
    ```

    The parameters are those of `PoolClient`; **options** are arguments of `httpx.AsyncClient`, and `lost` of a lease is
    an `asyncio.Event`.
    """

    def __init__(
        self, url: str, *, timeout: float = 5, monotonic: Clock = boottime, log_out: bool = False, **options: Any
    ) -> None:
        self._http = httpx.AsyncClient(base_url=issuer.base_url(url), timeout=timeout, **_checked(options))
        self._timeout, self._monotonic, self._logs_out = timeout, monotonic, log_out
        self._working: set[asyncio.Task[None]] = set()

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Wait until tokens that are being released are released, and close the connections."""
        if self._working:
            await asyncio.wait(self._working)
        if self._logs_out and _logged_in(self._http.auth):
            await self._try(_LOG_OUT)
        await self._http.aclose()

    @contextlib.asynccontextmanager
    async def lease(
        self,
        pool: str,
        *,
        holder: str | None = None,
        wait: float = 0,
        request: str | None = None,
        count: int = 1,
        labels: Sequence[str] = (),
        priority: int = 0,
        ttl: float | None = None,
        on_wait: OnWait | None = None,
    ) -> AsyncIterator[AsyncLease]:
        """Hold a lease for the body of an `async with` statement, as `PoolClient.lease` does.

        It is released also when the task is cancelled.
        """
        terms = Terms(pool, holder, wait, request, count, labels, priority, ttl, on_wait)
        lease = AsyncLease(terms, self._timeout, self._monotonic, _AsyncLostEvent)
        asking: asyncio.Task[httpx.Response] | None = None
        try:
            pause: float | None = 0
            while pause is not None:
                await asyncio.sleep(pause)
                asking = asyncio.create_task(self._http.request(**lease._acquire_request()))
                pause = await self._answer(lease, asking)
                asking = None
        except BaseException:
            self._start(self._give_up(lease, asking))
            raise
        keeper = asyncio.create_task(self._keep_alive(lease))
        try:
            lease.check()
            yield lease
        finally:
            await asyncio.shield(self._start(self._end(lease, keeper)))

    async def _answer(self, lease: AsyncLease, asking: "asyncio.Task[httpx.Response]") -> float | None:
        """Return None if the lease was granted, else the seconds to wait before asking again."""
        try:
            response = await asyncio.shield(asking)
        except (httpx.HTTPError, errors.IssuerUnavailable) as error:
            return lease._not_answered(error)
        return lease._acquired(response)

    async def _give_up(self, lease: AsyncLease, asking: "asyncio.Task[httpx.Response] | None") -> None:
        """Leave the line, and release what was granted meanwhile, unless the caller named the request."""
        if lease._is_named:
            if asking is not None:
                asking.cancel()
            return
        left = await self._try(lease._leave_request())
        gone = left is not None and left.status_code == 204
        response = None
        if asking is not None and gone:
            asking.cancel()
        elif asking is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self._timeout):
                    response = await asking
        if response is None and left is not None and not gone:
            response = await self._try(lease._recover_request())
        if response is not None:
            with contextlib.suppress(errors.Refusal):
                lease._acquired(response)
        await self._release(lease)

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task that `aclose` waits for."""
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return task

    async def _keep_alive(self, lease: AsyncLease) -> None:
        while not lease.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(lease._sleep_time(lease._next.keep_alive_at)):
                    await lease.lost.wait()
            if lease._keep_alive_due():
                held = lease._next
                lease._kept_alive(held, await self._send(lease._keep_alive_request(held)))
        if lease._monotonic() >= lease.ends_at:
            await self._release(lease)

    async def _end(self, lease: AsyncLease, keeper: asyncio.Task[None]) -> None:
        await self._release(lease)
        await asyncio.wait([keeper])

    async def _release(self, lease: AsyncLease) -> None:
        for arguments in lease._release_requests():
            if await self._try(arguments) is None:
                break

    async def _try(self, arguments: RequestArguments | None) -> httpx.Response | None:
        reply = None if arguments is None else await self._send(arguments)
        return reply if isinstance(reply, httpx.Response) else None

    async def _send(self, arguments: RequestArguments) -> httpx.Response | Exception:
        try:
            return await self._http.request(**arguments)
        except Exception as error:
            return error


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an httpx client. Raises ValueError for headers that cannot be sent."""
    return {
        # Each request that waits in line has a connection. A keep-alive must never wait for a free one.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
        **options,
        "headers": issuer.checked_headers(options.get("headers")),
        "follow_redirects": False,  # httpx would send X-Token to any origin
    }


def _logged_in(auth: httpx.Auth | None) -> bool:
    return isinstance(auth, TokenAuth) and auth.logged_in
