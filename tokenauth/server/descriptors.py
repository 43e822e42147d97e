"""File descriptors: how many a process may open, and the reserve of them that connections leave for everything else."""

import os
import resource

RESERVE = 128
"""Descriptors that kept connections leave alone: for the database, for logs, and to answer new connections once."""

_MOST = 1 << 20
"""What the limit is raised to at the most, where the system names none; the table of a process grows with its use."""


def raise_limit() -> None:
    """Let this process, and those that it starts, open as many descriptors as the system allows it to.

    The usual soft limit of 1,024 is there for programs that call select(2), which nothing here does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """Return how many descriptors this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if soft == resource.RLIM_INFINITY else soft


def reserve() -> int:
    """Return how many of them are the reserve."""
    return min(RESERVE, limit() // 4)


def in_reserve(descriptor: int) -> bool:
    """Whether a descriptor that was just opened is one of the reserve: each new one is the lowest that is free."""
    return descriptor >= limit() - reserve()


async def ready() -> str | None:
    """Return what keeps this process from taking more connections: only the reserve is left, or not even that."""
    try:
        descriptor = os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        return f"out of file descriptors: {error.strerror}"
    os.close(descriptor)
    return f"out of file descriptors: {limit():,} are allowed" if in_reserve(descriptor) else None
