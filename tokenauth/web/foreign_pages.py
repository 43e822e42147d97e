"""Web pages of other origins: they may not make their visitor's browser call what needs no token.

A browser sends forms and plain GETs for any page, without asking first (CORS). A page could spend its visitor's
allowance of failed logins so, or take permits from a network that only the visitor can reach.

A page whose own name resolves to the address of this service is of the same origin for the browser (DNS rebinding).
Only the Host header tells: it has the name of the page. A page cannot choose an IP address or `localhost` there.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.settings.model import ServerSettings
from tokenauth.web.exceptions import ForeignPage

_OWN = (b"same-origin", b"none")
"""What a browser says in Sec-Fetch-Site of a page of the same origin, and of what a person typed."""

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Hosts:
    """The hosts at which pages may call the service; programs may call at any."""

    def __init__(self, origins: Collection[str] = (), names: Collection[str] | None = None) -> None:
        """Let pages call at these names, at `localhost`, and at IP addresses; None: at any name.

        `origins` may call at any name, too.
        """
        self._origins = frozenset(origin.encode() for origin in origins)
        self._names = names

    @classmethod
    def of(cls, server: ServerSettings, issuer: str) -> "Hosts":
        """Limit them where it is known how the service is called: it has an issuer, or no one else can reach it."""
        names = {urlsplit(issuer).hostname or ""} if issuer else set()
        limited = bool(issuer) or (server.loopback and not server.trusted_proxies)
        return cls(server.cors_origins, names if limited else None)

    def check(self, scope: Scope) -> None:
        """Raise ForeignPage for a page that calls at another host."""
        if self._names is None:
            return
        origin, site, host = _page(scope)
        if (site is None and origin is None) or origin in self._origins:
            return
        if not self._knows(host.decode("latin-1")):
            raise ForeignPage("", host.decode("latin-1"))

    def _knows(self, host: str) -> bool:
        assert self._names is not None
        try:
            name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        except ValueError:
            return False
        if name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class PageGuard:
    """ASGI app that refuses requests of pages whose origin is neither listed nor its own."""

    def __init__(self, app: ASGIApp, origins: Collection[str], hosts: Hosts, safe: bool = False) -> None:
        """Guard an app. `origins` may call, and others at `hosts`; `safe`: every page may call what only reads."""
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)
        self._hosts = hosts
        self._open = _SAFE if safe else frozenset[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request. Raises ForeignPage."""
        if scope["method"] not in self._open:
            self._check(scope)
            self._hosts.check(scope)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        origin, site, host = _page(scope)
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


def _page(scope: Scope) -> tuple[bytes | None, bytes | None, bytes]:
    """Return what a browser says of the page that calls: Origin, Sec-Fetch-Site and Host."""
    origin = site = None
    host = b""
    for name, value in scope["headers"]:
        if name == b"origin":
            origin = value
        elif name == b"sec-fetch-site":
            site = value
        elif name == b"host":
            host = value
    return origin, site, host
