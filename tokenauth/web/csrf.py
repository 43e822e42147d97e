"""Protection against cross-site request forgery (CSRF) and DNS rebinding.

CSRF: a web page of another origin makes its visitor's browser send requests. Browsers send forms and plain GET requests
to any origin without a CORS preflight. Such a page could use up the visitor's failed logins, or lease permits on a
network that only the visitor can reach.

DNS rebinding: the host name of a page resolves to this service, so the browser treats both as one origin. The Host
header still has the name of the page, which cannot be an IP address or `localhost`.
"""

import ipaddress
from collections.abc import Awaitable, Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.settings.model import ServerSettings
from tokenauth.web.exceptions import ForeignHost, ForeignOrigin

OWN_ORIGIN = frozenset({b"same-origin", b"none"})
"""Sec-Fetch-Site of requests from pages of the same origin, and of addresses that a person typed."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110 section 9.2.1)."""


class Hosts:
    """The hosts under which web pages may call the service. Programs may use any."""

    def __init__(self, origins: Collection[str], names: Collection[str] | None) -> None:
        """Allow pages to use these names, `localhost` and IP addresses; None allows any name.

        Pages of `origins` may use any name, too.
        """
        self._origins = frozenset(origin.encode() for origin in origins)
        self._names = names

    @classmethod
    def from_settings(cls, server: ServerSettings, issuer: str, login_page: str = "") -> "Hosts":
        """Limit the names if they are known: there is an issuer, or only this machine can reach the service.

        The login page alone limits its own forms only: pages may call the API under a name of their own.
        """
        names = {urlsplit(url).hostname or "" for url in (issuer, login_page) if url}
        limited = bool(issuer) or (server.loopback and not server.behind_proxy)
        return cls(server.cors_origins, names if limited else None)

    def check(self, scope: Scope) -> None:
        """Raise ForeignHost if a page calls the service under another host."""
        if self._names is None:
            return
        origin, site, host = _page_headers(scope)
        if (site is None and origin is None) or origin in self._origins:
            return
        if not self._is_allowed(host.decode("latin-1")):
            raise ForeignHost(host.decode("latin-1"))

    def _is_allowed(self, host: str) -> bool:
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


class CsrfMiddleware:
    """ASGI middleware that refuses requests of pages whose origin is neither listed nor the service's own."""

    def __init__(self, app: ASGIApp, origins: Collection[str], hosts: Hosts, allow_safe_methods: bool = False) -> None:
        """Allow pages of `origins`, and of this service at `hosts`.

        `allow_safe_methods`: pages of any origin may send GET, HEAD and OPTIONS.
        """
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)
        self._hosts = hosts
        self._allowed_methods = SAFE_METHODS if allow_safe_methods else frozenset[str]()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Guard one request. Raises ForeignOrigin or ForeignHost."""
        if scope["method"] not in self._allowed_methods:
            origin, site, host = _page_headers(scope)
            if origin is not None or site is not None:  # a page, not a program
                self._check(origin, site, host)
                self._hosts.check(scope)
        return self._app(scope, receive, send)

    def _check(self, origin: bytes | None, site: bytes | None, host: bytes) -> None:
        if site in OWN_ORIGIN or origin in self._origins:
            return
        if site is None and origin is not None and _same_host(origin, host):  # a browser without Sec-Fetch-Site
            return
        raise ForeignOrigin((origin or site or b"").decode("latin-1"))


def _same_host(origin: bytes, host: bytes) -> bool:
    """Return whether an origin has the host of the request. Behind a proxy, the scheme is not known here."""
    try:
        found = urlsplit(origin.decode("latin-1")).netloc
    except ValueError:
        return False
    return bool(found) and found.lower() == host.decode("latin-1").lower()


def _page_headers(scope: Scope) -> tuple[bytes | None, bytes | None, bytes]:
    """Return the headers Origin, Sec-Fetch-Site and Host."""
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
