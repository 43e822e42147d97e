"""System calls of a commit that fail, in turn, in a running worker: strace is attached to it."""

import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.connections import LOGIN, Answer, Connection
from tests.support.journal import until
from tests.support.servers import Server, worker, write_config
from tests.support.skipping import skip_without
from tokenauth.stores.sqlite.engine import CHECKPOINT_INTERVAL

ERRORS = ["EIO", "ENOSPC", "EROFS"]
LOGGED = {"store_not_writable", "store_unreachable", "revocation_held_in_memory", "checkpoint_failed"}
ALWAYS_COPY = {"AUTOCHECKPOINT": "1"}
"""With this environment each commit is followed by a copy of the write-ahead log into the database."""


class Fault(NamedTuple):
    """The n-th system call of one kind fails; if `lasting`, so do all that follow."""

    call: str
    number: int
    error: str
    lasting: bool

    def __str__(self) -> str:
        return f"{self.call}:error={self.error}:when={self.number}{'+' if self.lasting else ''}"


@contextmanager
def attached(server: Server, database: Path, *options: str) -> Iterator[Path]:
    """Attach strace to a worker, for the calls that use the files of its database. Yield the trace."""
    if shutil.which("strace") is None:
        skip_without("strace", "apt-get install strace")
    trace = database.with_name("trace")
    files = [option for suffix in ("", "-wal", "-shm") for option in ("-P", f"{database}{suffix}")]
    command = ["strace", "-f", "-y", "-p", str(server.process.pid), "-o", str(trace), *files, *options]
    with database.with_name("strace.log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            until(lambda: "attached" in Path(log.name).read_text() or process.poll() is not None, "strace is attached")
            if "not permitted" in Path(log.name).read_text():
                skip_without("permission to trace processes", "run the tests as root")
            yield trace
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def calls_of_a_commit(server: Server, database: Path) -> Counter[str]:
    """Count the system calls of a login and of /readyz with the files of the database, by kind."""
    with attached(server, database) as trace, Connection(server.port) as connection:
        connection.log_in()
        assert connection.ask("GET", "/readyz").status == 200
    calls = Counter(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    del calls["fcntl"]  # locks are in the kernel: a disk cannot make them fail
    return calls


def faults_of(calls: Counter[str], errors: Sequence[str]) -> list[Fault]:
    """Return a fault for each call in turn, with each error, once and lasting."""
    return [
        Fault(call, number, error, lasting)
        for call, count in sorted(calls.items())
        for number in range(1, count + 1)
        for error in errors
        for lasting in (False, True)
    ]


def is_outage(answer: Answer) -> bool:
    return answer.status == 503 and int(answer.headers["retry-after"]) >= 1


class Victim:
    """A worker, and what its clients know."""

    def __init__(self, server: Server, database: Path) -> None:
        self._server = server
        self._database = database
        with Connection(server.port) as connection:
            self.live = [connection.log_in() for _ in range(5)]
        self.ended: list[str] = []
        self.outages = 0

    def suffer(self, fault: Fault) -> None:
        """Send requests while calls fail. Each answer is 503 or true, and afterwards the service is back by itself."""
        with attached(self._server, self._database, "-e", f"trace={fault.call}", f"--inject={fault}"):
            self._use()
        until(self._log_in, f"a login succeeds again after {fault}")
        until(self._ready, f"the worker is ready again after {fault}", CHECKPOINT_INTERVAL + 60)
        with Connection(self._server.port) as connection:
            self.check(connection)

    def _ready(self) -> bool:
        """Return whether it is ready. A check of the write-ahead log that failed is repeated after its interval."""
        with Connection(self._server.port) as connection:
            return connection.ask("GET", "/readyz").status == 200

    def _use(self) -> None:
        with Connection(self._server.port) as connection:
            for _ in range(2):
                self._log_in()
                assert connection.ask("GET", "/readyz").status in {200, 503}
                answer = connection.ask("GET", f"/api/token?token={self.live[0]}")
                assert is_outage(answer) or answer.json()["valid"] is True, answer
            self.ended.append(self.live.pop())
            connection.log_out(self.ended[-1])
            answer = connection.ask("GET", f"/api/token?token={self.ended[-1]}")
            assert is_outage(answer) or answer.json()["valid"] is False, answer

    def _log_in(self) -> bool:
        with Connection(self._server.port) as connection:
            answer = connection.ask("POST", "/api/token", LOGIN)
        if is_outage(answer):
            self.outages += 1
            return False
        self.live.append(answer.json()["token"])
        return True

    def check(self, connection: Connection) -> None:
        """Check that a server accepts what is live, and refuses what has ended; of both the latest."""
        assert all(map(connection.valid, self.live[-50:]))
        assert not any(map(connection.valid, self.ended[-50:]))


def survive(directory: Path, errors: Sequence[str], step: int) -> int:
    """Let calls of a commit fail in turn, and return the number of outages that clients saw.

    Of each kind these are the first and each `step`-th call after it.
    """
    config, database = write_config(directory, "[tokens]\nper_user = 0"), directory / "tokenauth.db"
    with worker(config, env=ALWAYS_COPY) as server:
        calls = calls_of_a_commit(server, database)
        assert calls["pwrite64"] > 3
        assert calls["fdatasync"] > 1
        assert calls["newfstatat"] > 0, "the files are checked at least once"
        victim = Victim(server, database)
        for fault in faults_of(calls, errors):
            if (fault.number - 1) % step == 0:
                victim.suffer(fault)
        assert {event["event"] for event in server.errors()} <= LOGGED
        server.stop()
    with worker(config) as server, Connection(server.port) as connection:
        victim.check(connection)
    return victim.outages
