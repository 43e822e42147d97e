"""Promise 10: at the end of a stop, a request that cannot be answered gets 503, and a log-out has ended its tokens."""

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from tests.promises.test_10_shutdown import SLOW_USER
from tests.support.connections import Connection, takes_connections
from tests.support.journal import serving, until
from tests.support.main_process import traceback_lines
from tests.support.servers import Server, serve, write_config

SHORT = {"GRACE": "1"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Start a server that waits for 1 second, and not for 30, when it stops."""
    with serve(write_config(tmp_path), env=SHORT) as running:
        yield running


def open_request(server: Server, head: str, body: bytes = b"{") -> socket.socket:
    """Send a request whose body has 100 bytes, with only the first of them."""
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n".encode())
    assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(body)
    return connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read until the server closes the connection."""
    data = b""
    while more := connection.recv(65536):
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}, body


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_requests_without_an_end_get_503_at_a_stop(server: Server, number: int) -> None:
    with Connection(server.port) as client:
        tokens = [client.log_in() for _ in range(3)]
    in_body = b'{"token": "%b", ' % tokens[1].encode()
    with ExitStack() as stack:
        requests = [
            stack.enter_context(open_request(server, *request))
            for request in (
                ("POST /api/token HTTP/1.1",),
                (f"DELETE /api/token HTTP/1.1\r\nX-Token: {tokens[0]}",),
                ("DELETE /api/token HTTP/1.1", in_body),
                (f"DELETE /api/token?token={tokens[2]} HTTP/1.1",),
            )
        ]
        server.process.send_signal(number)
        for request in requests:
            status, headers, body = answer_of(request)
            assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1"), (status, body)
            assert msgspec.json.decode(body)["error"] == "overloaded"
    if number == signal.SIGHUP:
        until(lambda: bool(server.events("stopped")), "the old worker has ended")
    else:
        assert server.process.wait(30) == 0
    assert traceback_lines(server) == []
    assert {event["event"] for event in server.events() if event["level"] in {"warning", "error"}} <= ALLOWED
    check_ended(server, tokens)


ALLOWED = {"configuration_risk"}


def check_ended(server: Server, tokens: list[str]) -> None:
    """Check which log-outs have ended their token, after a restart if the server has stopped.

    The first one has not: the rest of its body could have named another token than its header.
    """
    with ExitStack() as stack:
        if server.process.poll() is not None:
            server = stack.enter_context(serving(server.log.parent / "config.toml"))
        client = stack.enter_context(Connection(server.port))
        assert [client.valid(token) for token in tokens] == [True, False, False]


def test_a_login_that_hashes_for_too_long_gets_503(tmp_path: Path) -> None:
    hash_ = SLOW_USER.replace("t=12", "t=60")
    assert hash_ != SLOW_USER
    config = write_config(tmp_path, "[passwords]\nmemory_kib = 8\ntime_cost = 1\nthreads = 1\n", users=hash_)
    with serve(config, env=SHORT) as server:
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            body = msgspec.json.encode({"username": "slow", "password": "admin"})
            connection.sendall(
                b"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            until(lambda: takes_connections(server.port), "the login has been received")
            server.process.send_signal(signal.SIGTERM)
            status, headers, body = answer_of(connection)
        assert (status, headers["connection"], msgspec.json.decode(body)["error"]) == (503, "close", "overloaded")
        assert traceback_lines(server) == []
