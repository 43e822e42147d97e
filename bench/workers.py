"""The figures about workers: what a request costs with several on the cores that there are, and how fast one starts."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

import httpx

from bench import load, world
from bench.figures import Figure, Sample, Sampler
from bench.mixed import TABLES
from bench.world import USERS, Running

WORKERS = (1, 2, 4, 8)

KINDS = {"hot": "GET /api/token", "issue": "POST /api/token", "pairs_large": "assign and release"}
"""Kinds of requests of load.lua."""

_CONNECTIONS = 64
_LOOK = 0.002
"""Seconds between two looks at who waits for the lock."""

_FREE = 1000


class WorkerRows:
    """The figures. wrk shares the cores with the server, so they are CPU time and not rates."""

    def __init__(self, directory: Path, seconds: int) -> None:
        self._directory = directory
        self._seconds = seconds

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        return (
            *(
                Figure(
                    f"cpu-{kind}-{count}",
                    f"{title}, {count} worker{'s' * (count > 1)}: CPU of a request",
                    None,
                    "us",
                    partial(self._cpu, kind, count),
                )
                for kind, title in KINDS.items()
                for count in WORKERS
            ),
            Figure(
                "worker-start", "from the death of a worker to the first answer of the next", None, "s", self._start
            ),
        )

    @contextmanager
    def _cpu(self, kind: str, count: int) -> Iterator[Sampler]:
        """Keep all workers busy. Divide their CPU time, and the time in which they waited for the write lock."""
        with self._server(count) as (server, config):

            def sample() -> Sample:
                with _watching(_inode(world.database(config).with_name("tokenauth.db-lock"))) as waiting:
                    before = server.cpu_seconds()
                    found = load.run(server.port, kind, self._seconds, _CONNECTIONS)
                    used = server.cpu_seconds() - before
                lock = waiting() * found.seconds / found.requests * 1e6
                note = f"waits {lock:.1f} microseconds for the write lock"
                return Sample(used / found.requests * 1e6, found.rate, found.p99_ms, note)

            load.run(server.port, kind, 1, _CONNECTIONS)
            yield sample

    @contextmanager
    def _start(self) -> Iterator[Sampler]:
        """Kill the only worker. A request that comes then is answered by the next one, which is started at once.

        The one after it would be started after a delay, so there is one round.
        """
        with self._server(1) as (server, _):

            def sample() -> Sample:
                (worker,) = server.workers()
                began = time.perf_counter()
                os.kill(worker, signal.SIGKILL)
                while True:  # a connection of the dead worker may have been closed
                    try:
                        with httpx.Client(base_url=server.client.base_url, trust_env=False, timeout=60) as client:
                            client.get("/readyz").raise_for_status()
                        break
                    except httpx.TransportError:
                        time.sleep(0.001)
                seconds = time.perf_counter() - began
                (started,) = server.workers()
                note = f"it has used {world.cpu_seconds_of_tree(str(started)):.2f} s of CPU time by then"
                return Sample(seconds, note=note)

            yield sample

    @contextmanager
    def _server(self, workers: int) -> Iterator[tuple[Running, Path]]:
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            config = world.write_config(Path(directory), tables=TABLES)
            world.fill(config, USERS)
            world.fill_pool(config, "large", (str(uuid4()) for _ in range(_FREE)))
            config.write_text(config.read_text().replace("workers = 1\n", f"workers = {workers}\n"))
            with world.tokenauth(config, None) as server:
                yield server, config


def _inode(path: Path) -> str:
    return str(path.stat().st_ino)


@contextmanager
def _watching(inode: str) -> Iterator[Callable[[], float]]:
    """Look at the kernel's list of locks while something runs. Yield what returns the mean number of waits."""
    ended, looks = Event(), [0, 0]

    def watch() -> None:
        while not ended.wait(_LOOK):
            lines = Path("/proc/locks").read_text().splitlines()
            looks[0] += 1
            looks[1] += sum(" -> " in line and f":{inode} " in line for line in lines)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield lambda: looks[1] / max(1, looks[0])
    finally:
        ended.set()
        thread.join()
