"""Free ports for servers that cannot choose their own."""

import os
import secrets
import socket
from contextlib import suppress
from itertools import count

_FIRST = 20_000
_EACH = 500
_SLICES = 24  # ends below 32,768, where the ephemeral ports of Linux begin; other systems begin higher

_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
_first = _FIRST + _EACH * (int(_worker.removeprefix("gw")) % _SLICES if _worker else secrets.randbelow(_SLICES))
_numbers = count(secrets.randbelow(_EACH))


def free_port() -> int:
    """Return a port that no other program takes before the server starts, or while it is down.

    It is below the ephemeral ports of the system. Each process of pytest has its own range, and uses it in turn.
    """
    while True:
        port = _first + next(_numbers) % _EACH
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
