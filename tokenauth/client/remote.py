"""RemoteTokens: asks the issuer whether a token is valid, and remembers what it said for a short time."""

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
_KEPT_ALIVE = 30.0
"""Seconds for which an idle connection is kept: less than the 60 to 75 of common proxies, and of tokenauth."""


class _Recent(Generic[Entry]):
    """A memory with a bound: what was used longest ago is forgotten first."""

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
    """A login that the issuer has confirmed, and when it was asked."""

    login: Login
    asked_at: float


class _Question:
    """One token that the issuer is asked about, for all who want to know."""

    asked_at = math.inf  # it has not been sent
    answer: asyncio.Task[Login | None]


class RemoteTokens:
    """Says whether a token is valid, by asking the issuer at `url`: TokenMiddleware takes it for its `tokens`.

    A request that arrives more than `max_age` seconds after its token was revoked is refused, and so is one that
    arrives when the token has expired. Until then an answer is used again, counted from the instant at which the
    issuer was asked; requests for one token that arrive at the same time share a question.

    When the issuer cannot be asked, nobody is let through: `identify` raises IssuerUnavailable, which
    TokenMiddleware answers with 503. With `stale_grace`, a token that the issuer has confirmed no more than
    `max_age + stale_grace` seconds ago is taken instead; that is how long a revoked one may live then.

    Of valid tokens at most `size` are remembered, by their digests, and of refused ones as many beside them.
    `timeout` is for the whole of a question. A `client` that is passed in is used as it is set up, but follows no
    redirect, and stays open; without one, proxies and .netrc of the environment are not used: a token goes straight to
    the issuer. `clock` and `monotonic` say the time of day, and how time goes on. All use is in one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        max_age: float = 2.0,
        stale_grace: float = 0.0,
        size: int = 10_000,
        timeout: float = 2.0,
        client: httpx.AsyncClient | None = None,
        clock: Clock = time.time,
        monotonic: Clock = boottime,
    ) -> None:
        """Ask the issuer at `url`. Raises ValueError for what makes no sense."""
        if not (max_age >= 0 and stale_grace >= 0 and size >= 1 and timeout > 0):
            raise ValueError("max_age and stale_grace: at least 0; size: at least 1; timeout: more than 0")
        self._url = issuer.address(url)
        self._max_age = max_age
        self._stale_grace = stale_grace
        self._timeout = timeout
        self._own_client = client is None
        self._client = client or httpx.AsyncClient(
            trust_env=False, limits=httpx.Limits(max_connections=100, keepalive_expiry=_KEPT_ALIVE)
        )
        self._clock = clock
        self._monotonic = monotonic
        self._valid: _Recent[_Confirmed] = _Recent(size)
        self._refused: _Recent[float] = _Recent(size)  # apart, so that made-up tokens push out no good one
        self._questions: dict[bytes, _Question] = {}
        self._asking: set[asyncio.Task[Login | None]] = set()
        self._reachable = True

    async def __aenter__(self) -> "RemoteTokens":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the questions that are under way, and close the connections."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        if self._own_client:
            await self._client.aclose()

    async def identify(self, value: bytes) -> Login | None:
        """Return whose token this is; None for one that is not valid.

        Raises IssuerUnavailable when that cannot be known.
        """
        digest = values.digest(value)
        if digest is None:
            return None
        arrived = self._monotonic()
        refused_at = self._refused.get(digest)
        if refused_at is not None and arrived - refused_at < self._max_age:
            return None
        confirmed = self._valid.get(digest)
        if confirmed is not None and arrived - confirmed.asked_at < self._max_age and self._lives(confirmed.login):
            return confirmed.login
        return await self._answer(digest, value, arrived)

    def _lives(self, login: Login) -> bool:
        return self._clock() < login.token.expires_at

    async def _answer(self, digest: bytes, value: bytes, arrived: float) -> Login | None:
        """Wait for the issuer's answer: to a question that is under way and not too old, or to one's own."""
        question = self._questions.get(digest)
        if question is None or arrived - question.asked_at >= self._max_age:
            return await _wait(self._begin(digest, value))
        time_of_day = self._clock()
        login = await _wait(question)
        if login is not None and time_of_day >= login.token.expires_at:  # it was valid when the other one asked
            login = await _wait(self._begin(digest, value))
        return login

    def _begin(self, digest: bytes, value: bytes) -> _Question:
        question = self._questions[digest] = _Question()
        task = question.answer = asyncio.create_task(self._ask(question, digest, value))
        self._asking.add(task)

        def end(_: object) -> None:
            self._asking.discard(task)
            if self._questions.get(digest) is question:
                del self._questions[digest]
            if not task.cancelled():
                task.exception()  # all who waited may have gone

        task.add_done_callback(end)
        return question

    async def _ask(self, question: _Question, digest: bytes, value: bytes) -> Login | None:
        """Ask the issuer and remember what it says, or do without it as far as that is allowed."""
        question.asked_at = self._monotonic()
        trouble = ""
        try:
            login = await self._fetch(digest, value)
        except ValueError:
            trouble = "its answer is not one of tokenauth's"
        except _Unexpected as error:
            trouble = str(error)
        except Exception as error:
            trouble = type(error).__name__
        if trouble:  # told outside of the handlers: their exceptions know the request, and so the token
            return self._do_without(digest, trouble)
        self._reachable = True
        self._remember(digest, login, question.asked_at)
        return login

    async def _fetch(self, digest: bytes, value: bytes) -> Login | None:
        async with asyncio.timeout(self._timeout):
            response = await self._client.get(
                f"{self._url}/api/me",
                headers={"X-Token": value.decode()},
                follow_redirects=False,
                timeout=self._timeout,
            )
        if response.status_code == 200:
            return issuer.read(response, issuer.Me).login(digest)
        if response.status_code == 401 and issuer.read(response, issuer.Error).error == InvalidToken.code:
            return None
        raise _Unexpected(f"it answers {response.status_code}")

    def _remember(self, digest: bytes, login: Login | None, asked_at: float) -> None:
        """Keep an answer, unless one to a later question has come before it."""
        confirmed, refused_at = self._valid.get(digest), self._refused.get(digest)
        if max(confirmed.asked_at if confirmed else -math.inf, refused_at or -math.inf) > asked_at:
            return
        if login is None:
            self._valid.drop(digest)
            self._refused.put(digest, asked_at)
        else:
            self._valid.put(digest, _Confirmed(login, asked_at))

    def _do_without(self, digest: bytes, trouble: str) -> Login:
        """Take what was confirmed not too long ago. Raises IssuerUnavailable when that is not allowed."""
        if self._reachable:
            self._reachable = False
            _log.warning("The issuer of tokens at %s cannot be asked: %s.", self._url, trouble)
        confirmed = self._valid.get(digest)
        if confirmed is None or not self._stale_grace or not self._lives(confirmed.login):
            raise IssuerUnavailable
        if self._monotonic() - confirmed.asked_at > self._max_age + self._stale_grace:
            raise IssuerUnavailable
        return confirmed.login


class _Unexpected(Exception):
    """The issuer gave an answer that says nothing about a token."""


async def _wait(question: _Question) -> Login | None:
    """Wait for an answer; whoever is cancelled meanwhile leaves the question to the others."""
    await asyncio.wait([question.answer])
    if question.answer.cancelled():
        raise IssuerUnavailable
    return question.answer.result()
