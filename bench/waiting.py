"""The figures about the waiting line of a pool: how long a hand-over takes, and what 1,000 waiting clients cost."""

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench import world
from bench.figures import Figure, Sample, Sampler
from bench.world import Running

WAITING = 1000
"""Clients in the line, where many wait. One user may have as many."""

CONSOLES = 200
"""Streams of events, where many consoles are open."""

TABLES = """
[pools.one]
capacity = 1
prefill = true
lease_ttl = "1h"
"""

_LEASES = "/api/pools/one/leases"
_LOOK = 0.004
"""Seconds between two looks at the line."""


class WaitRows:
    """The figures of one database. Two servers use it, as two workers or two nodes do."""

    def __init__(self, prefix: str, shown: str, configure: Callable[[], Path], far: float, seconds: int) -> None:
        """`prefix` and `shown` begin names and titles. `far`: how long a hand-over to the other server may take."""
        self._prefix = prefix
        self._shown = shown
        self._configure = configure
        self._far = far
        self._seconds = seconds

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        name, shown = self._prefix, self._shown
        far = "another node" if self._prefix else "another worker"
        return (
            Figure(f"{name}hand-over", f"{shown}release to waiting client", 5, "ms", partial(self._near, 0), True),
            Figure(f"{name}hand-over-far", f"{shown}the same, {far}", self._far, "ms", partial(self._near, 1), True),
            Figure(f"{name}behind", f"{shown}assign while 1,000 wait", None, "ms", self._behind, True),
            Figure(f"{name}waiters", f"{shown}1,000 waiting, a core", 2, "%", self._idle, True, 1),
            Figure(f"{name}consoles", f"{shown}200 open consoles, a core", 5, "%", self._consoles, True, 1),
        )

    @contextmanager
    def _servers(self) -> Iterator[Sequence["_Client"]]:
        """Run two servers, and have one token, which is leased."""
        config = self._configure()
        with ExitStack() as stack:
            servers = [stack.enter_context(world.tokenauth(config, None)) for _ in range(2)]
            clients = [stack.enter_context(closing(_Client(server))) for server in servers]
            yield clients

    @contextmanager
    def _near(self, number: int) -> Iterator[Sampler]:
        """Release a token at one server while a client waits at the same one, or at the other."""
        with self._servers() as clients, ThreadPoolExecutor(1) as thread:
            releasing = clients[0]
            with closing(_Client(clients[number].server)) as waiting:

                def sample() -> Sample:
                    held = releasing.lease()
                    delays: list[float] = []
                    deadline = time.perf_counter() + self._seconds
                    while time.perf_counter() < deadline:
                        answer = thread.submit(waiting.timed_lease)
                        while not releasing.waiting():
                            time.sleep(_LOOK)
                        time.sleep(len(delays) * 7 % 50 / 1000)  # not in step with the other server
                        released = time.perf_counter()
                        releasing.release(held)
                        held, served = answer.result()
                        delays.append((served - released) * 1000)
                    releasing.release(held)
                    return Sample(median(delays), p99_ms=quantiles(delays, n=100)[98], note=f"{len(delays)} hand-overs")

                yield sample

    @contextmanager
    def _crowd(self) -> Iterator["_Client"]:
        """Let many clients wait for the token."""
        with self._servers() as clients, ExitStack() as stack:
            first = clients[0]
            first.lease()
            for _ in range(WAITING):
                stack.enter_context(closing(first.wait_in_background()))
            while first.waiting() < WAITING:
                time.sleep(_LOOK)
            yield first

    @contextmanager
    def _behind(self) -> Iterator[Sampler]:
        """Ask for a token without waiting, which is refused: others wait."""
        with self._crowd() as client:

            def sample() -> Sample:
                delays: list[float] = []
                deadline = time.perf_counter() + self._seconds
                while time.perf_counter() < deadline:
                    began = time.perf_counter()
                    client.require_refusal()
                    delays.append((time.perf_counter() - began) * 1000)
                return Sample(median(delays), p99_ms=quantiles(delays, n=100)[98])

            yield sample

    @contextmanager
    def _idle(self) -> Iterator[Sampler]:
        """Measure the CPU time of the server in which many wait."""
        with self._crowd() as client:
            yield lambda: _share_of_core(client.server, 10)

    @contextmanager
    def _consoles(self) -> Iterator[Sampler]:
        """Measure the CPU time of an idle server to which many streams of events are open, each of its own login."""
        with self._servers() as clients, ExitStack() as stack:
            server = clients[0].server
            for number in range(CONSOLES):
                with closing(_Client(server, f"user{number % world.USERS}")) as console:
                    stack.enter_context(closing(console.open_events()))

            yield lambda: _share_of_core(server, 20)


def _share_of_core(server: Running, seconds: float) -> Sample:
    """Measure the CPU time of a server that is left alone, in percent of a core."""
    before, began = server.cpu_seconds(), time.perf_counter()
    time.sleep(seconds)
    return Sample((server.cpu_seconds() - before) / (time.perf_counter() - began) * 100)


class _Client:
    """A logged-in user with one connection to a server."""

    def __init__(self, server: Running, username: str = "user0") -> None:
        self.server = server
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        login = self._ask("POST", "/api/token", {"username": username, "password": "secret"}, 200)
        self._token = str(login["token"])

    def close(self) -> None:
        self._connection.close()

    def lease(self) -> str:
        """Lease the token, after the leases before."""
        lease = self._ask("POST", _LEASES, {"wait": 30}, 201)
        return str(lease["token"])

    def timed_lease(self) -> tuple[str, float]:
        return self.lease(), time.perf_counter()

    def release(self, token: str) -> None:
        self._ask("DELETE", f"{_LEASES}/{token}", None, 204)

    def require_refusal(self) -> None:
        self._ask("POST", _LEASES, None, 409)

    def waiting(self) -> int:
        line = self._ask("GET", "/api/pools/one/requests?limit=1", None, 200)
        return int(line["waiting"])

    def wait_in_background(self) -> socket.socket:
        """Send a request that waits, on a connection of its own."""
        body = b'{"wait": 60}'
        head = (
            f"POST {_LEASES} HTTP/1.1\r\nHost: bench\r\nX-Token: {self._token}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.server.port), 60)
        connection.sendall(head.encode() + body)
        return connection

    def open_events(self) -> socket.socket:
        """Open a stream of events, on a connection of its own, and wait for the first one."""
        connection = socket.create_connection(("127.0.0.1", self.server.port), 60)
        head = f"GET /api/events HTTP/1.1\r\nHost: bench\r\nX-Token: {self._token}\r\n\r\n"
        connection.sendall(head.encode())
        found = b""
        while b"event: hello" not in found:
            more = connection.recv(65536)
            if not more:
                raise RuntimeError("the stream of events was refused")
            found += more
        return connection

    def _ask(self, method: str, path: str, document: object, status: int) -> Any:
        headers = {"Content-Type": "application/json"}
        if path != "/api/token":
            headers["X-Token"] = self._token
        body = None if document is None else json.dumps(document)
        self._connection.request(method, path, body, headers)
        with self._connection.getresponse() as answer:
            text = answer.read()
            if answer.status != status:
                raise RuntimeError(f"{method} {path} answered {answer.status}")
            return json.loads(text or b"{}")
