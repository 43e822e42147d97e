"""Real server processes that listen on a socket, with a clock that the test sets."""

import json
import mmap
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from tests.support.processes import Forked, Process

ROOT = Path(__file__).parents[2]

TOKENAUTH = str(Path(sys.executable).with_name("tokenauth"))
"""The command that is tested."""

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that use plain HTTP only. By default each client would load all CA certificates."""

NOTHING: Mapping[str, str] = MappingProxyType({})

LONGEST_STEP = 5.0
"""How many seconds of a wait count at most between two looks: the machine may have been suspended."""

HEARTBEAT = 0.2
"""Seconds between two reports of a worker that `serve` starts; 1 in production."""

START = 1_800_000_000.0
"""The first time of every hand-moved clock, in Unix seconds."""

# admin/admin, ann/ann-secret and bob/bob-secret at the lowest cost of argon2, to save time.
USERS = """
[passwords]
memory_kib = 8
time_cost = 1

[[users]]
username = "admin"
password = "$argon2id$v=19$m=8,t=1,p=1$1DonpNSa8/7/fy9FaA2BEA$vAIIqZ6AM8A9n6vGZ8omLlb9pHWuqR8hKAk3aioWjkI"
scopes = ["admin"]

[[users]]
username = "ann"
password = "$argon2id$v=19$m=8,t=1,p=1$ACCE8N47B2DMOYfw/p/zng$ZwQLf+PKlO3PPaSNi0ba7hmCNp5dHfkyEhJ16bQr+KQ"
scopes = ["read", "write"]

[[users]]
username = "bob"
password = "$argon2id$v=19$m=8,t=1,p=1$LIVwzhljLKW0tvbeW2tNqQ$9JC3XMtZhQy2Oi5GB4ktwLx5ktUmIdEa8FXN6h6E8S4"
"""


class HandClock:
    """A hand-moved clock. The time is in a file, so that all processes of a test share it."""

    def __init__(self, path: Path, create: bool = False) -> None:
        if create:
            path.write_bytes(struct.pack("d", START))
        self.path = path
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    def __call__(self) -> float:
        return float(struct.unpack_from("d", self._memory)[0])

    def set(self, now: float) -> None:
        """Set the time, also back."""
        struct.pack_into("d", self._memory, 0, now)

    def advance(self, seconds: float) -> None:
        self.set(self() + seconds)


class Server:
    """One server process, its port and its log."""

    def __init__(self, process: Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the server's log events, or those of one name."""
        wanted = "{" if name is None else f'"{name}"'  # other programs write a space before it
        found = [json.loads(line) for line in whole_lines(self.log) if line.startswith("{") and wanted in line]
        return [line for line in found if name in {None, line["event"]}]

    def errors(self) -> list[dict[str, Any]]:
        """Return the log events that are worse than a warning."""
        return [event for event in self.events() if event["level"] not in {"info", "warning"}]

    def wait(self, event: str, seconds: float = 60, **fields: object) -> dict[str, Any]:
        """Wait until the server has logged an event with these fields, and return it.

        Fails with its log at a timeout or its end.
        """
        waited, before = 0.0, time.monotonic()
        while waited < seconds:
            found = [line for line in self.events(event) if fields.items() <= line.items()]
            if found:
                return found[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.005)
            now = time.monotonic()
            waited, before = waited + min(now - before, LONGEST_STEP), now
        raise AssertionError(f"no {event!r} in the log (exit code {self.process.poll()}):\n{self.log.read_text()}")

    def client(self, **options: Any) -> httpx.Client:
        """Open a client with its own connection."""
        return httpx.Client(base_url=self.url, timeout=30, verify=NO_TLS, **options)

    def stop(self) -> int:
        """Send SIGTERM, wait until it ends, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """Kill it and its child processes with SIGKILL."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # just forked: it has no session yet
                self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)


@contextmanager
def starting(config: Path, clock: HandClock | None = None, env: Mapping[str, str] = NOTHING) -> Iterator[Server]:
    """Start one worker on its own port. Several of them on one database are like `serve --workers N`.

    With a clock, only the test moves the time.
    """
    log = _new_log(config.parent)
    command = ["worker", str(config), str(clock.path) if clock else "-"]
    process = Forked(
        "tests.support.worker", command, config.parent, [Path(os.devnull), log, log], {**os.environ, **env}
    )
    with _ended(Server(process, log)) as server:
        yield server


@contextmanager
def worker(config: Path, clock: HandClock | None = None, env: Mapping[str, str] = NOTHING) -> Iterator[Server]:
    with starting(config, clock, env) as server:
        server.port = server.wait("test_worker_ready")["port"]
        yield server


@contextmanager
def serve(config: Path, *arguments: str, env: dict[str, str] | None = None, on_port: bool = True) -> Iterator[Server]:
    """Run the command `tokenauth serve`, on a free port, until it answers. Its workers are forked (`serving.py`).

    Without `on_port`, it listens where its configuration says.
    """
    log = _new_log(config.parent)
    port = ["--port", "0"] if on_port else []
    command = ["tokenauth", "serve", "--config", str(config), *port, *arguments]
    streams = [Path(os.devnull), log, log]
    process = Forked("tests.support.serving", command, config.parent, streams, {**_environment(), **(env or {})})
    with _ended(Server(process, log)) as server:
        server.wait("started")
        server.port = server.wait("listening").get("port", 0)
        yield server


@contextmanager
def spawn(
    command: Sequence[str], directory: Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Server]:
    """Start a process that logs to a file in the directory. Kill it and its children at the end."""
    log = _new_log(directory)
    environment = {**_environment(), **(env or {})}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=cwd or directory,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with _ended(Server(process, log)) as server:
        yield server


def _environment() -> dict[str, str]:
    """Return the environment of a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def whole_lines(file: Path) -> list[str]:
    """Return the lines of a file that another process may be writing: its last one may not be complete."""
    return file.read_bytes().rpartition(b"\n")[0].decode().splitlines()


def _new_log(directory: Path) -> Path:
    log = directory / f"server-{len(list(directory.glob('server-*.log')))}.log"
    log.touch()
    return log


@contextmanager
def _ended(server: Server) -> Iterator[Server]:
    """Kill a server and its children at the end."""
    try:
        yield server
    finally:
        server.kill()


@cache
def shipped() -> str:
    """Return the shipped `config.toml`, without local edits in the checkout."""
    done = subprocess.run(["git", "show", ":config.toml"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else (ROOT / "config.toml").read_text()


def shipped_with_dialects() -> str:
    """Return the shipped `config.toml` with its dialects enabled: without the "# " in front of their lines."""
    before, first, dialects = shipped().partition("# [dialects.")
    return before + re.sub(r"^# ", "", first + dialects, flags=re.MULTILINE)


def write_config(directory: Path, more: str = "", users: str = USERS) -> Path:
    """Write a configuration with a database in the same directory. `more` is inserted before the users."""
    path = directory / "config.toml"
    path.write_text(f"""[database]\nurl = "sqlite+aiosqlite:///{directory}/tokenauth.db"\n{more}\n{users}""")
    path.chmod(0o600)
    return path


def log_in(client: httpx.Client, username: str = "admin", password: str = "admin", **options: Any) -> str:
    """Log in and return the token's value."""
    answer = client.post("/api/token", json={"username": username, "password": password}, **options)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


def probe(client: httpx.Client, token: str) -> bool:
    answer = client.get("/api/token", params={"token": token})
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["valid"])


def exchange(port: int, request: bytes, timeout: float = 30) -> tuple[int, dict[str, str], bytes]:
    """Send raw bytes and read one answer: status, headers (lower case), body."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(request)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: status, headers (lower case), body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(connection, data)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += _more(connection, data)
    match = re.match(r"HTTP/1\.1 (\d+)", first)
    assert match is not None, first
    return int(match[1]), headers, body


def _more(connection: socket.socket, received: bytes) -> bytes:
    more = connection.recv(65536)
    assert more, f"the connection was closed after {received!r}"
    return more
