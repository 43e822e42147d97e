"""What trusted reverse proxies say about a request: X-Forwarded-For, X-Forwarded-Proto and the like."""

import ipaddress
from collections.abc import Awaitable, Sequence
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tokenauth.addresses import LOCAL

_TRUSTED = "tokenauth.trusted_proxy"
_MAPPED = int(ipaddress.IPv6Address("::ffff:0.0.0.0"))


class ProxyHeaders:
    """uvicorn's middleware. Its own option, in place of this, would trust this machine by default."""

    def __init__(self, app: ASGIApp, proxies: Sequence[str], on_socket: bool = False) -> None:
        """Trust these proxies. On a Unix socket, trust any peer: the mode of its file says who can connect."""
        trusted = [*_with_mapped(proxies), *([LOCAL] if on_socket else [])]
        self._on_socket = on_socket
        self._app = ProxyHeadersMiddleware(cast(Any, app), trusted)  # its types are uvicorn's own
        self._trusted = self._app.trusted_hosts

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Replace the client's address and the scheme by those that a trusted proxy sends."""
        client = scope.get("client")
        if client is None and self._on_socket:
            scope["client"] = client = (LOCAL, 0)
        scope[_TRUSTED] = client is not None and client[0] in self._trusted
        return self._app(cast(Any, scope), cast(Any, receive), cast(Any, send))


def is_from_trusted_proxy(scope: Scope) -> bool:
    """Return whether the peer of a request is a trusted proxy."""
    return bool(scope.get(_TRUSTED))


def _with_mapped(proxies: Sequence[str]) -> list[str]:
    """Add the IPv4-mapped IPv6 address of each IPv4 address, and the other way round: a socket may report either."""
    networks = list(map(ipaddress.ip_network, proxies))
    for network in list(networks):
        first = network.network_address
        if isinstance(first, ipaddress.IPv4Address):
            networks.append(ipaddress.ip_network((_MAPPED | int(first), 96 + network.prefixlen)))
        elif first.ipv4_mapped is not None and network.prefixlen >= 96:
            networks.append(ipaddress.ip_network((first.ipv4_mapped, network.prefixlen - 96)))
    return list(map(str, networks))
