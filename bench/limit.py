"""The two limits that tokenauth is compared with: the bare HTTP server, and the bare argon2 call."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from argon2 import PasswordHasher, Type
from argon2.low_level import verify_secret

from bench import load
from bench.load import Result
from bench.machine import CORES
from tokenauth.settings.model import PasswordSettings

_FRESH = 0.25
"""Seconds for which a measurement of the bare server still tells how the machine is doing."""


class Beside(NamedTuple):
    """What one run of wrk saw, and the bare server's rate just before and after."""

    result: Result
    limit: float

    @property
    def ratio(self) -> float:
        """How much of the limit was reached."""
        return self.result.rate / self.limit


class BareServer:
    """The rate of the yardstick, measured anew around everything that is compared with it."""

    def __init__(self, port: int, seconds: int) -> None:
        self._port = port
        self._seconds = seconds
        self._measured_at = 0.0
        self.rates: list[float] = []

    def around(self, run: Callable[[], Result]) -> Beside:
        """Compare a run with the mean of the limit before it and after it."""
        if time.monotonic() > self._measured_at + _FRESH:
            self._measure()
        result = run()
        self._measure()
        return Beside(result, (self.rates[-2] + self.rates[-1]) / 2)

    def _measure(self) -> None:
        self.rates.append(load.run(self._port, "hot", self._seconds).rate)
        self._measured_at = time.monotonic()


_TERMS = PasswordSettings()
HASH = PasswordHasher(_TERMS.time_cost, _TERMS.memory_kib, _TERMS.parallelism).hash("secret")
"""A hash of "secret" at the default cost."""


def bare_argon2(seconds: int) -> float:
    """Verify a password in as many threads as there are cores; say how often in a second."""
    counts: list[int] = []
    began = time.perf_counter()

    def work() -> None:
        count = 0
        while time.perf_counter() < began + seconds:
            verify_secret(HASH.encode(), b"secret", Type.ID)
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=work) for _ in CORES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)
