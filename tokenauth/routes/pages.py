"""Web pages of other origins: they may not make their visitor's browser call what needs no token.

A browser sends forms and plain GETs for any page, without asking first (CORS). A page could spend its visitor's
allowance of failed logins so, or take permits from a network that only the visitor can reach.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import ForeignPage

_OWN = (b"same-origin", b"none")
"""What a browser says in Sec-Fetch-Site of a page of the same origin, and of what a person typed."""

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class PageGuard:
    """ASGI app that refuses requests of pages whose origin is neither listed nor its own."""

    def __init__(self, app: ASGIApp, origins: Collection[str], safe: bool = False) -> None:
        """Guard an app. `origins` may call; `safe`: what only reads may be called from everywhere."""
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)
        self._open = _SAFE if safe else frozenset[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request. Raises ForeignPage."""
        if scope["method"] not in self._open:
            self._check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        origin = site = None
        host = b""
        for name, value in scope["headers"]:
            if name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"host":
                host = value
        if (site is None and origin is None) or site in _OWN or origin in self._origins:
            return
        if site is None and origin is not None and _same_host(origin, host):  # a browser that does not say its site
            return
        raise ForeignPage((origin or site or b"").decode("latin-1"))


def _same_host(origin: bytes, host: bytes) -> bool:
    """Whether an origin is that of the address that was asked. Behind a proxy its scheme is not known here."""
    try:
        found = urlsplit(origin.decode("latin-1")).netloc
    except ValueError:
        return False
    return bool(found) and found.lower() == host.decode("latin-1").lower()
