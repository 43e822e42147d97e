"""Ports for servers that need theirs before they start."""

import os
import secrets
import socket
from contextlib import suppress
from itertools import count

_FIRST = 20_000
_EACH = 500
_SLICES = 24  # they end below 32,768, where Linux begins to choose ports itself; other systems begin higher

_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
_first = _FIRST + _EACH * (int(_worker.removeprefix("gw")) % _SLICES if _worker else secrets.randbelow(_SLICES))
_numbers = count(secrets.randbelow(_EACH))


def free_port() -> int:
    """Choose a port that no other process takes before its server does, or while that is down.

    It lies below those that the system gives to outgoing connections and to servers without a wish. Each of the
    processes that run tests has ports of its own, and takes them in turn.
    """
    while True:
        port = _first + next(_numbers) % _EACH
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
