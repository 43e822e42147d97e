"""TokenAuth: logs in at the issuer, and sends the token along with each request of an httpx client."""

import json
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

_Outcome: TypeAlias = issuer.Grant | Refusal | None
"""How a login ended; None: whoever was about it was cancelled."""

_Step: TypeAlias = httpx.Request | Future[_Outcome] | None
"""What is to be done next: send a request, or wait for somebody else's login; None: no more."""

_Reply: TypeAlias = httpx.Response | BaseException | None


class TokenAuth(httpx.Auth):
    """Lets an httpx client, sync or async, log in at the issuer at `url` and send its token.

    The first request logs in, and so does the next one after the token has expired. A request that is answered 401
    logs in again and is repeated, once; one whose body cannot be sent twice is not: the next request logs in. However
    many requests wait for a token, one of them logs in, and if that fails, it fails for all of them: they raise
    InvalidCredentials, TooManyAttempts or IssuerUnavailable, which is also raised when it takes longer than a request
    may wait for its own answer. One TokenAuth may serve many clients, threads and tasks.

    The token goes to the origins in `origins` and to the issuer's; without that, to the issuer's and to the one
    that is asked first. For any other, ValueError is raised and nothing is sent. It goes as X-Token, which no redirect
    takes along, not even to the same origin; with `bearer` as `Authorization: Bearer`, which httpx keeps for a
    redirect within an origin and withholds from any other.
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
        """Log in at `url`, for example "https://auth.example.com", when a token is needed."""
        if isinstance(origins, str):
            raise TypeError("origins: takes a list of strings, not one string")
        self._url = httpx.URL(f"{issuer.address(url)}/api/token")
        self._username = username
        self._password = password
        self._origins = None if origins is None else {_origin(httpx.URL(origin)) for origin in origins}
        self._bearer = bearer
        self._clock = clock
        self._lock = threading.Lock()
        self._grant: issuer.Grant | None = None
        self._under_way: dict[str, Future[_Outcome]] = {}

    def __repr__(self) -> str:
        return f"TokenAuth({str(self._url)!r}, {self._username!r})"

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send one request, for httpx.Client."""
        with closing(self._steps(request, "threads")) as steps:  # whatever happens, nobody waits for ever
            step = next(steps)
            while step is not None:
                reply: _Reply = None
                if isinstance(step, Future):
                    wait_in_thread([step], _patience(request))
                else:
                    try:
                        reply = yield step
                        if step is not request:
                            reply.read()
                    except GeneratorExit as left:  # there is no answer; why, is what httpx is about to raise
                        reply = left
                    except httpx.HTTPError as error:
                        reply = error
                    if isinstance(reply, GeneratorExit):
                        reply = sys.exception() or reply
                step = steps.send(reply)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send one request, for httpx.AsyncClient."""
        with closing(self._steps(request, "tasks")) as steps:
            step = next(steps)
            while step is not None:
                reply: _Reply = None
                if isinstance(step, Future):
                    await wait_in_task([wrap_future(step)], timeout=_patience(request))
                else:
                    try:
                        reply = yield step
                        if step is not request:
                            await reply.aread()
                    except GeneratorExit as left:
                        reply = left
                    except httpx.HTTPError as error:
                        reply = error
                    if isinstance(reply, GeneratorExit):
                        reply = sys.exception() or reply
                step = steps.send(reply)

    def _steps(self, request: httpx.Request, kind: str) -> Generator[_Step, _Reply, None]:
        """Say step by step what is to be sent or awaited, whatever kind of client it is for."""
        self._admit(request.url)
        refused = None
        while (token := (yield from self._obtain(request, kind, refused))) is not None:
            reply = yield self._sign(request, token)
            answer = reply.response if isinstance(reply, httpx.HTTPStatusError) else reply
            if refused is not None or not isinstance(answer, httpx.Response) or answer.status_code != 401:
                break
            if answer.request is not request and not self._bearer:
                break  # a redirect was followed, and the token was not taken along
            if answer is not reply or not isinstance(request.stream, httpx.ByteStream):
                self._drop(token)
                break
            refused = token
        yield None

    def _obtain(self, request: httpx.Request, kind: str, refused: str | None) -> Generator[_Step, _Reply, str | None]:
        """Return a token that may be valid; None when this request is not to go on. Raises what a login does."""
        while True:
            with self._lock:
                grant = self._grant
                if grant is not None and grant.token != refused and self._clock() < grant.expiry_time:
                    return grant.token
                login = self._under_way.get(kind)
                mine = login is None
                if login is None:
                    login = self._under_way[kind] = Future()
            if mine:
                yield from self._log_in(request, kind, login)
            else:
                yield login
                if not login.done():
                    raise IssuerUnavailable
            outcome = login.result()
            if isinstance(outcome, issuer.Grant):
                return outcome.token
            if outcome is not None:
                raise outcome.with_traceback(None) from None
            if mine:
                return None

    def _log_in(self, request: httpx.Request, kind: str, login: "Future[_Outcome]") -> Generator[_Step, _Reply, None]:
        """Log in, and tell all who wait how it ended."""
        outcome = None
        try:
            question = self._question(request)
            reply = yield question
            outcome = _judge(question, reply)
            _forget(question, reply)
        finally:
            with self._lock:
                if isinstance(outcome, issuer.Grant):
                    self._grant = outcome
                del self._under_way[kind]
            login.set_result(outcome)

    def _question(self, request: httpx.Request) -> httpx.Request:
        body = json.dumps({"username": self._username, "password": self._password})
        headers = {"Content-Type": "application/json", "User-Agent": "tokenauth.client"}
        timeout = {name: value for name, value in request.extensions.items() if name == "timeout"}
        question = httpx.Request("POST", self._url, headers=headers, content=body, extensions=timeout)
        question.stream = _Once(question.content)
        return question

    def _sign(self, request: httpx.Request, token: str) -> httpx.Request:
        if self._bearer:
            request.headers["Authorization"] = f"Bearer {token}"
        else:
            request.headers = _Sealed(request.headers, token)
        return request

    def _admit(self, url: httpx.URL) -> None:
        """Raise ValueError for an origin that must not see the token."""
        origin, home = _origin(url), _origin(self._url)
        with self._lock:
            if self._origins is None and origin != home:
                self._origins = {origin, home}
            if origin == home or (self._origins is not None and origin in self._origins):
                return
        raise ValueError(f"TokenAuth has no token for {origin}: name it in `origins` if it may see one.")

    def _drop(self, token: str) -> None:
        with self._lock:
            if self._grant is not None and self._grant.token == token:
                self._grant = None


class _Once(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that can be sent once: no redirect takes the password elsewhere."""

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


class _Sealed(httpx.Headers):
    """Headers with an X-Token that goes onto the wire, and into no copy: httpx copies them for a redirect."""

    def __init__(self, headers: httpx.Headers, token: str) -> None:
        self._token = token.encode()  # first: reading the others looks at `raw`
        super().__init__(headers)
        self.pop("X-Token", None)

    @property
    def raw(self) -> list[tuple[bytes, bytes]]:
        """List what is sent."""
        return [*super().raw, (b"X-Token", self._token)]

    def __reduce__(self) -> tuple[type[httpx.Headers], tuple[list[tuple[bytes, bytes]]]]:
        """Leave it out of what is pickled or copied, too."""
        return httpx.Headers, (super().raw,)


def _patience(request: httpx.Request) -> float | None:
    """Say for how many seconds a request may wait for somebody else's login: for as long as for its own answer."""
    seconds: float | None = request.extensions.get("timeout", {}).get("read")
    return seconds


def _forget(question: httpx.Request, reply: _Reply) -> None:
    """Take the password and the token out of what httpx keeps in the history of the answer."""
    question._content = b""
    if isinstance(reply, httpx.Response):
        reply._content = b""


def _judge(question: httpx.Request, reply: _Reply) -> _Outcome:
    """Say how a login ended."""
    if isinstance(reply, httpx.HTTPStatusError):  # a hook of the client's has raised it
        reply = reply.response
    if isinstance(reply, httpx.HTTPError | httpx.StreamError):
        return IssuerUnavailable()
    if not isinstance(reply, httpx.Response):
        return None
    if reply.request is not question:  # there was a redirect, and who knows where to
        return IssuerUnavailable()
    return _read(reply)


def _read(response: httpx.Response) -> issuer.Grant | Refusal:
    if response.status_code == 200:
        with suppress(ValueError):
            return issuer.read(response, issuer.Grant)
    if response.status_code == 401:
        with suppress(httpx.StreamError):  # it was not read
            if response.content == InvalidCredentials.description.encode():
                return InvalidCredentials()
    if response.status_code == 429:
        return TooManyAttempts(retry_after=issuer.retry_after(response))
    return IssuerUnavailable(retry_after=issuer.retry_after(response))


def _origin(url: httpx.URL) -> str:
    """Name the origin of an address; httpx leaves out the port where it is the scheme's own."""
    return f"{url.scheme}://{url.netloc.decode()}"
