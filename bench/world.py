"""What is measured on: databases full of tokens, configurations, and server processes pinned to a core."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import httpx
from passlib.hash import pbkdf2_sha256

from tokenauth import configfile
from tokenauth.app import create_service
from tokenauth.configfile import load

ROOT = Path(__file__).parents[1]
MILLION = 1_000_000
HOT = 500
USERS = 500
SERVER_CORE, LOAD_CORE = "0", "1"


def value(number: int) -> str:
    """Write the value of the benchmark's token number so and so; the load generator writes it alike."""
    return f"{number:064d}"


def write_config(directory: Path, more: str = "", password: str | None = None) -> Path:
    """Write a configuration with 500 users whose password hash is `password`, by default a negligible one."""
    hashed = password or pbkdf2_sha256.using(rounds=1).hash("secret")
    users = "".join(f'[[users]]\nusername = "user{number}"\npassword = "{hashed}"\n' for number in range(USERS))
    path = directory / "config.toml"
    url = f"sqlite+aiosqlite:///{directory}/tokenauth.db"
    path.write_text(f'[database]\nurl = "{url}"\n[server]\nworkers = 1\n{more}\n{users}')
    return path


async def fill(config: Path, count: int = MILLION) -> None:
    """Put so many live tokens into a database, in the order that is quickest to write."""
    service = create_service(load(config))
    async with service.running():
        pass
    users = [service.config.directory[f"user{number}"] for number in range(USERS)]
    now = time.time()
    rows = []
    for number in range(count):
        user = users[number % USERS]
        digest = sha256(value(number).encode()).digest()
        origin = (f"10.0.{number % 256}.{number % 199}", f"Browser/{number % 40}")
        rows.append((digest, user.username, user.credential, now, int(now) + 86400, *origin))
    rows.sort()
    path = configfile.load(config).database.url.partition("///")[2]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        db.executemany("INSERT INTO tokens VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class Running:
    """A server under measurement."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, seconds: float) -> None:
        self.process = process
        self.port = port
        self.start_seconds = seconds

    def memory(self) -> int:
        """Resident bytes of the worker, which is the only child of the supervisor that has a store."""
        pids = [self.process.pid, *_children(self.process.pid)]
        return max(_resident(pid) for pid in pids)

    def workers(self) -> list[int]:
        """Process ids of the supervisor's children."""
        return _children(self.process.pid)


@contextmanager
def tokenauth(config: Path, core: str | None = SERVER_CORE) -> Iterator[Running]:
    """Run `tokenauth serve`, on one core or on all."""
    program = [str(Path(sys.executable).with_name("tokenauth")), "serve", "--config", str(config)]
    with _run(program, config.parent, "/readyz", core) as running:
        yield running


@contextmanager
def bare(directory: Path) -> Iterator[Running]:
    """Run the yardstick."""
    with _run([sys.executable, "-m", "bench.bare"], directory, "/", SERVER_CORE) as running:
        yield running


@contextmanager
def _run(program: list[str], directory: Path, path: str, core: str | None) -> Iterator[Running]:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    pin = ["taskset", "-c", core] if core else []
    arguments = ["--port", str(port)] if "serve" in program else [str(port)]
    began = time.perf_counter()
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*pin, *program, *arguments], cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=log
        )
    try:
        seconds = _wait(f"http://127.0.0.1:{port}{path}", process) - began
        yield Running(process, port, seconds)
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes]) -> float:
    while process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return time.perf_counter()
        except httpx.TransportError:
            time.sleep(0.005)
    raise RuntimeError(f"the server ended with {process.returncode}")


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
