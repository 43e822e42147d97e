"""Workers whose wall clock leaps forward and back, while the clock of the test goes on."""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from uuid import uuid4

from tests.support.connections import Connection
from tests.support.servers import Server, spawn
from tests.support.skipping import skip_without

_WORKER = """
import pathlib, sys, time
shift = pathlib.Path(sys.argv.pop())
wall = time.time
time.time = lambda: wall() + int(shift.read_text())
time.time_ns = lambda: int(time.time() * 1e9)
from tests.support.worker import main
main()
"""
"""A worker whose Python sees another time. So leaps can be tested also where libfaketime is not installed."""

_LIBRARY_WORKER = """
import sys, threading, time
time.sleep = lambda seconds: threading.Event().wait(seconds)
del sys.argv[-1]
from tests.support.worker import main
main()
"""
"""A worker under libfaketime, which refuses the system call with which Python sleeps (0.9.10: EINVAL)."""

_LIBRARIES = "*/faketime/libfaketimeMT.so.1"

ROUNDING = 2.5
"""Seconds that a token may live longer than its ttl: expiry times are whole seconds, and a probe takes time."""


class Leaps:
    """The clock of the workers: the real one, ahead or behind by some seconds."""

    def __init__(self, path: Path, lease_ttl: float, seed: int, also: Callable[[float], object]) -> None:
        """`also` is called with each change of the clock."""
        self.path = path
        self._lease_ttl = lease_ttl
        self._random = random.Random(seed)
        self._also = also
        self._shift = 0
        self.leaps: list[tuple[float, float]] = []
        """When each began and had ended."""
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(f"{self._shift:+d}")
        new.replace(self.path)

    def leap(self) -> None:
        """Set the clock forward or back, by seconds, hours or days."""
        before = monotonic()
        change = self._random.choice([1, 2, 5, 60, 3600, 86400]) * self._random.choice([-1, 1])
        self._shift += change
        self._write()
        self._also(change)
        self.leaps.append((before, monotonic()))

    # As the `Time` of a history: real time, and a lease may end at each leap

    def __call__(self) -> float:
        return monotonic()

    def reached(self, instant: float) -> float:
        """Return when a lease that was touched `lease_ttl` before `instant` may have ended at the earliest."""
        touched = instant - self._lease_ttl
        return min([instant, *(began for began, ended in list(self.leaps) if ended > touched)])


@contextmanager
def leaping(config: Path, leaps: Leaps, library: Path | None = None) -> Iterator[Server]:
    """Run a worker with this clock. With libfaketime, its C libraries see that clock, too."""
    program, env = _WORKER, dict[str, str]()
    if library is not None:
        program = _LIBRARY_WORKER
        env = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(leaps.path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
    with spawn([sys.executable, "-c", program, str(config), "-", str(leaps.path)], config.parent, env) as server:
        server.port = server.wait("test_worker_ready")["port"]
        yield server


def libfaketime() -> Path:
    """Return the path of the library, where Debian has it."""
    found = next(Path("/usr/lib").glob(_LIBRARIES), None)
    if found is None:
        skip_without("libfaketime", "apt-get install faketime")
    return found


class Observer(threading.Thread):
    """Makes named tokens of a short life, and probes each at every worker until it is refused, and some times more."""

    def __init__(self, ports: list[int], ttl: float) -> None:
        super().__init__(daemon=True)
        self._ports = ports
        self._ttl = ttl
        with Connection(ports[0]) as connection:
            self._login = connection.log_in()
        self.stopping = threading.Event()
        self.faults: list[str] = []
        self.lifetimes: list[float] = []

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self._observe()
        except BaseException as error:
            self.faults.append(repr(error))

    def _observe(self) -> None:
        with ExitStack() as stack:
            self._follow([stack.enter_context(Connection(port)) for port in self._ports])

    def _follow(self, connections: list[Connection]) -> None:
        began = monotonic()
        made = connections[0].ask("POST", "/api/tokens", {"name": uuid4().hex, "ttl": self._ttl}, X_Token=self._login)
        if made.status == 503:  # the machine was suspended during a commit
            return
        assert made.status == 201, made
        token, issued = made.json()["token"], monotonic()
        refused: list[float | None] = [None] * len(connections)
        while None in refused or monotonic() < issued + self._ttl:
            for number, connection in enumerate(connections):
                asked = monotonic()
                answer = connection.ask("GET", f"/api/token?token={token}")
                if answer.status == 503:
                    continue
                valid = answer.json()["valid"]
                if not valid and refused[number] is None:
                    refused[number] = asked - began
                elif valid and refused[number] is not None:
                    self.faults.append("accepted again after it was refused")
                elif valid and asked - issued > self._ttl + ROUNDING:
                    self.faults.append(f"accepted {asked - issued:.1f} seconds after its issue")
            self.stopping.wait(0.05)
        self.lifetimes += [one for one in refused if one is not None]
