"""Free ports for servers that cannot choose their own."""

import secrets
import socket
from contextlib import suppress
from itertools import count

_FIRST = 20_000
_EACH = 500
_SLICES = 24  # ends below 32,768, where the ephemeral ports of Linux begin; other systems begin higher

_numbers = count(secrets.randbelow(_EACH))
_first = _FIRST + _EACH * secrets.randbelow(_SLICES)


def use_range(number: int) -> None:
    """Let this process use another range than the processes that have other numbers."""
    global _first  # noqa: PLW0603 - it belongs to the process
    _first += _EACH * number
    if _first >= _FIRST + _EACH * _SLICES:
        _first -= _EACH * _SLICES


def free_port() -> int:
    """Return a port that no other program takes before the server starts, or while it is down.

    It is below the ephemeral ports of the system. Each process of pytest has its own range, and uses it in turn.
    """
    while True:
        port = _first + next(_numbers) % _EACH
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
