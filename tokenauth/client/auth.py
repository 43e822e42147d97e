"""TokenAuth: an httpx.Auth that logs in at tokenauth and sends the token with each request."""

import json
import os
import sys
import threading
import time
from asyncio import wait as wait_in_task
from asyncio import wrap_future
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_in_thread
from contextlib import closing, suppress
from typing import TypeAlias

import httpx

from tokenauth.client import issuer
from tokenauth.clock import Clock
from tokenauth.errors import InvalidCredentials, IssuerUnavailable, Refusal, TooManyAttempts

_Outcome: TypeAlias = issuer.LoginBody | Refusal | None
"""The result of a login; None if the request that was logging in was cancelled."""

_Step: TypeAlias = httpx.Request | Future[_Outcome] | None
"""What the flow does next: send a request, wait for the login of another request, or (None) end."""

_Reply: TypeAlias = httpx.Response | BaseException | None
"""What came of a step."""

_PAUSE = 10.0
"""Seconds for which a 401 causes no login after one that a new token did not change, or that was not repeated.

A service may have its own reasons for a 401: each request would cost a login.
"""


class TokenAuth(httpx.Auth):
    """Logs in at tokenauth and sends the token with each request of an httpx client.

    One instance can serve several clients (`httpx.Client` and `httpx.AsyncClient`), threads and tasks.

    Usage:

    ```python
    auth = TokenAuth("https://auth.example.com", "robot", "the-password-of-robot", origins=["https://stock.example.com"])
    client = httpx.Client(base_url="https://stock.example.com", auth=auth)
    ```

    The first request logs in, and so does the next one after the token has expired. If a request gets 401, TokenAuth
    logs in again and repeats it once. A request whose body cannot be sent twice is not repeated: the next one logs in.
    If a new token gets 401 too, a 401 of that origin causes no login for 10 seconds.

    When several requests need a token at the same time, one of them logs in. If that fails, all of them raise
    `InvalidCredentials`, `TooManyAttempts` or `IssuerUnavailable` of `tokenauth.errors`. A request waits for the login
    of another no longer than for its own response, and then raises `IssuerUnavailable`.

    A login lives until it expires, and a login beyond `tokens.per_user` ends the user's oldest one. So end it when the
    program ends: `client.delete("https://auth.example.com/api/token")`.

    **Parameters:**

    * **url** - Where tokenauth is, such as `"https://auth.example.com"`, with its path if it has one.
    * **username**, **password** - The user to log in.
    * **origins** - The origins that may receive the token, such as `["https://stock.example.com"]`, besides that of
    `url`. By default, the origin of the first request. A request to another origin raises `ValueError`, and nothing is
    sent.
    * **bearer** - Send the token as `Authorization: Bearer`, which httpx keeps when it follows a redirect within an
    origin. By default it is sent as `X-Token`, which no redirect carries along.
    * **clock** - The wall clock by which the token expires, in Unix seconds.
    """

    def __init__(
        self,
        url: str,
        username: str,
        password: str,
        *,
        origins: Iterable[str] | None = None,
        bearer: bool = False,
        clock: Clock = time.time,
    ) -> None:
        if isinstance(origins, str):
            raise TypeError("origins: takes a list of strings, not one string")
        self._url = httpx.URL(f"{issuer.base_url(url)}/api/token")
        self._username = username
        self._password = password
        self._origins = None if origins is None else {_origin(httpx.URL(origin)) for origin in origins}
        self._bearer = bearer
        self._clock = clock
        self._lock = threading.Lock()
        self._login: issuer.LoginBody | None = None
        self._paused_until: dict[str, float] = {}
        """By origin: until then, a 401 is not taken to be about the token."""
        self._pending: dict[tuple[int, str], Future[_Outcome]] = {}
        """The login in progress: by process, since none ends in a fork, and among threads and among tasks: neither
        can wait for the other."""

    def __repr__(self) -> str:
        return f"TokenAuth({str(self._url)!r}, {self._username!r})"

    @property
    def logged_in(self) -> bool:
        """Whether there is a login that has not expired, as far as is known."""
        with self._lock:
            return self._login is not None and self._clock() < self._login.expiry_time

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send one request; called by httpx.Client."""
        with closing(self._steps(request, "threads")) as steps:  # in any case, so that no other request waits forever
            step = next(steps)
            while step is not None:
                reply: _Reply = None
                if isinstance(step, Future):
                    wait_in_thread([step], _read_timeout(request))
                else:
                    try:
                        reply = yield step
                        if step is not request:
                            reply.read()
                    except GeneratorExit as exit:  # there is no response; httpx is about to raise the reason
                        reply = exit
                    except httpx.HTTPError as error:
                        reply = error
                    if isinstance(reply, GeneratorExit):
                        reply = sys.exception() or reply
                step = steps.send(reply)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send one request; called by httpx.AsyncClient."""
        with closing(self._steps(request, "tasks")) as steps:
            step = next(steps)
            while step is not None:
                reply: _Reply = None
                if isinstance(step, Future):
                    await wait_in_task([wrap_future(step)], timeout=_read_timeout(request))
                else:
                    try:
                        reply = yield step
                        if step is not request:
                            await reply.aread()
                    except GeneratorExit as exit:
                        reply = exit
                    except httpx.HTTPError as error:
                        reply = error
                    if isinstance(reply, GeneratorExit):
                        reply = sys.exception() or reply
                step = steps.send(reply)

    def _steps(self, request: httpx.Request, kind: str) -> Generator[_Step, _Reply, None]:
        """Run the flow of one request, for both kinds of clients. Each step is sent the reply to it."""
        origin = self._check_origin(request.url)
        refused = None
        while (token := (yield from self._obtain(request, kind, refused))) is not None:
            reply = yield self._sign(request, token)
            response = reply.response if isinstance(reply, httpx.HTTPStatusError) else reply
            if not isinstance(response, httpx.Response) or response.status_code != 401:
                break
            if response.request is not request and not self._bearer:
                break  # after a redirect, which does not carry the token along
            now = self._clock()
            if 0 < self._paused_until.get(origin, now) - now <= _PAUSE:
                break  # a new token did not help
            if refused is None and response is reply and isinstance(request.stream, httpx.ByteStream):
                refused = token
                continue
            self._paused_until[origin] = now + _PAUSE
            if refused is None:
                self._drop(token)
            break
        yield None

    def _obtain(self, request: httpx.Request, kind: str, refused: str | None) -> Generator[_Step, _Reply, str | None]:
        """Return a token other than the `refused` one; None if this request was cancelled while it logged in.

        Raises the Refusal that a login ended with.
        """
        key = os.getpid(), kind
        while True:
            with self._lock:
                current = self._login
                if current is not None and current.token != refused and self._clock() < current.expiry_time:
                    return current.token
                pending = self._pending.get(key)
                own = pending is None
                if pending is None:
                    pending = self._pending[key] = Future()
            if own:
                yield from self._log_in(request, key, pending)
            else:
                yield pending
                if not pending.done():
                    raise IssuerUnavailable
            outcome = pending.result()
            if isinstance(outcome, issuer.LoginBody):
                return outcome.token
            if outcome is not None:
                raise outcome.with_traceback(None) from None
            if own:
                return None

    def _log_in(
        self, request: httpx.Request, key: tuple[int, str], pending: "Future[_Outcome]"
    ) -> Generator[_Step, _Reply, None]:
        outcome = None
        try:
            login_request = self._login_request(request)
            reply = yield login_request
            outcome = _outcome(login_request, reply)
            _erase(login_request, reply)
        finally:
            with self._lock:
                if isinstance(outcome, issuer.LoginBody):
                    self._login = outcome
                del self._pending[key]
            pending.set_result(outcome)

    def _login_request(self, request: httpx.Request) -> httpx.Request:
        body = json.dumps({"username": self._username, "password": self._password})
        headers = {"Content-Type": "application/json", "User-Agent": "tokenauth.client"}
        timeout = {name: value for name, value in request.extensions.items() if name == "timeout"}
        login_request = httpx.Request("POST", self._url, headers=headers, content=body, extensions=timeout)
        login_request.stream = _OneTimeBody(login_request.content)
        return login_request

    def _sign(self, request: httpx.Request, token: str) -> httpx.Request:
        if self._bearer:
            request.headers["Authorization"] = f"Bearer {token}"
        else:
            request.headers = _HeadersWithToken(request.headers, token)
        return request

    def _check_origin(self, url: httpx.URL) -> str:
        """Return the origin of a URL. Raises ValueError if it must not receive the token."""
        origin, home = _origin(url), _origin(self._url)
        with self._lock:
            if self._origins is None and origin != home:
                self._origins = {origin, home}
            if origin == home or (self._origins is not None and origin in self._origins):
                return origin
        raise ValueError(f"TokenAuth has no token for {origin}: name it in `origins` if it may receive one.")

    def _drop(self, token: str) -> None:
        with self._lock:
            if self._login is not None and self._login.token == token:
                self._login = None


class _OneTimeBody(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that can be sent once, so that no redirect carries the password elsewhere."""

    def __init__(self, body: bytes) -> None:
        self._parts = [body]

    def __iter__(self) -> Iterator[bytes]:
        yield self._take()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._take()

    def _take(self) -> bytes:
        if not self._parts:
            raise httpx.StreamConsumed
        return self._parts.pop()


class _HeadersWithToken(httpx.Headers):
    """Headers with an X-Token that is sent, but not copied: httpx copies headers for a redirect."""

    def __init__(self, headers: httpx.Headers, token: str) -> None:
        self._token = token.encode()  # first: super().__init__ reads `raw`
        super().__init__(headers)
        self.pop("X-Token", None)

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        """The headers as they are sent."""
        return [*super().raw, (b"X-Token", self._token)]

    def __reduce__(self) -> tuple[type[httpx.Headers], tuple[list[tuple[bytes, bytes]]]]:
        # Pickles and copies do not contain it either.
        return httpx.Headers, (super().raw,)


def _read_timeout(request: httpx.Request) -> float | None:
    seconds: float | None = request.extensions.get("timeout", {}).get("read")
    return seconds


def _erase(login_request: httpx.Request, reply: _Reply) -> None:
    """Remove password and token from what httpx keeps in the history of a response."""
    login_request._content = b""
    if isinstance(reply, httpx.Response):
        reply._content = b""


def _outcome(login_request: httpx.Request, reply: _Reply) -> _Outcome:
    if isinstance(reply, httpx.HTTPStatusError):  # raised by a hook of the client
        reply = reply.response
    if isinstance(reply, httpx.HTTPError | httpx.StreamError):
        return issuer.unavailable(reply)
    if not isinstance(reply, httpx.Response):
        return None
    if reply.request is not login_request:  # redirected, to any server
        return IssuerUnavailable()
    return _read(reply)


def _read(response: httpx.Response) -> issuer.LoginBody | Refusal:
    if response.status_code == 200:
        with suppress(ValueError):
            return issuer.read(response, issuer.LoginBody)
    if response.status_code == 401:
        with suppress(httpx.StreamError):  # a hook of the client did not read it
            if response.content == InvalidCredentials.description.encode():
                return InvalidCredentials()
    retry_after = issuer.retry_after(response) or 1
    if response.status_code == 429:
        return TooManyAttempts(retry_after=retry_after)
    return IssuerUnavailable(retry_after=retry_after)


def _origin(url: httpx.URL) -> str:
    """Return the origin of a URL. httpx leaves out a default port."""
    return f"{url.scheme}://{url.netloc.decode()}"
