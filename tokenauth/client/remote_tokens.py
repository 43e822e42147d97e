"""RemoteTokens: validates tokens by asking tokenauth over HTTP, with a short cache."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import httpx

from tokenauth import values
from tokenauth.client import issuer
from tokenauth.clock import Clock, boottime
from tokenauth.errors import InvalidToken, IssuerUnavailable
from tokenauth.models import Login

Entry = TypeVar("Entry")

_log = logging.getLogger("tokenauth.client")
_KEEPALIVE_EXPIRY = 30.0
"""Seconds for which an idle connection is kept: less than tokenauth and common proxies keep it (60 to 75)."""

_MAX_LOOKUPS = 100
"""Requests at a time. More wait here, not in the connection pool of httpx, which has no limit.

With a limit, a request that is cancelled while it waits for a connection can take one with it, which never becomes free
again (https://github.com/encode/httpcore/issues/1093). After an outage under load, all of them were gone.
"""


class _LruCache(Generic[Entry]):
    def __init__(self, size: int) -> None:
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._size = size

    def get(self, digest: bytes) -> Entry | None:
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries.move_to_end(digest)
        return entry

    def put(self, digest: bytes, entry: Entry) -> None:
        self._entries[digest] = entry
        self._entries.move_to_end(digest)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def drop(self, digest: bytes) -> None:
        self._entries.pop(digest, None)


class _Confirmed(NamedTuple):
    login: Login
    asked_at: float


class _Lookup:
    """A request about one token, shared by all callers that need the result."""

    asked_at = math.inf  # not sent yet
    task: asyncio.Task[Login | None]


class RemoteTokens:
    """Validates tokens by asking tokenauth over HTTP. This is what a service passes to `TokenMiddleware`.

    Usage:

    ```python
    tokens = RemoteTokens("https://auth.example.com")
    app.add_middleware(TokenMiddleware, tokens=tokens)
    ```

    A request that arrives more than `max_age` seconds after its token was revoked is refused, and so is one whose token
    has expired. Until then a response is reused, counted from when it was requested. Requests with the same token that
    arrive at the same time share one lookup.

    If tokenauth is unreachable, `identify` raises `IssuerUnavailable`, which TokenMiddleware answers with 503. With
    `stale_grace`, a token that was confirmed at most `max_age + stale_grace` seconds ago is accepted instead. A revoked
    token can work that long.

    Use one instance per process and event loop, and close it at the end: with `async with`, or `aclose()`.

    **Parameters:**

    * **url** - Where tokenauth is, such as `"https://auth.example.com"`, with its path if it has one.
    * **max_age** - Seconds for which a response is reused; 0 asks for each request.
    * **stale_grace** - Seconds for which a confirmed token is still accepted while tokenauth is unreachable.
    * **cache_size** - Number of valid tokens that are cached, by their digests. Refused ones have a separate cache
    of the same size, so that made-up tokens cannot evict valid ones.
    * **timeout** - Seconds for one lookup, in all.
    * **client** - An `httpx.AsyncClient` to use, for your own certificates or proxies; you close it. Create it
    with `limits=httpx.Limits(max_connections=None)`: at most 100 are used. It follows no redirects here. By default, a
    client that ignores the proxies and the `.netrc` of the environment, so that tokens are sent to tokenauth only.
    * **clock** - The wall clock by which tokens expire, in Unix seconds.
    * **monotonic** - The clock by which cached responses age. It must never go back.
    """

    def __init__(
        self,
        url: str,
        *,
        max_age: float = 2.0,
        stale_grace: float = 0.0,
        cache_size: int = 10_000,
        timeout: float = 2.0,
        client: httpx.AsyncClient | None = None,
        clock: Clock = time.time,
        monotonic: Clock = boottime,
    ) -> None:
        if not (max_age >= 0 and stale_grace >= 0 and cache_size >= 1 and timeout > 0):
            raise ValueError("max_age and stale_grace: at least 0; cache_size: at least 1; timeout: more than 0")
        self._url = issuer.base_url(url)
        self._max_age = max_age
        self._stale_grace = stale_grace
        self._timeout = timeout
        self._own_client = client is None
        self._client = client or httpx.AsyncClient(
            trust_env=False,
            verify=issuer.create_ssl_context(),  # with SSL_CERT_FILE of the environment, but without its proxies
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_EXPIRY),
        )
        self._clock = clock
        self._monotonic = monotonic
        self._valid: _LruCache[_Confirmed] = _LruCache(cache_size)
        self._refused: _LruCache[float] = _LruCache(cache_size)
        self._lookups: dict[bytes, _Lookup] = {}
        self._tasks: set[asyncio.Task[Login | None]] = set()
        self._slots = asyncio.Semaphore(_MAX_LOOKUPS)
        self._reachable = True

    async def __aenter__(self) -> "RemoteTokens":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel pending lookups and close the connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._own_client:
            await self._client.aclose()

    async def identify(self, value: bytes) -> Login | None:
        """Return the login that a token proves, or None if the token is not valid.

        Raises IssuerUnavailable if tokenauth is unreachable.
        """
        digest = values.digest(value)
        if digest is None:
            return None
        arrived = self._monotonic()
        refused_at = self._refused.get(digest)
        if refused_at is not None and arrived - refused_at < self._max_age:
            return None
        confirmed = self._valid.get(digest)
        if confirmed is not None and arrived - confirmed.asked_at < self._max_age and self._is_live(confirmed.login):
            return confirmed.login
        return await self._look_up(digest, value, arrived)

    def _is_live(self, login: Login) -> bool:
        return self._clock() < login.token.expires_at

    async def _look_up(self, digest: bytes, value: bytes, arrived: float) -> Login | None:
        """Join a pending lookup that is not too old, or start one."""
        lookup = self._lookups.get(digest)
        if lookup is None or arrived - lookup.asked_at >= self._max_age:
            return await _wait(self._start(digest, value))
        now = self._clock()
        login = await _wait(lookup)
        if login is not None and now >= login.token.expires_at:  # it was still valid when the other caller asked
            login = await _wait(self._start(digest, value))
        return login

    def _start(self, digest: bytes, value: bytes) -> _Lookup:
        lookup = self._lookups[digest] = _Lookup()
        task = lookup.task = asyncio.create_task(self._ask(lookup, digest, value))
        self._tasks.add(task)

        def end(_: object) -> None:
            self._tasks.discard(task)
            if self._lookups.get(digest) is lookup:
                del self._lookups[digest]
            if not task.cancelled():
                task.exception()  # marks it as retrieved: all callers may have been cancelled

        task.add_done_callback(end)
        return lookup

    async def _ask(self, lookup: _Lookup, digest: bytes, value: bytes) -> Login | None:
        """Ask tokenauth and cache the result. If that fails, return a cached login if `stale_grace` allows it."""
        lookup.asked_at = self._monotonic()
        failure = ""
        try:
            login = await self._fetch(digest, value)
        except ValueError:
            failure = "its response is not one of tokenauth's"
        except _UnexpectedResponse as error:
            failure = str(error)
        except Exception as error:
            distrust = issuer.find_distrust(error)
            failure = f"its certificate is not trusted: {distrust}" if distrust else type(error).__name__
        # Not in the handlers: IssuerUnavailable would keep their exceptions as its context, and these reference the
        # request with its token.
        if failure:
            return self._stale(digest, failure)
        self._reachable = True
        self._cache(digest, login, lookup.asked_at)
        return login

    async def _fetch(self, digest: bytes, value: bytes) -> Login | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        async with asyncio.timeout_at(deadline):
            await self._slots.acquire()
        try:
            if deadline - loop.time() < self._timeout / 10:  # it would be cancelled while it opens a connection
                raise TimeoutError
            async with asyncio.timeout_at(deadline):
                response = await self._client.get(
                    f"{self._url}/api/me",
                    headers={"X-Token": value.decode()},
                    follow_redirects=False,
                    timeout=self._timeout,
                )
        finally:
            self._slots.release()
        if response.status_code == 200:
            return issuer.read(response, issuer.MeBody).login(digest)
        if response.status_code == 401 and issuer.read(response, issuer.ErrorBody).error == InvalidToken.code:
            return None
        raise _UnexpectedResponse(f"it answers {response.status_code}")

    def _cache(self, digest: bytes, login: Login | None, asked_at: float) -> None:
        # A later lookup may have finished first.
        confirmed, refused_at = self._valid.get(digest), self._refused.get(digest)
        if max(confirmed.asked_at if confirmed else -math.inf, refused_at or -math.inf) > asked_at:
            return
        if login is None:
            self._valid.drop(digest)
            self._refused.put(digest, asked_at)
        else:
            self._valid.put(digest, _Confirmed(login, asked_at))

    def _stale(self, digest: bytes, failure: str) -> Login:
        """Return a cached login that `stale_grace` still allows. Raises IssuerUnavailable if there is none."""
        if self._reachable:
            self._reachable = False
            _log.warning("tokenauth at %s is unreachable: %s.", self._url, failure)
        confirmed = self._valid.get(digest)
        if confirmed is None or not self._stale_grace or not self._is_live(confirmed.login):
            raise IssuerUnavailable
        if self._monotonic() - confirmed.asked_at > self._max_age + self._stale_grace:
            raise IssuerUnavailable
        return confirmed.login


class _UnexpectedResponse(Exception):
    """The response does not say whether the token is valid."""


async def _wait(lookup: _Lookup) -> Login | None:
    """Wait for the result. A caller that is cancelled leaves the lookup to the others."""
    await asyncio.wait([lookup.task])
    if lookup.task.cancelled():
        raise IssuerUnavailable
    return lookup.task.result()
