"""The state of a lease in a client: which requests to send, how to read the responses, when the lease is lost.

There is no I/O here. `tokenauth.client.pools` does it, with threads or with tasks.
"""

import asyncio
import contextlib
import math
import random
import re
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpx

from tokenauth import errors
from tokenauth.client import issuer
from tokenauth.clock import Clock

Event = TypeVar("Event", threading.Event, asyncio.Event)

RequestArguments = dict[str, Any]
"""Arguments for the `request` method of httpx.Client and httpx.AsyncClient."""


class Grant(NamedTuple):
    """A granted or extended lease. `ttl` is in seconds."""

    token: str
    holder: str
    fence: int
    ttl: int


_LOST = (errors.LeaseLost, errors.NotYourLease, errors.UnknownToken)
_WITHOUT_ARGUMENTS = {
    kind.code: kind for kind in (*_LOST, errors.UnknownPool, errors.InvalidToken, errors.TokenRequired)
}


class ClientLease(Generic[Event]):
    """A token that is leased to this program.

    Attributes:
    * **token** - The value of the token.
    * **holder** - The name in which it is leased.
    * **fence** - The fencing token: a number that grows with each lease of this token. Send it along with each write to
    the resource that the lease protects, and have that resource refuse a smaller number than it has seen.
    * **ttl** - Seconds for which it is leased from each keep-alive on.
    * **ends_at** - When it ends unless it is kept alive again, by the `monotonic` clock of the client.
    * **on_change** - Called after each change of `ends_at`, and when the lease is lost, if you set it.
    * **lost** - An event that is set as soon as the program can no longer rely on the lease: its time is up by the
    program's own clock, the server says that it is over, or the token was released. It is never cleared.

    """

    def __init__(
        self,
        pool: str,
        holder: str | None,
        wait: float,
        timeout: float,
        monotonic: Clock,
        new_event: Callable[..., Event],
    ) -> None:
        self.token, self.holder, self.fence = "", holder or "", 0
        self._url = f"/api/pools/{quote(pool, safe='')}/leases"
        self._body = {} if holder is None else {"holder": holder}
        self._timeout = timeout
        self._monotonic = monotonic
        self._sent_at = monotonic()
        self._give_up_at = self._sent_at + wait
        self.ttl = self._keep_alive_at = self.ends_at = math.inf
        self.on_change: Callable[[], object] | None = None
        self._is_lost = self._released = False
        self.lost: Event = new_event(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} holder={self.holder!r} fence={self.fence!r}>"

    def check(self) -> None:
        """Raise LeaseLost if the program can no longer rely on the lease."""
        if self._check_lost():
            raise errors.LeaseLost

    def _acquire_request(self) -> RequestArguments:
        self._sent_at = self._monotonic()
        return {"method": "POST", "url": self._url, "json": self._body}

    def _acquired(self, response: httpx.Response) -> float | None:
        """Read the response. Return None if a token was leased, else the seconds to wait before trying again.

        Raises Refusal.
        """
        try:
            self._start(_read(response))
        except errors.NoFreeToken:
            left = self._give_up_at - self._monotonic()
            if left <= 0:
                raise
            # Not Retry-After: that is the end of a lease, and tokens are often released before.
            return min(left, random.uniform(0.5, 1))  # noqa: S311 # not a secret
        return None

    def _start(self, grant: Grant) -> None:
        # From when the request was sent: the server starts to count later.
        self.token, self.holder, self.fence, self.ttl = grant
        self._keep_alive_at = self._sent_at + self.ttl / 3
        self.ends_at = self._sent_at + self.ttl
        self._changed()

    def _check_lost(self) -> bool:
        if self._monotonic() >= self.ends_at:
            self._is_lost = True  # for good, even if a response that extends the lease arrives now
        return self._is_lost

    def _sleep_time(self, until: float = math.inf) -> float:
        """Return how long to sleep before the clock must be read again.

        This is short, because a sleep does not count the time that the machine is suspended.
        """
        return max(0.0, min(1, self.ttl / 100, min(until, self.ends_at) - self._monotonic()))

    def _keep_alive_due(self) -> bool:
        return self._monotonic() >= self._keep_alive_at and not self._check_lost()

    def _kept_alive(self, response: httpx.Response | None) -> None:
        """Read the response, if there is one. After the lease is lost, it changes nothing."""
        retry = min(1, self.ttl / 10) * random.uniform(0.5, 1)  # noqa: S311 # not a secret
        self._keep_alive_at = self._monotonic() + retry
        try:
            grant = _read(response) if response is not None else None
        except _LOST:
            self._released = True
            self._lose()
        except errors.Refusal:
            return
        else:
            if grant is not None and not self._check_lost():
                self._start(grant)

    def _release_request(self) -> RequestArguments | None:
        """Return the request that releases the token; None if it was released before or the lease is known to be over.

        The lease is lost from now on.
        """
        self._lose()
        released, self._released = self._released, True
        return None if released else self._lease_request("DELETE")

    def _keep_alive_request(self) -> RequestArguments:
        return self._lease_request("PUT")

    def _lose(self) -> None:
        self._is_lost = True
        self.lost.set()
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _lease_request(self, method: str) -> RequestArguments:
        self._sent_at = self._monotonic()
        url = f"{self._url}/{quote(self.token, safe='')}"
        timeout = min(self._timeout, self.ttl / 3)  # a keep-alive that hangs leaves time for a second one
        return {"method": method, "url": url, "json": {"holder": self.holder, "fence": self.fence}, "timeout": timeout}


def _read(response: httpx.Response) -> Grant:
    """Return the granted lease. Raises Refusal."""
    with contextlib.suppress(ValueError):
        match response.json():
            case {"token": str(token), "holder": str(holder), "fence": int(fence), "expires_in": int(ttl)} if ttl > 0:
                return Grant(token, holder, fence, ttl)
            case {"error": str(code), "error_description": str(description)}:
                raise _refusal(response, code, description)
    raise errors.IssuerUnavailable


def _refusal(response: httpx.Response, code: str, description: str) -> errors.Refusal:
    if code == errors.NoFreeToken.code:
        return errors.NoFreeToken(issuer.retry_after(response))
    if code == errors.InsufficientScope.code:
        scope = re.search('scope="([^"]*)"', response.headers.get("www-authenticate", ""))
        return errors.InsufficientScope(*(scope[1].split() if scope else ()))
    if code == errors.InvalidRequest.code:
        return errors.InvalidRequest(description)
    if code == errors.UnknownToken.code:  # it also means a wrong URL: the description says which
        return errors.UnknownToken(description)
    if code in _WITHOUT_ARGUMENTS:
        return _WITHOUT_ARGUMENTS[code]()
    return errors.IssuerUnavailable(retry_after=issuer.retry_after(response) or 1)
