"""The figures about latency at half of saturation: of a mix of all kinds of requests, and of logins that hash."""

import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import NamedTuple
from uuid import uuid4

from argon2 import Type
from argon2.low_level import verify_secret

from bench import traffic, world
from bench.figures import Figure, Sample, Sampler
from bench.limit import HASH, bare_argon2
from bench.traffic import Check, Make, Outcome
from bench.world import MILLION, USERS, Running, value

WEIGHTS = {"hot": 70.0, "random": 20.0, "lease": 5.0, "login": 3.0, "log-out": 2.0}
"""The mix, in percent."""

_PROBES = ("hot", "random")
_TITLES = {
    "hot": "hot probe",
    "random": "random probe, of 1,000,000",
    "lease": "assign, keep alive, release",
    "login": "login, negligible hash",
    "log-out": "log-out",
}

_SATURATION = 20_000
"""Number of requests by which saturation is measured."""

_HALF = 0.5
"""The share of saturation at which latency is measured."""

_HELD = 64
"""Number of leases that are held, and of logins that are there before the first log-out."""

TABLES = """
[tokens]
per_user = 0
[pools.large]
lease_ttl = "1h"
"""


def _is_valid(status: int, body: bytes) -> None:
    if status != 200 or b"true" not in body:
        raise RuntimeError(f"a valid token was answered {status} {body.decode()}")


class Mix:
    """Makes the requests of the mix. The oldest lease is released first, and the oldest login ended."""

    def __init__(self, server: Running, random: Random, tokens: int = MILLION, check: Check = _is_valid) -> None:
        """`tokens`: how many the database was made with. `check` takes the responses to probes."""
        self._random = random
        self._tokens = tokens
        self._check = check
        self._held: deque[str] = deque()
        self._logged_in: deque[str] = deque()
        self._lease_steps = count()
        self.makers: Mapping[str, Make] = {
            "hot": self._hot,
            "random": self._any,
            "lease": self._lease,
            "login": self._login,
            "log-out": self._log_out,
        }
        for _ in range(_HELD):  # so that each log-out and each release has its token
            login = {"username": "user0", "password": "secret"}
            answer = server.client.post("/api/token", json=login).raise_for_status().json()
            self._logged_in.append(answer["token"])
            lease = server.client.post("/api/pools/large/leases", headers={"X-Token": value(0)}).raise_for_status()
            self._held.append(lease.json()["token"])

    def _hot(self) -> tuple[bytes, Check]:
        return probe(self._random.randrange(USERS)), self._check

    def _any(self) -> tuple[bytes, Check]:
        return probe(self._random.randrange(self._tokens)), self._check

    def _login(self) -> tuple[bytes, Check]:
        return login(self._random.randrange(USERS)), self._was_issued

    def _was_issued(self, status: int, body: bytes) -> None:
        expect(status, 200)
        self._logged_in.append(json.loads(body)["token"])

    def _log_out(self) -> tuple[bytes, Check]:
        head = f"DELETE /api/token HTTP/1.1\r\nHost: bench\r\nX-Token: {self._logged_in.popleft()}\r\n\r\n"
        return head.encode(), is_ok

    def _lease(self) -> tuple[bytes, Check]:
        """Assign, keep alive and release in turn."""
        step, path = next(self._lease_steps) % 3, "/api/pools/large/leases"
        if step == 0:
            return leasing("POST", path), self._was_leased
        if step == 1:
            return leasing("PUT", f"{path}/{self._held[-1]}"), is_ok
        return leasing("DELETE", f"{path}/{self._held.popleft()}"), is_done

    def _was_leased(self, status: int, body: bytes) -> None:
        expect(status, 201)
        self._held.append(json.loads(body)["token"])


def login(number: int) -> bytes:
    """Return the login of a user."""
    body = b'{"username": "user%d", "password": "secret"}' % number
    head = b"POST /api/token HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def probe(number: int) -> bytes:
    return b"GET /api/token?token=%064d HTTP/1.1\r\nHost: bench\r\n\r\n" % number


def leasing(method: str, path: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: bench\r\nX-Token: {value(0)}\r\nContent-Length: 0\r\n\r\n".encode()


def is_ok(status: int, _: bytes) -> None:
    expect(status, 200)


def is_done(status: int, _: bytes) -> None:
    expect(status, 204)


def expect(status: int, expected: int) -> None:
    if status != expected:
        raise RuntimeError(f"a request was answered {status}, not {expected}")


class _Round(NamedTuple):
    """One round: the mix, and its probes alone at the same times."""

    saturation: float
    mixed: Outcome
    alone: Outcome


class MixedRows:
    """The figures of one database, and the rounds that they share."""

    def __init__(self, prefix: str, shown: str, configure: Callable[[], Path], seconds: int) -> None:
        """`prefix` and `shown` begin names and titles."""
        self._prefix = prefix
        self._shown = shown
        self._configure = configure
        self._seconds = seconds
        self._config: Path | None = None
        self._rounds: list[_Round] = []

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        name, shown = f"{self._prefix}mixed", f"{self._shown}mixed load"
        return (
            Figure(f"{name}-probes", f"{shown}: p99 of probes, of that alone", 3, "x", self._compared, at_most=True),
            *(
                Figure(f"{name}-{kind}", f"{shown}: {title}, p50", None, "ms", partial(self._kind, kind))
                for kind, title in _TITLES.items()
            ),
        )

    @contextmanager
    def _compared(self) -> Iterator[Sampler]:
        with self._in_turn() as take:

            def sample() -> Sample:
                found = take()
                mixed, alone = (run.percentiles(*_PROBES) for run in (found.mixed, found.alone))
                lag, busy = found.mixed.late_p99_ms, found.mixed.busy
                note = (
                    f"at {found.mixed.rate:,.0f} of {found.saturation:,.0f} requests/s; alone p99 {alone.p99:.2f} ms,"
                    f" p99.9 {alone.p999:.2f} ms; the load generator used {busy:.0%} of its core, its p99 lag was"
                    f" {lag:.2f} ms"
                )
                return Sample(mixed.p99 / alone.p99, found.mixed.rate, mixed.p99, note, mixed.p999)

            yield sample

    @contextmanager
    def _kind(self, kind: str) -> Iterator[Sampler]:
        with self._in_turn() as take:

            def sample() -> Sample:
                found = take().mixed
                percentiles = found.percentiles(kind)
                rate, note = len(found.milliseconds[kind]) / found.seconds, f"p99.9 {percentiles.p999:.2f} ms"
                return Sample(percentiles.p50, rate, percentiles.p99, note, percentiles.p999)

            yield sample

    @contextmanager
    def _in_turn(self) -> Iterator[Callable[[], _Round]]:
        """Yield what returns the first round, then the second; those that no row has needed yet are measured."""
        numbers = count()
        if self._config is None:
            self._config = self._configure()
        config = self._config

        def take() -> _Round:
            number = next(numbers)
            if number == len(self._rounds):
                with world.tokenauth(config) as server:
                    self._rounds.append(self._measure(server, number))
            return self._rounds[number]

        yield take

    def _measure(self, server: Running, number: int) -> _Round:
        random = Random(number)
        mix = Mix(server, random)
        before = server.cpu_seconds()
        saturated = traffic.run(server.port, mix.makers, traffic.at_once(_SATURATION, WEIGHTS, random))
        _require_saturation(server.cpu_seconds() - before, saturated)
        plan = traffic.at_random(_HALF * saturated.rate, 4 * self._seconds, WEIGHTS, random)
        mixed = traffic.run(server.port, mix.makers, plan)
        alone = traffic.run(server.port, mix.makers, [(at, kind) for at, kind in plan if kind in _PROBES])
        return _Round(saturated.rate, mixed, alone)


def _require_saturation(cpu_seconds: float, found: Outcome) -> None:
    """Check that the server was the bottleneck, and not the load generator."""
    if found.busy > 0.95:
        raise RuntimeError(f"the load generator was saturated, the server used {cpu_seconds / found.seconds:.0%}")


def sqlite_config(directory: Path) -> Path:
    """Create a database with a million tokens, and a pool."""
    config = world.write_config(Path(tempfile.mkdtemp(dir=directory)), tables=TABLES)
    world.fill(config, MILLION)
    world.fill_pool(config, "large", (str(uuid4()) for _ in range(10 * _HELD)))
    return config


class LoginRows:
    """The figures about logins with the default hash."""

    def __init__(self, directory: Path, seconds: int) -> None:
        self._directory = directory
        self._seconds = seconds

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        title = "p99 of a login at half load, of one hash"
        return (
            Figure("login-p99", f"{title}; at equal distances", 1.5, "x", partial(self._logins, False), at_most=True),
            Figure("login-poisson", f"{title}; at random times", None, "x", partial(self._logins, True)),
        )

    @contextmanager
    def _logins(self, at_random: bool) -> Iterator[Sampler]:
        """Log in with the default hash on all cores, at half of the rate of only argon2 on all cores."""
        with (
            tempfile.TemporaryDirectory(dir=self._directory) as directory,
            world.tokenauth(world.write_config(Path(directory), "", HASH), None) as server,
        ):
            numbers = count()
            makers: Mapping[str, Make] = {"login": lambda: (login(next(numbers) % USERS), is_ok)}
            traffic.run(server.port, makers, traffic.evenly(20, 1, "login"))

            def sample() -> Sample:
                rate, seconds = _HALF * bare_argon2(self._seconds), 4 * self._seconds
                before = _one_hash()
                if at_random:
                    plan = traffic.at_random(rate, seconds, {"login": 1}, Random(1))
                else:
                    plan = traffic.evenly(rate, seconds, "login")
                found = traffic.run(server.port, makers, plan)
                hashing, taken = (before + _one_hash()) / 2, found.percentiles("login")
                note = f"one hash takes {hashing:.1f} ms, a login {taken.p50:.1f} ms in the median"
                return Sample(taken.p99 / hashing, found.rate, taken.p99, note, taken.p999)

            yield sample


def _one_hash() -> float:
    """Return the milliseconds that one hash of the default cost takes alone."""
    taken = []
    for _ in range(20):
        began = perf_counter()
        verify_secret(HASH.encode(), b"secret", Type.ID)
        taken.append((perf_counter() - began) * 1000)
    return median(taken)
