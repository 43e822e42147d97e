"""How many file descriptors this process may open, and the reserve that connections must leave free."""

import os
import resource
from contextlib import suppress

RESERVE = 128
"""Descriptors that kept connections must not use: for the database, for logs, and to answer new connections once."""

_MAX_LIMIT = 1 << 20
"""The limit to use where the system has none: the kernel's table of descriptors grows with the highest one in use."""

_MACOS_LIMIT = 10_240
"""OPEN_MAX of macOS: a soft limit that it always accepts."""


def raise_limit() -> None:
    """Raise the soft limit of this process and its children to the hard limit.

    The usual soft limit of 1,024 protects programs that call select(2). Nothing here does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
    if soft == resource.RLIM_INFINITY:
        return
    for most in (wanted, _MACOS_LIMIT):
        if soft < most:
            with suppress(ValueError, OSError):  # macOS has a hard limit of infinity and refuses what the kernel lacks
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                return


def limit() -> int:
    """Return how many descriptors this process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_LIMIT if soft == resource.RLIM_INFINITY else soft


def reserve() -> int:
    """Return the size of the reserve: RESERVE, or a quarter of a low limit."""
    return min(RESERVE, limit() // 4)


def in_reserve(descriptor: int) -> bool:
    """Return whether a new descriptor belongs to the reserve. A new descriptor has the lowest free number."""
    return descriptor >= limit() - reserve()


async def ready() -> str | None:
    """Return why this process cannot keep more connections: only the reserve is left, or nothing at all."""
    try:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        return f"out of file descriptors: {error.strerror}"
    os.close(descriptor)
    return f"out of file descriptors: {limit():,} are allowed" if in_reserve(descriptor) else None
