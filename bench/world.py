"""Creates configurations and databases full of tokens, and runs servers on one core."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
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
_TIMEOUT = 60


INSERT_TOKEN = """
    INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent)
    VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_INSERT = """
    INSERT INTO pool_tokens (pool, value, free_at, holder, fence, username, retired) VALUES (?, ?, ?, ?, ?, ?, 0)
"""


def value(number: int) -> str:
    """Return the value of a token of the benchmark, by its number. load.lua does the same."""
    return f"{number:064d}"


def write_config(
    directory: Path, server: str = "", password: str = NEGLIGIBLE, tables: str = "", url: str = ""
) -> Path:
    """Write a configuration with 500 users, and return its path.

    server: further lines of [server]. password: the hash of "secret" of all users. tables: further tables.
    url: the database; by default, a file in the directory of the configuration.
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
    """Return the path of the database of a configuration."""
    return config.with_name("tokenauth.db")


def migrate(config: Path) -> None:
    """Create or upgrade the schema of a database."""
    command = [_TOKENAUTH, "migrate", "--config", str(config)]
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT)


def fill(config: Path, count: int) -> None:
    """Insert `count` live tokens into a new database, ordered by digest: that is fastest."""
    migrate(config)
    rows = sorted(token_rows(config, count, time.time()))
    with closing(sqlite3.connect(database(config))) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        db.executemany(INSERT_TOKEN, rows)
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.sync()  # now, not during a measurement


def credentials_of(config: Path) -> Sequence[str]:
    """Return the fingerprints of the password hashes of the users, which tokens have."""
    users = loader.load(config).users_by_name
    return [users[f"user{number}"].credential for number in range(USERS)]


def token_rows(
    config: Path, count: int, since: float, distance: float = 0, first: int = 0
) -> Iterator[tuple[bytes, str, str, float, int, str, str]]:
    """Make the rows of logins of the users in turn, in the order of their issue; `distance`: seconds between two."""
    credentials = credentials_of(config)
    for number in range(first, first + count):
        at, user = since + (number - first) * distance, number % USERS
        origin = (f"10.0.{number % 256}.{number % 199}", f"Browser/{number % 40}")
        digest = sha256(value(number).encode()).digest()
        yield digest, f"user{user}", credentials[user], at, int(at) + 86400, *origin


def fill_pool(config: Path, pool: str, values: Iterable[str], leased: bool = False) -> None:
    """Insert tokens into a pool of an existing database: free, or leased for a day."""
    now = time.time()
    row = (now + 86400, "worker-7", 1, "user0") if leased else (now, None, 0, None)
    with closing(sqlite3.connect(database(config))) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        rows = ((pool, value, *row) for value in values)
        db.executemany(_INSERT, rows)
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.sync()


def count_leased(config: Path, pool: str) -> int:
    """Return the number of leased tokens of a pool."""
    with closing(sqlite3.connect(f"file:{database(config)}?mode=ro", uri=True)) as db:
        query = "SELECT count(*) FROM pool_tokens WHERE pool = ? AND free_at > ?"
        return int(db.execute(query, (pool, time.time())).fetchone()[0])


def counts(config: Path) -> tuple[int, int]:
    """Return the number of tokens in a database, and of revoked ones."""
    with closing(sqlite3.connect(f"file:{database(config)}?mode=ro", uri=True)) as db:
        tokens, revoked = db.execute(
            "SELECT (SELECT count(*) FROM tokens), (SELECT count(*) FROM revocations)"
        ).fetchone()
    return tokens, revoked


class Running:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[bytes]", client: httpx.Client, start_seconds: float) -> None:
        self._process = process
        self.client = client
        self.port = client.base_url.port or 0
        self.start_seconds = start_seconds

    def memory(self) -> dict[str, float]:
        """Return in MB: the RSS and the PSS of the worker, and the PSS of the other processes."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        worker, *others = sorted(map(_rollup, [str(pid), *children]), key=lambda sizes: sizes["Rss"], reverse=True)
        return {"rss": worker["Rss"], "pss": worker["Pss"], "others": sum(sizes["Pss"] for sizes in others)}

    def workers(self) -> Sequence[int]:
        """Return the process ids of the workers."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def cpu_seconds(self) -> float:
        """Return the CPU time that all of its processes have used."""
        return cpu_seconds_of_tree(str(self._process.pid))


@contextmanager
def tokenauth(config: Path, core: int | None = SERVER_CORE) -> Iterator[Running]:
    """Run `tokenauth serve` on one core, or with None on all."""
    port = free_port()
    command = [_TOKENAUTH, "serve", "--config", str(config), "--port", str(port)]
    with _run(command, config.parent, port, "/readyz", core) as running:
        yield running


@contextmanager
def bare(directory: Path) -> Iterator[Running]:
    """Run the bare ASGI function."""
    port = free_port()
    with _run([sys.executable, "-m", "bench.bare", str(port)], directory, port, "/", SERVER_CORE) as running:
        yield running


@contextmanager
def _run(command: list[str], directory: Path, port: int, path: str, core: int | None) -> Iterator[Running]:
    pin = [] if core is None else ["taskset", "-c", str(core)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = directory / "server.log"
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=_TIMEOUT) as client,
        log.open("wb") as output,
    ):
        began = time.perf_counter()
        process = subprocess.Popen([*pin, *command], cwd=directory, env=environment, stdout=output, stderr=output)
        try:
            if not _answers(client, path, process):
                raise RuntimeError(f"{' '.join(command)} did not start: {log.read_text()[-500:].strip()}")
            yield Running(process, client, time.perf_counter() - began)
        finally:
            client.close()  # otherwise the server would wait for another request
            process.terminate()
            try:
                process.wait(_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(client: httpx.Client, path: str, process: "subprocess.Popen[bytes]") -> bool:
    """Wait for a 200 response. Return whether it came in time."""
    deadline = time.monotonic() + _TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if client.get(path).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.005)
    return False


def cpu_seconds_of_tree(pid: str) -> float:
    """Return the CPU time of a process and its children, with those that have ended."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(_cpu_seconds, [pid, *children]))


def _cpu_seconds(pid: str) -> float:
    """Return the CPU time of a process, and of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except FileNotFoundError:  # it has just ended: now its parent counts it
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _rollup(pid: str) -> dict[str, float]:
    """Return the memory sizes of a process in MB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {name.rstrip(":"): int(kib) * 1024 / 1e6 for name, kib, *_ in lines}
