"""Client addresses, and the ranges by which they are counted and logged."""

import ipaddress
from functools import lru_cache

LOCAL = "local"
"""Used as the address of every peer on a Unix socket: such a peer has none."""

UNKNOWN = "unknown"
"""Used as the network of all addresses that cannot be read."""

_RANGES = {4: {24, 16}, 6: {64, 48}}
"""The lengths of the prefixes of networks and regions, by IP version."""


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """Return the network of a client address: its /24 (IPv4) or /64 (IPv6). Unreadable addresses share one network."""
    return _prefix(address, 24, 64)


@lru_cache(maxsize=4096)
def location(address: str) -> str:
    """Return the location of a client address: the address itself (IPv4) or its /64 (IPv6)."""
    return _prefix(address, 32, 64)


@lru_cache(maxsize=4096)
def region(address: str) -> str:
    """Return the region of a client address: its /16 (IPv4) or /48 (IPv6)."""
    return _prefix(address, 16, 48)


def is_address(text: str) -> bool:
    """Return whether a text names the address of a client."""
    try:
        return text in {LOCAL, UNKNOWN} or bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def read_range(text: str) -> str | None:
    """Return the network or region that a text names, as it is counted; None if it names none."""
    if text in {LOCAL, UNKNOWN}:
        return text
    try:
        found = ipaddress.ip_network(text)
    except ValueError:
        return None
    return str(found) if found.prefixlen in _RANGES[found.version] else None


def _prefix(address: str, ipv4: int, ipv6: int) -> str:
    if address == LOCAL:
        return LOCAL
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return UNKNOWN
    if isinstance(parsed, ipaddress.IPv6Address):
        parsed = parsed.ipv4_mapped or ipaddress.IPv6Address(int(parsed))  # without the zone of a link-local address
    return str(ipaddress.ip_network((parsed, ipv4 if parsed.version == 4 else ipv6), strict=False))
