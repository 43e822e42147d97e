"""The state of a lease in a client: which requests to send, how to read the responses, when the lease is lost.

There is no I/O here. `tokenauth.client.pools` does it, with threads or with tasks.
"""

import asyncio
import contextlib
import math
import random
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from tokenauth import errors
from tokenauth.client import issuer
from tokenauth.clock import Clock
from tokenauth.models import NAME_PATTERN

Event = TypeVar("Event", threading.Event, asyncio.Event)

RequestArguments = dict[str, Any]
"""Arguments for the `request` method of httpx.Client and httpx.AsyncClient."""

_LONGEST_WAIT = 30
"""Seconds for which the server holds one request: less than proxies wait for an answer."""

_POSITION_WAIT = 5
"""The same if the program wants to know its position."""

_REPEATS = 2
"""How often a request that was not answered is repeated after its wait, unless it is known to have a place in line."""

_LOST = (errors.LeaseLost, errors.NotYourLease, errors.UnknownToken)
_REFUSALS: dict[str, type[errors.Refusal]] = {
    kind.code: kind
    for kind in (
        errors.Forbidden,
        errors.InvalidRequest,
        errors.InvalidToken,
        errors.LeaseLost,
        errors.PlaceLost,
        errors.RequestDiffers,
        errors.TokenRequired,
        errors.TooManyLeases,
        errors.TooManyPlaces,
        errors.UnknownPool,
        errors.UnknownToken,
    )
}
"""By the code in an answer: refusals that take its description."""


class Grant(msgspec.Struct, frozen=True):
    """One leased token, as the server answers. A named member has `name` and `labels`."""

    token: str
    holder: str
    fence: int
    ttl: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] = msgspec.field(name="expires_in")
    """Seconds."""
    name: str | None = None
    labels: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Grant holder={self.holder!r} fence={self.fence!r} name={self.name!r}>"


class Place(NamedTuple):
    """A place in the waiting line, as the server answers."""

    position: int
    waiting: int
    retry_after: int | None


@dataclass(frozen=True)
class Terms:
    """The arguments of `lease` of both clients."""

    pool: str
    holder: str | None
    wait: float
    request: str | None
    count: int
    labels: Sequence[str]
    priority: int
    ttl: float | None
    on_wait: Callable[[int, int], object] | None

    def body(self) -> dict[str, Any]:
        """Return the body of the request, without what has its default."""
        count = self.count if self.count != 1 else None  # with `count`, the answer is a list
        ttl = self.ttl if self.ttl is None or self.ttl % 1 else int(self.ttl)  # tokenauth takes whole seconds
        body = {
            "holder": self.holder,
            "count": count,
            "labels": [*self.labels] or None,
            "priority": self.priority or None,
            "ttl": ttl,
        }
        return {name: value for name, value in body.items() if value is not None}


class _Held:
    """A leased token, and how long its lease lasts."""

    def __init__(self, grant: Grant, sent_at: float) -> None:
        self.over = False
        self.extend(grant, sent_at)

    def extend(self, grant: Grant, sent_at: float) -> None:
        # From when the request was sent: the server starts to count later.
        self.grant = grant
        self.keep_alive_at = sent_at + grant.ttl / 3
        self.ends_at = sent_at + grant.ttl


class ClientLease(Generic[Event]):
    """A token, or several, leased to this program.

    Attributes:
    * **token** - The value of the token; of the first one, if there are several.
    * **holder** - The name in which it is leased.
    * **fence** - The fencing token: a number that grows with each lease of this token. Send it along with each write to
    the resource that the lease protects, and have that resource refuse a smaller number than it has seen.
    * **name**, **labels** - Those of the member if the pool has named members, else `None` and `()`.
    * **grants** - All tokens, each with its `token`, `fence`, `name` and `labels`.
    * **ttl** - Seconds for which the lease was granted.
    * **ends_at** - When it ends unless it is kept alive again, by the `monotonic` clock of the client.
    * **lost_reason** - What the server said when it refused to keep the lease alive, else `None`. If a manager has
    ended the lease, it names the manager and the reason.
    * **failing_since** - When the first of the keep-alives was sent that the server has not answered as tokenauth
    does, by the `monotonic` clock of the client; `None` if it has answered the last one.
    * **on_change** - Called after each change of `ends_at`, and when the lease is lost, if you set it.
    * **lost** - An event that is set as soon as the program can no longer rely on the lease: its time is up by the
    program's own clock, the server says that it is over, or the token was released. It is never cleared. With several
    tokens, it is set as soon as one of them is lost.

    """

    def __init__(self, terms: Terms, timeout: float, monotonic: Clock, new_event: Callable[..., Event]) -> None:
        if isinstance(terms.labels, str):
            raise TypeError("labels: takes a list of strings, not one string")
        if not re.fullmatch(NAME_PATTERN, terms.pool):
            raise errors.UnknownPool  # and it could be another address
        self.token, self.holder, self.fence = "", terms.holder or "", 0
        self.name: str | None = None
        self.labels: tuple[str, ...] = ()
        self.ttl = math.inf
        self.lost_reason: str | None = None
        self.failing_since: float | None = None
        self.on_change: Callable[[], object] | None = None
        self._terms = terms
        self._pool_url = f"/api/pools/{terms.pool}"
        self._timeout = timeout
        self._monotonic = monotonic
        self._sent_at = monotonic()
        self._give_up_at = self._sent_at + terms.wait
        self._request = terms.request or (secrets.token_hex(16) if terms.wait > 0 else None)
        self._wait = 0.0
        self._in_line = self._may_be_in_line = False
        self._repeats_left = _REPEATS
        self._held: list[_Held] = []
        self._unconfirmed: list[_Held] = []
        self._is_lost = self._released = False
        self.lost: Event = new_event(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} holder={self.holder!r} fence={self.fence!r}>"

    @property
    def grants(self) -> tuple[Grant, ...]:
        """All tokens."""
        return tuple(held.grant for held in self._held)

    @property
    def ends_at(self) -> float:
        """When the lease ends unless it is kept alive again, by the `monotonic` clock of the client."""
        return min((held.ends_at for held in self._held), default=math.inf)

    def check(self) -> None:
        """Raise LeaseLost if the program can no longer rely on the lease."""
        if self._check_lost():
            raise errors.LeaseLost(self.lost_reason)

    def _acquire_request(self) -> RequestArguments:
        """Return the next request on the way to the lease."""
        if self._unconfirmed:
            return self._keep_alive_request(self._unconfirmed[0])
        self._sent_at = self._monotonic()
        body = self._terms.body()
        if self._request is not None:
            body["request"] = self._request
        if self._terms.wait > 0:
            longest = _LONGEST_WAIT
            if self._terms.on_wait is not None:
                longest = _POSITION_WAIT if self._in_line else 0
            self._wait = max(0.0, min(longest, self._give_up_at - self._sent_at))
            body["wait"] = round(self._wait, 3)
            self._may_be_in_line = True
        timeout = httpx.Timeout(self._timeout, read=self._timeout + self._wait)
        return {"method": "POST", "url": f"{self._pool_url}/leases", "json": body, "timeout": timeout}

    def _acquired(self, response: httpx.Response) -> float | None:
        """Read the response. Return None if the lease can be used, else the seconds to wait before the next request.

        Raises Refusal.
        """
        try:
            answer = _read(response)
        except errors.IssuerUnavailable as error:
            return self._repeat(error)
        except errors.Refusal:
            self._may_be_in_line = False
            raise
        if not isinstance(answer, Place):
            if self._unconfirmed:
                self._unconfirmed.pop(0).extend(answer[0], self._sent_at)
            else:
                self._start(answer)
                if self._wait > 0 and self._monotonic() - self._sent_at > self.ttl / 10:
                    # The server has waited before it granted the lease, and the client cannot know how long. Kept
                    # alive, the lease lasts from when that is sent.
                    self._unconfirmed = [*self._held]
            self._may_be_in_line = bool(self._unconfirmed)
            return 0 if self._unconfirmed else None
        self._in_line = True
        if self._terms.on_wait is not None:
            self._terms.on_wait(answer.position, answer.waiting)
        now = self._monotonic()
        if now >= self._give_up_at:
            raise errors.NoFreeToken(answer.retry_after)
        early = now < self._sent_at + self._wait - 1  # a server that stops, and has kept the place
        return _random(0.5) if early else 0

    def _not_answered(self, error: httpx.HTTPError | errors.IssuerUnavailable) -> float:
        """Return the seconds to wait before asking again. Raises IssuerUnavailable when the wait is over."""
        unavailable = issuer.unavailable(error)
        # The text of an HTTPStatusError, which only a hook of the program raises, has the URL, perhaps with a token.
        unavailable.__cause__ = error if isinstance(error, httpx.RequestError) else None
        if unavailable.distrust and not self._in_line:  # waiting does not help
            raise unavailable
        return self._repeat(unavailable)

    def _repeat(self, error: errors.IssuerUnavailable) -> float:
        """Ask again with the same `request`, which keeps the place, or gets the lease whose answer was lost."""
        if self._monotonic() < self._give_up_at:
            return _random(1)
        if self._in_line or self._request is None or self._repeats_left == 0:
            raise error
        self._repeats_left -= 1
        return _random(0.2)

    @property
    def _is_named(self) -> bool:
        """Whether the caller named the request: a program that is restarted gets its place, or its lease."""
        return self._terms.request is not None

    def _leave_request(self) -> RequestArguments | None:
        """Return the request that leaves the line; None if there is no place to give up."""
        if not self._may_be_in_line:
            return None
        return {"method": "DELETE", "url": f"{self._pool_url}/requests/{self._request}"}

    def _recover_request(self) -> RequestArguments:
        """Return the request whose answer is the lease that was granted, if the answer was lost."""
        self._sent_at, self._wait, self._unconfirmed = self._monotonic(), 0, []
        body = {**self._terms.body(), "request": self._request}
        return {"method": "POST", "url": f"{self._pool_url}/leases", "json": body}

    def _start(self, grants: Sequence[Grant]) -> None:
        self._held = [_Held(grant, self._sent_at) for grant in grants]
        first = grants[0]
        self.token, self.holder, self.fence = first.token, first.holder, first.fence
        self.ttl = first.ttl
        self.name, self.labels = first.name, first.labels

    def _check_lost(self) -> bool:
        if self._monotonic() >= self.ends_at:
            self._is_lost = True  # for good, even if a response that extends the lease arrives now
        return self._is_lost

    def _sleep_time(self, until: float = math.inf) -> float:
        """Return how long to sleep before the clock must be read again.

        This is short, because a sleep does not count the time that the machine is suspended.
        """
        return max(0.0, min(1, self.ttl / 100, min(until, self.ends_at) - self._monotonic()))

    @property
    def _next(self) -> _Held:
        """The token that must be kept alive next."""
        return min(self._held, key=lambda held: held.keep_alive_at)

    def _keep_alive_due(self) -> bool:
        return self._monotonic() >= self._next.keep_alive_at and not self._check_lost()

    def _kept_alive(self, held: _Held, reply: httpx.Response | Exception) -> None:
        """Read the reply. After the lease is lost, it changes nothing."""
        now = self._monotonic()
        pause = min(1, self.ttl / 10)
        if isinstance(reply, errors.InvalidCredentials | errors.TooManyAttempts):
            pause = max(pause, (held.ends_at - now) / 2)  # each failed login delays other logins of this user
        held.keep_alive_at = now + _random(pause)
        if self.failing_since is None:
            self.failing_since = self._sent_at
        try:
            answer = _read(reply) if isinstance(reply, httpx.Response) else None
        except _LOST as refusal:
            held.over = True
            self.failing_since = None
            self.lost_reason = str(refusal)
            self._lose()
        except errors.Refusal:
            return
        else:
            if isinstance(answer, list):
                self.failing_since = None
            if isinstance(answer, list) and not self._check_lost():
                held.extend(answer[0], self._sent_at)
                self._changed()

    def _release_requests(self) -> Iterator[RequestArguments]:
        """Return the requests that release what was not released before, and is not known to be over.

        The lease is lost from now on.
        """
        self._lose()
        released, self._released = self._released, True
        return iter(()) if released else (self._lease_request("DELETE", held) for held in self._held if not held.over)

    def _keep_alive_request(self, held: _Held) -> RequestArguments:
        return self._lease_request("PUT", held)

    def _lose(self) -> None:
        self._is_lost = True
        self.lost.set()
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _lease_request(self, method: str, held: _Held) -> RequestArguments:
        self._sent_at = self._monotonic()
        url = f"{self._pool_url}/leases/{quote(held.grant.token, safe='')}"
        timeout = min(self._timeout, self.ttl / 3)  # a keep-alive that hangs leaves time for a second one
        body = {"holder": held.grant.holder, "fence": held.grant.fence}
        return {"method": method, "url": url, "json": body, "timeout": timeout}


def _random(seconds: float) -> float:
    """Return a pause of about this length, so that clients do not ask in step."""
    return seconds * random.uniform(0.5, 1)  # noqa: S311 # not a secret


def _read(response: httpx.Response) -> list[Grant] | Place:
    """Return the granted leases, or the place in the line. Raises Refusal."""
    with contextlib.suppress(ValueError):
        match document := issuer.read(response, dict[str, Any]):
            case {"position": int(position), "waiting": int(waiting)}:
                seconds = document.get("retry_after")
                return Place(position, waiting, seconds if isinstance(seconds, int) else None)
            case {"leases": [_, *_] as leases}:
                return _grants(leases)
            case {"token": str()}:
                return _grants([document])
            case {"error": str(code), "error_description": str(description)}:
                raise _refusal(response, code, description)
    raise errors.IssuerUnavailable


def _grants(leases: Sequence[object]) -> list[Grant]:
    """Return granted leases. Raises ValueError if they are none."""
    try:
        return msgspec.convert(leases, list[Grant])
    except msgspec.ValidationError:
        raise ValueError("this is not a lease of tokenauth") from None


def _refusal(response: httpx.Response, code: str, description: str) -> errors.Refusal:
    if code == errors.NoFreeToken.code:
        return errors.NoFreeToken(issuer.retry_after(response), description)
    if code == errors.InsufficientScope.code:
        scope = re.search('scope="([^"]*)"', response.headers.get("www-authenticate", ""))
        return errors.InsufficientScope(*(scope[1].split() if scope else ()))
    if description == errors.NotYourLease.description:
        return errors.NotYourLease()
    if code in _REFUSALS:
        return _REFUSALS[code](description)
    return errors.IssuerUnavailable(retry_after=issuer.retry_after(response) or 1)
