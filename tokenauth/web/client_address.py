"""The address of a request's client, for the throttle and the log."""

from functools import lru_cache
from ipaddress import ip_address

from starlette.types import Scope

from tokenauth.addresses import LOCAL, network
from tokenauth.logs import log
from tokenauth.web.asgi_extensions import logged_once

MAX_ADDRESS = 64
"""Characters of an address that are read; the longest IPv6 address has 45, before its zone."""

MAX_PEERS = 100
"""Networks of untrusted proxies that each process logs; strangers can send the header from any number of them."""


def client_address(scope: Scope) -> str:
    """Return the address of the peer, or the one that a trusted proxy names; "unknown" if it is not an IP address.

    Return LOCAL for a peer on a Unix socket that names none.
    """
    client = scope.get("client")
    if not client:
        return ""
    if client[0] == LOCAL:
        _warn_of_missing(logged_once(scope))
        return LOCAL
    address = _normalize(str(client[0])[:MAX_ADDRESS])
    forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    if forwarded:
        named = str(client[0]).encode("latin-1", "replace")  # a trusted proxy has named it
        if not any(named in value for value in forwarded):
            _warn(network(address), logged_once(scope))
    return address


def _warn(peer: str, logged: set[str]) -> None:
    """Log once that a peer may be a proxy that is not trusted: the throttle would treat its clients as one."""
    event = f"forwarded_for_ignored {peer}"
    if event in logged or len(logged) >= MAX_PEERS:
        return
    logged.add(event)
    log.warning(
        "forwarded_for_ignored",
        peer=peer,
        action="if this is your proxy, list it in server.trusted_proxies: without it, its clients are throttled as one",
    )


def _warn_of_missing(logged: set[str]) -> None:
    """Log once that the proxy on the Unix socket names no clients."""
    if "forwarded_for_missing" not in logged:
        logged.add("forwarded_for_missing")
        log.warning(
            "forwarded_for_missing",
            action="have the proxy on server.socket send X-Forwarded-For: without it, its clients are throttled as one",
        )


@lru_cache(maxsize=4096)
def _normalize(text: str) -> str:
    """Return an address in its usual form: IPv4-mapped IPv6 as IPv4, and without a zone, which can have any length."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return "unknown"
    return str(getattr(address, "ipv4_mapped", None) or address)
