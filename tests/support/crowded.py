"""Thousands of connections that send nothing, or very slowly, while a few clients must be served."""

import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from tests.support.connections import Connection
from tests.support.journal import serving, until
from tests.support.main_process import workers_of
from tests.support.servers import write_config

Manner = Literal["idle", "half a head", "half a body", "never reads"]

MANNERS: dict[Manner, bytes] = {
    "idle": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "half a body": b"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n{",
    "never reads": b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
}


def memory(processes: list[int]) -> int:
    """Return the resident memory of processes, in KiB."""
    return sum(
        int(Path(f"/proc/{process}/status").read_text().partition("VmRSS:")[2].split()[0]) for process in processes
    )


@contextmanager
def connections(port: int, count: int, meanwhile: Callable[[], object]) -> Iterator[list[socket.socket]]:
    """Open connections, each in one of MANNERS in turn. Call `meanwhile` again and again."""
    with ExitStack() as stack:
        opened = []
        for number in range(count):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(60)
            one.connect(("127.0.0.1", port))
            one.setblocking(False)
            one.send(list(MANNERS.values())[number % len(MANNERS)])
            opened.append(one)
            if number % 100 == 0:
                meanwhile()
        yield opened


def survive_a_crowd(directory: Path, count: int, descriptors: int) -> None:
    """Serve others beside `count` silent connections, of which the workers have descriptors for a part only."""
    with serving(write_config(directory), "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        workers = workers_of(server)
        for process in workers:
            resource.prlimit(process, resource.RLIMIT_NOFILE, (descriptors, descriptors))
        with Connection(server.port) as first:
            token = first.log_in()
            before = memory(workers)
            with connections(server.port, count, lambda: first.valid(token)) as crowd:
                began, answered = time.monotonic(), 0
                while answered < 50:
                    with Connection(server.port) as other:
                        assert other.valid(token)
                    answered += 1
                slowest = time.monotonic() - began
                assert first.valid(token), "an older connection must go on"
                assert memory(workers) - before < 60 * count, "more than 60 KiB for each connection"
                slow(crowd)
                assert first.valid(token)
            assert slowest < 60
        assert server.events("file_descriptors_short")
        until(lambda: keeps_a_connection(server.port), "new connections are kept again")
        with Connection(server.port) as last:
            assert last.valid(token)
            assert last.ask("GET", "/readyz").status == 200
        assert {event["event"] for event in server.errors()} == {"file_descriptors_short"}


def slow(crowd: list[socket.socket]) -> None:
    """Send one more byte over each connection that is open. No slow sender may be an error of the server."""
    poll = select.poll()
    for one in crowd:
        poll.register(one, select.POLLIN | select.POLLHUP)
    closed = {descriptor for descriptor, event in poll.poll(0) if event & select.POLLHUP}
    for one in crowd:
        if one.fileno() not in closed:
            try:
                one.send(b"a")
            except OSError:
                closed.add(one.fileno())


def keeps_a_connection(port: int) -> bool:
    """Whether a new connection stays open after its first answer."""
    with Connection(port) as connection:
        return connection.ask("GET", "/healthz").headers.get("connection") != "close"
