"""A mixed load for a long time, with samples of what must stay flat: memory, descriptors, files and latencies."""

import os
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from bench import world
from tests.support.connections import Closed, Connection, NoAnswer, takes_connections
from tests.support.journal import until
from tests.support.main_process import workers_of
from tests.support.pool_users import PoolUser
from tests.support.ports import free_port
from tests.support.servers import Server, spawn

SETTINGS = """
[tokens]
ttl = 600
per_user = 0
cache_size = 2000

[pools.permits]
capacity = 20
prefill = true
lease_ttl = "10m"
"""
"""Tokens expire after ten minutes, so that their number is steady soon."""

MIX = {"hot": 70, "random": 20, "lease": 5, "login": 3, "log-out": 2}
WRITES = {"lease", "login", "log-out"}
LEAST = {0.5: 25, 0.99: 300}
"""How many requests of a kind a window must have for each quantile. So leases, logins and log-outs have no p99."""
CLIENTS = 4
USE = 60.0
"""Seconds for which a token is used: much less than it lives."""
PAUSE = 0.25
"""Seconds by which a short wait may be late before the machine counts as suspended. Such times are not measured."""


@dataclass
class Sample:
    """What was measured in one window of time."""

    seconds: float
    """When it ended, since the start."""
    memory: int
    """Resident memory of all processes, in KiB."""
    descriptors: int
    wal: int
    """Size of the write-ahead log, in bytes."""
    latencies: Mapping[str, Sequence[float]]
    """Seconds per request, by kind, and of the references: `bare` is a request to a server that does nothing, and
    `sync` writes 4 KiB to the disk of the database."""
    cpu: float
    """CPU seconds per request of all processes."""
    bare_cpu: float
    """CPU seconds per request of the bare server."""

    @property
    def cpu_ratio(self) -> float | None:
        """CPU time per request as a multiple of the bare server's; None if a window is too short to measure that."""
        if self.bare_cpu * len(self.latencies.get("bare", ())) < 0.05:  # the system counts in hundredths of a second
            return None
        return self.cpu / self.bare_cpu

    def ratio(self, kind: str, share: float, least: int = 1) -> float | None:
        """Return a quantile of a kind of request as a multiple of its reference's; None if a window has too few."""
        references = ["bare", *(["sync"] if kind in WRITES else [])]
        taken, *compared = ([*self.latencies.get(each, ())] for each in (kind, *references))
        if min(map(len, (taken, *compared))) < least:
            return None
        return quantile(taken, share) / sum(quantile(each, share) for each in compared)

    def __str__(self) -> str:
        times = ", ".join(
            f"{kind} {quantile(taken, 0.5) * 1000:.1f}/{quantile(taken, 0.99) * 1000:.1f}"
            for kind, taken in sorted(self.latencies.items())
            if taken
        )
        ratios = {
            f"{kind} p{share * 100:.0f}": self.ratio(kind, share, least)
            for kind in MIX
            for share, least in LEAST.items()
        }
        compared = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio is not None)
        return (
            f"{self.seconds:6.0f} s  {self.memory / 1024:6.1f} MiB  {self.descriptors} descriptors"
            f"  log {self.wal / 2**20:.1f} MiB  CPU {self.cpu * 1e6:.0f} us, bare {self.bare_cpu * 1e6:.0f} us"
            f"  p50/p99 in ms: {times}  ratios: {compared}"
        )


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


@dataclass
class Soak:
    """A load of `rate` requests a second at a server, in windows of some seconds."""

    server: Server
    wal: Path
    rate: float
    window: float
    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    pauses: int = 0
    """How many times the machine was suspended, or too busy to run a thread for PAUSE seconds."""

    def run(self, seconds: float, report: Callable[[str], object]) -> None:
        """Run for some seconds of the steady clock, without those in which the machine was suspended."""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._taken: dict[str, list[float]] = defaultdict(list)
        self._last_pause = self._suspended = 0.0
        directory = self.wal.parent
        with (
            bare(directory) as self._bare,
            (directory / "reference").open("wb", buffering=0) as self._reference,
            ThreadPoolExecutor(CLIENTS + 1) as threads,
        ):
            self._used = self._cpu_used()
            running = [threads.submit(self._client, number) for number in range(CLIENTS)]
            running.append(threads.submit(self._watch_for_pauses))
            try:
                began = time.monotonic()
                elapsed = 0.0
                while elapsed < seconds and not any(one.done() for one in running):
                    self._over.wait(self.window)
                    elapsed = time.monotonic() - began - self._suspended
                    self.samples.append(self._sample(elapsed))
                    report(str(self.samples[-1]))
            finally:
                self._over.set()
                for one in running:
                    one.result()

    def _sample(self, seconds: float) -> Sample:
        pids = [self.server.process.pid, *workers_of(self.server)]
        memory = sum(int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) for pid in pids)
        descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
        with self._lock:
            taken, self._taken = self._taken, defaultdict(list)
        used = self._cpu_used()
        cpu, requests, bare, bare_requests = (now - before for now, before in zip(used, self._used, strict=True))
        self._used = used
        wal = self.wal.stat().st_size
        return Sample(seconds, memory, descriptors, wal, taken, cpu / max(requests, 1), bare / max(bare_requests, 1))

    def _cpu_used(self) -> tuple[float, int, float, int]:
        """Return the CPU seconds of the server and the requests that it has answered, and those of the bare one."""
        server, bare = (world.cpu_seconds_of_tree(str(one.process.pid)) for one in (self.server, self._bare))
        return server, sum(self.counts[kind] for kind in MIX), bare, self.counts["bare"]

    def _watch_for_pauses(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            self._over.wait(0.05)
            ended = time.monotonic()
            if ended - began > PAUSE:
                self.pauses += 1
                self._suspended += ended - began
                self._last_pause = ended

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        """Note how long something takes, unless a pause happened meanwhile."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.counts[kind] += 1
        if self._last_pause < began and ended - began < PAUSE:  # a pause that long is noticed later
            with self._lock:
                self._taken[kind].append(ended - began)
        elif self._last_pause < began:
            self.counts["slower than a pause"] += 1

    @contextmanager
    def _compared(self, kind: str, bare: Connection, chance: random.Random) -> Iterator[None]:
        """Note how long something takes, and its reference just before or after it."""
        first = chance.random() < 0.5
        if first:
            self._refer(kind, bare)
        with self._timed(kind):
            yield
        if not first:
            self._refer(kind, bare)

    def _refer(self, kind: str, bare: Connection) -> None:
        with self._timed("bare"):
            bare.ask("GET", "/")
        if kind in WRITES:
            with self._timed("sync"):
                os.pwrite(self._reference.fileno(), os.urandom(4096), 0)
                os.fdatasync(self._reference.fileno())

    def _pace(self, chance: random.Random) -> None:
        self._over.wait(chance.expovariate(self.rate / CLIENTS))

    def _client(self, number: int) -> None:
        """Run sessions. The first ends only if the machine was suspended, which can make a commit take too long."""
        chance = random.Random(number)
        while not self._over.is_set():
            try:
                self._session(number, chance)
            except (AssertionError, NoAnswer, Closed):
                failed = time.monotonic()
                self._over.wait(1)  # a pause that has just ended is noticed
                if self._last_pause < failed - 2:
                    raise
                self.counts["failed in a pause"] += 1

    def _session(self, number: int, chance: random.Random) -> None:
        """Log in, probe, lease and log out at random. Each answer must be the right one."""
        kinds, weights = list(MIX), list(MIX.values())
        live: dict[str, float] = {}  # when each was issued
        dead: list[str] = []
        with ExitStack() as stack:
            connection = stack.enter_context(Connection(self.server.port))
            bare = stack.enter_context(Connection(self._bare.port))
            user = PoolUser(connection)
            logged_in = time.monotonic()
            while not self._over.is_set():
                if time.monotonic() - logged_in > USE:
                    user, logged_in = PoolUser(connection), time.monotonic()
                now = time.monotonic()
                live = {token: since for token, since in live.items() if now - since < USE}
                match chance.choices(kinds, weights)[0]:
                    case "login":
                        with self._compared("login", bare, chance):
                            live[connection.log_in()] = now
                    case "log-out" if live:
                        token = chance.choice(list(live))
                        with self._compared("log-out", bare, chance):
                            connection.log_out(token)
                        del live[token]
                        dead = [*dead[-20:], token]
                    case "lease":
                        with self._compared("lease", bare, chance):
                            lease = user.assign("permits", f"client {number}")
                        with self._compared("lease", bare, chance):
                            kept = user.keep_alive("permits", lease.token)
                        assert kept[0] == 200, kept
                        with self._compared("lease", bare, chance):
                            freed = user.release("permits", lease.token)
                        assert freed == (204, None), freed
                    case "random" if live or dead:
                        token = chance.choice([*live, *dead])
                        with self._compared("random", bare, chance):
                            valid = connection.valid(token)
                        assert valid is (token in live)
                    case _:
                        with self._compared("hot", bare, chance):
                            valid = connection.valid(user.token)
                        assert valid
                self._pace(chance)


@contextmanager
def bare(directory: Path) -> Iterator[Server]:
    """Run a server that does nothing, with the HTTP server of tokenauth, and also in a session of its own.

    Linux gives each session the same share of the cores.
    """
    port = free_port()
    with spawn([sys.executable, "-m", "bench.bare", str(port)], directory, cwd=world.ROOT) as server:
        server.port = port
        until(lambda: takes_connections(port), "the bare server listens")
        yield server


def check_flat(samples: Sequence[Sample], complete: bool = False) -> None:
    """Compare the last quarter with the second: the first is the warm-up.

    A window's times count as multiples of the reference's in the same window, and a quarter's are the median of its
    windows'. So a machine that is busy, always or for some windows, is no growth.

    `complete`: whether all but the tails must have been measured, as in a long run.
    """
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]

    def typical(measure: Callable[[Sample], float | None], needed: bool = complete) -> list[float]:
        found = [[each for each in map(measure, part) if each is not None] for part in (early, late)]
        assert all(found) or not needed, "there were too few requests to measure"
        return list(map(median, found)) if all(found) else [1, 1]

    memory = typical(lambda sample: sample.memory)
    assert memory[1] < memory[0] * 1.05 + 2048, f"memory grows: {memory} KiB"
    descriptors = typical(lambda sample: sample.descriptors)
    assert descriptors[1] <= descriptors[0] + 2, f"descriptors grow: {descriptors}"
    assert max(sample.wal for sample in late) < 8 << 20, "the write-ahead log grows"
    cpu = typical(lambda sample: sample.cpu_ratio)
    assert cpu[1] < 1.3 * cpu[0], f"requests take more CPU: {cpu} times the bare server"
    for kind in MIX:
        for share, least in LEAST.items():
            measure = partial(Sample.ratio, kind=kind, share=share, least=least)
            ratios = typical(measure, complete and share == 0.5)
            bound = 1.3 if share == 0.5 and kind not in WRITES else 1.7
            assert ratios[1] < bound * ratios[0], f"{kind} gets slower ({share}): {ratios} times the reference"
