"""The two limits that tokenauth is compared with: the bare ASGI function, and the bare argon2 call."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from argon2 import PasswordHasher, Type
from argon2.low_level import verify_secret

from bench import load
from bench.figures import Sample
from bench.load import Result
from bench.machine import CORES
from tokenauth.settings.model import PasswordSettings

_REUSE = 0.25
"""Seconds for which the last measurement of the bare function is reused."""


class Comparison(NamedTuple):
    """A result, and the mean rate of the bare function just before and after it."""

    result: Result
    limit: float

    @property
    def ratio(self) -> float:
        return self.result.rate / self.limit

    def sample(self) -> Sample:
        return Sample(self.ratio, self.result.rate, self.result.p99_ms)

    def require_changes(self, count: int, connections: int) -> None:
        """Raise RuntimeError unless the database has a change for each response.

        There may be one more for each connection: at the end wrk does not wait for its last requests.
        """
        answered = self.result.requests
        if not answered <= count <= answered + connections:
            raise RuntimeError(f"{answered} requests were answered, the database has {count} changes")


class BareServer:
    """Measures the rate of the bare function around everything that is compared with it."""

    def __init__(self, port: int, seconds: int) -> None:
        self._port = port
        self._seconds = seconds
        self._measured_at = 0.0
        self.rates: list[float] = []

    def compare(self, run: Callable[[], Result]) -> Comparison:
        """Measure the limit, run, and measure the limit again."""
        if time.monotonic() > self._measured_at + _REUSE:
            self._measure()
        result = run()
        self._measure()
        return Comparison(result, (self.rates[-2] + self.rates[-1]) / 2)

    def _measure(self) -> None:
        self.rates.append(load.run(self._port, "hot", self._seconds).rate)
        self._measured_at = time.monotonic()


_SETTINGS = PasswordSettings()
HASH = PasswordHasher(_SETTINGS.time_cost, _SETTINGS.memory_kib, _SETTINGS.parallelism).hash("secret")
"""A hash of "secret" at the default cost."""


def bare_argon2(seconds: int) -> float:
    """Verify a password in one thread per core. Return the number of verifications per second."""
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
