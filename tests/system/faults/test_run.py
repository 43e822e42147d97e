"""Promises 8 and 9 for `tokenauth run`, at length: however a run ends, no two commands run at the same time."""

import shutil
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import worker, write_config
from tests.support.skipping import skip_without
from tests.support.tcp_proxy import Proxy
from tests.support.wrapped import Wrapped, Wrapper, ended, wrapping

POOL = "[pools.permit]\ncapacity = 1\nprefill = true\nlease_ttl = 2"
FAULTS = ("none", "cut", "freeze", "stop", "kill", "term")
WAIT = 600
"""Seconds that a client waits for the runs of the others."""
LEASE_LOST = 76
"""The exit status of a run whose lease ended."""
TURNS = 12
"""Number of runs of each client: each fault twice."""

JOB = """
exec 9> "$1"
flock -n 9 || echo "$$ found the lock taken" >> "$1.overlaps"
trap 'exit 1' TERM
[ "$2" = stubborn ] && trap '' TERM
echo $$
while [ ! -e end ]; do sleep 0.05; done
"""
"""Holds a lock as long as it runs. The kernel releases it when the last process of the job is dead."""


class Client(threading.Thread):
    """Runs the job again and again, and disturbs it each time in another way."""

    def __init__(self, seed: int, lock: Path, wrap: Wrapper, network: Proxy) -> None:
        super().__init__()
        self._random = Random(seed)
        self._lock = lock
        self._wrap = wrap
        self._network = network
        self.statuses: Counter[tuple[str, int]] = Counter()

    def run(self) -> None:
        for fault in self._random.sample(FAULTS * (TURNS // len(FAULTS)), TURNS):
            while (run := self._begun()) is None:
                pass
            command = run.command()
            self._disturb(fault, run)
            until(lambda: ended(command), f"the job ends after {fault}")  # noqa: B023
            self._network.heal()
            if fault == "stop":
                run.signal(signal.SIGCONT)
            self.statuses[fault, run.wait()] += 1

    def _begun(self) -> Wrapped | None:
        """Start the job, and wait until it runs. Return None if its lease ended before, on a slow machine."""
        manner = self._random.choice(["stubborn", "gentle"])
        run = self._wrap("--pool", "permit", "--wait", f"{WAIT}s", "--kill-after", "0.3s", "--",
                         "sh", "-c", JOB, "job", str(self._lock), manner)  # fmt: skip
        until(lambda: "\n" in run.out or run.process.poll() is not None, "the job runs", WAIT)
        if "\n" in run.out:
            return run
        assert run.wait() == LEASE_LOST, run.err
        return None

    def _disturb(self, fault: str, run: Wrapped) -> None:
        match fault:
            case "none":
                (run.directory / "end").touch()
            case "cut":
                self._network.cut()
            case "freeze":
                self._network.freeze()
            case "stop":
                run.stop()
            case "kill":
                run.signal(signal.SIGKILL)
            case "term":
                run.signal(signal.SIGTERM)
                (run.directory / "end").touch()


def test_no_fault_lets_two_commands_run_at_once(tmp_path: Path) -> None:
    if shutil.which("flock") is None:
        skip_without("flock", "install util-linux")
    lock = tmp_path / "lock"
    with ExitStack() as stack:
        server = stack.enter_context(worker(write_config(tmp_path, POOL)))
        clients = []
        for number in range(3):
            network = stack.enter_context(Proxy(server.port))
            directory = tmp_path / f"client-{number}"
            directory.mkdir()
            wrap = stack.enter_context(wrapping(directory, f"http://127.0.0.1:{network.port}"))
            clients.append(Client(number, lock, wrap, network))
        with ThreadPoolExecutor(3) as threads:
            for turn in [threads.submit(client.run) for client in clients]:
                turn.result()
        admin = PoolUser(stack.enter_context(Connection(server.port)))
        until(lambda: admin.counts("permit") == (1, 0), "the token is free")
    assert not Path(f"{lock}.overlaps").exists()
    found = sum((client.statuses for client in clients), Counter[tuple[str, int]]())
    lost = {(fault, LEASE_LOST) for fault in ("cut", "freeze", "stop")}
    assert {status for status in found if status[0] != "term"} == {("none", 0), ("kill", -9)} | lost, found
