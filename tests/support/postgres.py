"""A real PostgreSQL for tests: separate clusters on free ports that end with the tests."""

import asyncio
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import asyncpg
import pytest

from tests.support.ports import free_port
from tests.support.postgres_programs import give, identity, programs, watch

Mode = Literal["smart", "fast", "immediate"]

_SIGNALS: Mapping[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

_names = (f"test_{number}" for number in count())


def directory_for(prefix: str, in_memory: bool) -> Path:
    """Create a directory that PostgreSQL's user can enter. Only root can enter pytest's."""
    memory = Path("/dev/shm")  # noqa: S108 - creating a database takes between a half and a tenth of the time there
    if not (in_memory and memory.is_dir() and shutil.disk_usage(memory).free > 2**30):
        memory = Path(tempfile.gettempdir())
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=memory))
    give(directory)
    return directory


def _until(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.005)


class Cluster:
    """A server and its data. Both are removed when it is closed, or when the process that started it ends."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        """Create its directory. `settings` are those of postgresql.conf."""
        self._programs = programs()
        self._settings = settings
        self._server: subprocess.Popen[bytes] | None = None
        self.directory = directory_for("tokenauth-postgres-", in_memory=settings["fsync"] == "off")
        self.log = self.directory / "log"
        self.port = 0
        self._watch = watch(self.directory)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def version(self) -> int:
        """The major version, such as 18."""
        return int((self.directory / "data" / "PG_VERSION").read_text())

    def url(self, database: str, port: int | None = None) -> str:
        """Return the URL of a database, or its URL through a proxy's port."""
        return f"postgresql+asyncpg://tokenauth@127.0.0.1:{port or self.port}/{database}"

    def execute(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, in its own connection and transaction."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._fetch(sql, database)).result()

    async def _fetch(self, sql: str, database: str) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(
            host=str(self.directory), port=self.port, user="postgres", database=database, timeout=20, command_timeout=60
        )
        try:
            return [tuple(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()

    def create(self, name: str, template: str = "template1") -> str:
        """Create a database, owned by the service's role, from a template without connections. Return its URL.

        WAL_LOG, the default strategy, takes half the time of FILE_COPY, which makes two checkpoints.
        """
        self.execute(f'CREATE DATABASE "{name}" OWNER tokenauth TEMPLATE "{template}" STRATEGY wal_log')
        return self.url(name)

    def drop(self, name: str) -> None:
        """Drop a database and its connections."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def terminate_all(self, database: str) -> int:
        """End all connections to a database, and return their number."""
        others = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return len(self.execute(others, database))

    def start(self) -> None:
        """Start the server, always on the same port, and wait until it is ready."""
        assert self._server is None
        self.port = self.port or free_port()
        settings = {**self._settings, "port": str(self.port), "unix_socket_directories": str(self.directory)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        with self.log.open("ab") as log:
            self._server = subprocess.Popen(
                [self._programs / "postgres", "-D", self.directory / "data", *options],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **identity(),
            )
        _until(self._ready, self.log.read_text)

    def _ready(self) -> bool:
        """Read postmaster.pid (see PostgreSQL's pidfile.h): the PID is in the first line, the status in the last."""
        assert self._server is not None
        assert self._server.poll() is None, self.log.read_text()
        try:
            lines = (self.directory / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(self._server.pid)] and [line.strip() for line in lines[7:]] == ["ready"]

    def stop(self, mode: Mode = "fast") -> None:
        """Stop the server and wait until it has ended. `immediate` is like a crash."""
        assert self._server is not None
        self._server.send_signal(_SIGNALS[mode])
        self._server.wait(60)
        self._server = None

    def restart(self, mode: Mode = "immediate") -> None:
        self.stop(mode)
        self.start()

    @contextmanager
    def standby(self) -> "Iterator[Cluster]":
        """Run a read-only second server that replicates this one."""
        with Cluster(self._settings) as made:
            source = ["-h", str(self.directory), "-p", str(self.port), "-U", "postgres"]
            made.run("pg_basebackup", "-R", "-D", "data", "-c", "fast", "--no-sync", *source)
            made.start()
            yield made

    def follow(self, primary: "Cluster") -> None:
        """Wait until this standby has replayed all that the primary has written so far."""
        at = primary.execute("SELECT pg_current_wal_lsn()::text")[0][0]
        _until(lambda: self.execute(f"SELECT pg_last_wal_replay_lsn() >= '{at}'") == [(True,)], self.log.read_text)

    def run(self, program: str, *arguments: str) -> None:
        """Run a PostgreSQL program in the cluster's directory."""
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            check=False,
            cwd=self.directory,
            capture_output=True,
            text=True,
            **identity(),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def close(self) -> None:
        """Stop the server and remove its data."""
        if self._server is not None:
            self.stop("immediate")
        self._watch.communicate(b"\n")
        shutil.rmtree(self.directory)


@contextmanager
def cluster(*, fsync: bool = True, **settings: str) -> Iterator[Cluster]:
    """Run a server. Without fsync its data is in memory, which is faster.

    Either way acknowledged commits survive an immediate stop. Only a crash of the machine could lose them.
    """
    speed = {"fsync": "on"} if fsync else {"fsync": "off", "full_page_writes": "off"}
    small = {"max_wal_size": "256MB", "wal_keep_size": "64MB", "max_connections": "300"}
    with Cluster({**speed, **small, "listen_addresses": "127.0.0.1", **settings}) as made:
        made.run("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        made.start()
        made.execute("CREATE ROLE tokenauth LOGIN")
        yield made


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """Run one server for each process of pytest, for all tests that do not stop it."""
    with cluster(fsync=False) as running:
        yield running


@pytest.fixture
def database(postgres: Cluster) -> Iterator[str]:
    """Create an empty database, and yield its URL."""
    name = next(_names)
    yield postgres.create(name)
    postgres.drop(name)
