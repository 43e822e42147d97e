"""A lease as a client has it: what to ask, how to read the answer, when to ask again, and when it is over.

Nothing here does input or output: `tokenauth.client.pools` does, with threads or with tasks.
"""

import asyncio
import contextlib
import math
import random
import re
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from tokenauth import errors
from tokenauth.clock import Clock

Event = TypeVar("Event", threading.Event, asyncio.Event)

Question = dict[str, Any]
"""A request, as the `request` of both of httpx's clients takes it."""

Grant = tuple[str, str, int, int]
"""Token, holder, fence, and for how many seconds."""

_LOST = (errors.LeaseLost, errors.NotYourLease, errors.NotFound)
_KINDS = (*_LOST, errors.UnknownPool, errors.InvalidToken, errors.TokenRequired)
_PLAIN = {kind.code: kind for kind in _KINDS}


class Lease(Generic[Event]):
    """A token that is lent to this program, for as long as the program may count on that.

    `lost` is set from the instant on at which the time is up by the program's own clock, or the issuer says that
    the lease is over, or the token was given back. What is lost stays lost.
    """

    def __init__(
        self, pool: str, holder: str | None, wait: float, timeout: float, monotonic: Clock, lost: Callable[..., Event]
    ) -> None:
        """Begin as the wish for a token, for `wait` seconds; `lost` makes the event."""
        self.token, self.holder, self.fence = "", holder or "", 0
        self._url = f"/api/pools/{quote(pool, safe='')}/leases"
        self._wanted = {} if holder is None else {"holder": holder}
        self._timeout = timeout
        self._monotonic = monotonic
        self._sent = monotonic()
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
        self._sent = self._monotonic()
        return {"method": "POST", "url": self._url, "json": self._wanted}

    def _granted(self, answer: httpx.Response) -> float | None:
        """Take the answer to that; not None: wait for so long, then ask again. Raises Refusal."""
        try:
            self._begin(_read(answer))
        except errors.NoFreeToken:
            left = self._patience - self._monotonic()
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
        if self._monotonic() >= self._until:
            self._over = True  # and for good, even if an answer that prolongs it is being read at this moment
        return self._over

    def _nap(self, until: float = math.inf) -> float:
        """Say how long nobody need look at the clock: not long, since waits do not count the sleep of a machine."""
        return max(0.0, min(1, self._ttl / 100, min(until, self._until) - self._monotonic()))

    def _is_due(self) -> bool:
        return self._monotonic() >= self._due and not self._is_over()

    def _answered(self, answer: httpx.Response | None) -> None:
        """Take the answer to that, if there was any; one that comes too late changes nothing."""
        self._due = self._monotonic() + min(1, self._ttl / 10) * random.uniform(0.5, 1)  # noqa: S311
        try:
            grant = _read(answer) if answer is not None else None
        except _LOST:
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
        self._sent = self._monotonic()
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
