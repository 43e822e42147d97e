"""What is measured on: databases full of tokens, configurations, and server processes pinned to a core."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import httpx
from passlib.hash import pbkdf2_sha256

from bench.machine import SERVER_CORE
from tests.support.ports import free_port
from tokenauth.settings import loader

ROOT = Path(__file__).parents[1]
MILLION = 1_000_000
USERS = 500
NEGLIGIBLE = pbkdf2_sha256.using(rounds=1).hash("secret")

_SCOPES = 'scopes = ["introspect"]'
_TOKENAUTH = str(Path(sys.executable).with_name("tokenauth"))
_PATIENCE = 60


def value(number: int) -> str:
    """Write the value of the benchmark's token number so and so; the load generator writes it alike."""
    return f"{number:064d}"


def write_config(
    directory: Path, server: str = "", password: str = NEGLIGIBLE, tables: str = "", url: str = ""
) -> Path:
    """Write a configuration with 500 users whose hash of "secret" is `password`, and with more `tables`.

    Without the `url` of another database it has a file of its own.
    """
    directory.mkdir(exist_ok=True)
    users = "".join(
        f'[[users]]\nusername = "user{number}"\npassword = "{password}"\n{_SCOPES}\n' for number in range(USERS)
    )
    path = directory / "config.toml"
    url = url or f"sqlite+aiosqlite:///{database(path)}"
    path.write_text(f'[database]\nurl = "{url}"\n[server]\nworkers = 1\n{server}\n{tables}\n{users}')
    path.chmod(0o600)
    return path


def database(config: Path) -> Path:
    """Return where the database of a configuration is."""
    return config.with_name("tokenauth.db")


def migrate(config: Path) -> None:
    """Bring the schema of a database up to date."""
    subprocess.run([_TOKENAUTH, "migrate", "--config", str(config)], check=True, capture_output=True)


def fill(config: Path, count: int) -> None:
    """Put so many live tokens into a new database, in the order that is quickest to write."""
    migrate(config)
    directory = loader.load(config).directory
    users = [directory[f"user{number}"] for number in range(USERS)]
    now = time.time()
    rows = []
    for number in range(count):
        user = users[number % USERS]
        digest = sha256(value(number).encode()).digest()
        origin = (f"10.0.{number % 256}.{number % 199}", f"Browser/{number % 40}")
        rows.append((digest, user.username, user.credential, now, int(now) + 86400, *origin))
    rows.sort()
    with closing(sqlite3.connect(database(config))) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        db.executemany("INSERT INTO tokens VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.sync()  # now, and not while something is measured


_INSERT = """
    INSERT INTO pool_tokens (pool, value, free_at, holder, fence, username, retired) VALUES (?, ?, ?, ?, ?, ?, 0)
"""


def fill_pool(config: Path, pool: str, values: Iterable[str], lent: bool = False) -> None:
    """Put tokens into a pool of a database that is there: free, or lent for a day."""
    now = time.time()
    row = (now + 86400, "worker-7", 1, "user0") if lent else (now, None, 0, None)
    with closing(sqlite3.connect(database(config))) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        rows = ((pool, value, *row) for value in values)
        db.executemany(_INSERT, rows)
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.sync()


def lent(config: Path, pool: str) -> int:
    """Count the tokens of a pool that are lent."""
    with closing(sqlite3.connect(f"file:{database(config)}?mode=ro", uri=True)) as db:
        query = "SELECT count(*) FROM pool_tokens WHERE pool = ? AND free_at > ?"
        return int(db.execute(query, (pool, time.time())).fetchone()[0])


def counts(config: Path) -> tuple[int, int]:
    """Count the tokens in a database, and those that were ended."""
    with closing(sqlite3.connect(f"file:{database(config)}?mode=ro", uri=True)) as db:
        tokens, ended = db.execute(
            "SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM revocations)"
        ).fetchone()
    return tokens, ended


class Running:
    """A server under measurement."""

    def __init__(self, process: "subprocess.Popen[bytes]", client: httpx.Client, start_seconds: float) -> None:
        self._process = process
        self.client = client
        self.port = client.base_url.port or 0
        self.start_seconds = start_seconds

    def memory(self) -> dict[str, float]:
        """Say how many MB the worker has resident, its proportional share of that, and the other processes' share."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        worker, *others = sorted(map(_rollup, [str(pid), *children]), key=lambda sizes: sizes["Rss"], reverse=True)
        return {"rss": worker["Rss"], "pss": worker["Pss"], "others": sum(sizes["Pss"] for sizes in others)}


@contextmanager
def tokenauth(config: Path, core: int | None = SERVER_CORE) -> Iterator[Running]:
    """Run `tokenauth serve`, on one core or on all."""
    port = free_port()
    command = [_TOKENAUTH, "serve", "--config", str(config), "--port", str(port)]
    with _run(command, config.parent, port, "/readyz", core) as running:
        yield running


@contextmanager
def bare(directory: Path) -> Iterator[Running]:
    """Run the yardstick."""
    port = free_port()
    with _run([sys.executable, "-m", "bench.bare", str(port)], directory, port, "/", SERVER_CORE) as running:
        yield running


@contextmanager
def _run(command: list[str], directory: Path, port: int, path: str, core: int | None) -> Iterator[Running]:
    pin = [] if core is None else ["taskset", "-c", str(core)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = directory / "server.log"
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=_PATIENCE) as client,
        log.open("wb") as output,
    ):
        began = time.perf_counter()
        process = subprocess.Popen([*pin, *command], cwd=directory, env=environment, stdout=output, stderr=output)
        try:
            if not _answers(client, path, process):
                raise RuntimeError(f"{' '.join(command)} does not serve: {log.read_text()[-500:].strip()}")
            yield Running(process, client, time.perf_counter() - began)
        finally:
            client.close()  # or the server would wait for a last request
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(client: httpx.Client, path: str, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until the server answers 200."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if client.get(path).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.005)
    return False


def _rollup(pid: str) -> dict[str, float]:
    """Read the sizes of a process in MB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {name.rstrip(":"): int(kib) * 1024 / 1e6 for name, kib, *_ in lines}
