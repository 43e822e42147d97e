"""A mixed load for a long time, with samples of what must stay flat: memory, descriptors, files and latencies."""

import asyncio
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.support.connections import Closed, Connection, NoAnswer
from tests.support.main_process import workers_of
from tests.support.pool_users import PoolUser
from tests.support.servers import Server

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
    """Seconds per request, by kind; `echo` is a server that does nothing, for comparison."""

    def __str__(self) -> str:
        times = ", ".join(
            f"{kind} {quantile(taken, 0.5) * 1000:.1f}/{quantile(taken, 0.99) * 1000:.1f}"
            for kind, taken in sorted(self.latencies.items())
            if taken
        )
        return (
            f"{self.seconds:6.0f} s  {self.memory / 1024:6.1f} MiB  {self.descriptors} descriptors"
            f"  log {self.wal / 2**20:.1f} MiB  p50/p99 in ms: {times}"
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
        with echo() as port, ThreadPoolExecutor(CLIENTS + 2) as threads:
            running = [threads.submit(self._client, number) for number in range(CLIENTS)]
            running += [threads.submit(self._watch_for_pauses), threads.submit(self._echo, port)]
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
        return Sample(seconds, memory, descriptors, self.wal.stat().st_size, taken)

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

    def _pace(self, chance: random.Random) -> None:
        self._over.wait(chance.expovariate(self.rate / CLIENTS))

    def _echo(self, port: int) -> None:
        chance = random.Random("echo")
        with Connection(port) as connection:
            while not self._over.is_set():
                with self._timed("echo"):
                    connection.ask("GET", "/")
                self._pace(chance)

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
            user = PoolUser(connection)
            logged_in = time.monotonic()
            while not self._over.is_set():
                if time.monotonic() - logged_in > USE:
                    user, logged_in = PoolUser(connection), time.monotonic()
                now = time.monotonic()
                live = {token: since for token, since in live.items() if now - since < USE}
                match chance.choices(kinds, weights)[0]:
                    case "login":
                        with self._timed("login"):
                            live[connection.log_in()] = now
                    case "log-out" if live:
                        token = chance.choice(list(live))
                        with self._timed("log-out"):
                            connection.log_out(token)
                        del live[token]
                        dead = [*dead[-20:], token]
                    case "lease":
                        with self._timed("lease"):
                            lease = user.assign("permits", f"client {number}")
                        with self._timed("lease"):
                            kept = user.keep_alive("permits", lease.token)
                        assert kept[0] == 200, kept
                        with self._timed("lease"):
                            freed = user.release("permits", lease.token)
                        assert freed == (204, None), freed
                    case "random" if live or dead:
                        token = chance.choice([*live, *dead])
                        with self._timed("random"):
                            valid = connection.valid(token)
                        assert valid is (token in live)
                    case _:
                        with self._timed("hot"):
                            valid = connection.valid(user.token)
                        assert valid
                self._pace(chance)


@contextmanager
def echo() -> Iterator[int]:
    """Run a server that gives one fixed answer to each request, in a thread, and yield its port."""
    started: list[int] = []
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except asyncio.IncompleteReadError:
            writer.close()

    async def run() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            started.append(server.sockets[0].getsockname()[1])
            ready.set()
            await stopping.wait()

    stopping = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()


def check_flat(samples: Sequence[Sample]) -> None:
    """Compare the last quarter with the second: the first is the warm-up."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]

    def typical(part: Sequence[Sample], measure: Callable[[Sample], float]) -> float:
        return median(map(measure, part))

    def times(part: Sequence[Sample], kind: str) -> list[float]:
        return [seconds for sample in part for seconds in sample.latencies.get(kind, ())]

    memory = [typical(part, lambda sample: sample.memory) for part in (early, late)]
    assert memory[1] < memory[0] * 1.05 + 2048, f"memory grows: {memory} KiB"
    descriptors = [typical(part, lambda sample: sample.descriptors) for part in (early, late)]
    assert descriptors[1] <= descriptors[0] + 2, f"descriptors grow: {descriptors}"
    assert max(sample.wal for sample in late) < 8 << 20, "the write-ahead log grows"
    for kind in MIX:
        for share, least in ((0.5, 100), (0.99, 2000)):
            ratios = []
            for part in (early, late):
                taken, compared = (times(part, each) for each in (kind, "echo"))
                if min(len(taken), len(compared)) >= least:  # the echo is slower, too, when the machine is busy
                    ratios.append(quantile(taken, share) / quantile(compared, share))
            if len(ratios) == 2:
                assert ratios[1] < 2 * ratios[0], f"{kind} gets slower ({share}): {ratios} times the echo"
