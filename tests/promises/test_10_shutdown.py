"""Promise 10: a request that was accepted is answered, also during SIGTERM."""

import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.support.connections import LOGIN, Closed, Connection, NoAnswer, Refused
from tests.support.journal import Client, Journal, background, check_file, run_clients, serving, until
from tests.support.servers import Server, worker, write_config
from tokenauth.executor import LOW_PRIORITY


@contextmanager
def under_load(server: Server, clients: int = 6) -> Iterator[Counter[str]]:
    """Have clients send requests as fast as they can, each over one keep-alive connection. Count the outcomes.

    A client ends when the server closes the connection between two requests, or asks it to. That is not a failure.
    """
    seen: Counter[str] = Counter()
    connections = [Connection(server.port) for _ in range(clients)]
    token = connections[0].log_in()

    def ask() -> None:
        connection = connections.pop()
        ended = False
        try:
            while not ended:
                if seen["answered"] % 20:
                    answer = connection.ask("GET", f"/api/token?token={token}")
                else:
                    answer = connection.ask("POST", "/api/token", LOGIN)
                assert answer.status == 200, answer
                seen["answered"] += 1
                ended = answer.headers.get("connection") == "close"
        except Closed:
            pass
        except NoAnswer:
            seen["sent, no answer"] += 1
        finally:
            connection.close()
            done.append(1)
        while not stopped:
            time.sleep(0.01)

    done: list[int] = []
    stopped: list[int] = []
    with background(ask, clients):
        try:
            until(lambda: seen["answered"] >= 200, "the clients are busy")
            yield seen
            until(lambda: len(done) == clients, "every client was disconnected")
        finally:
            stopped.append(1)


def test_sigterm_answers_all_requests_on_open_connections(tmp_path: Path) -> None:
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    with serving(config, "--workers", "2") as server:
        with under_load(server) as seen:
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert server.events("stopped")
    assert seen["sent, no answer"] == 0, seen


def test_a_connection_during_sigterm_never_hangs(tmp_path: Path) -> None:
    """Once the server stops accepting, new connections are refused at once, not only when the last process ends."""
    with serving(write_config(tmp_path)) as server, half_a_login(server) as (connection, rest):
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(server), "the port is closed")
        assert server.process.poll() is None, "must wait for the request in progress"
        connection.sendall(rest)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        assert server.process.wait(30) == 0


@contextmanager
def half_a_login(server: Server) -> Iterator[tuple[socket.socket, bytes]]:
    """Send half of a login, and return the connection and the rest of the body."""
    body = msgspec.json.encode(LOGIN)
    head = f"POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(head.encode() + body[:5])
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        yield connection, body[5:]


def refuses(server: Server) -> bool:
    """Whether a connection is refused. If it is not, it must be answered or closed soon."""
    try:
        with Connection(server.port, timeout=20) as connection:
            assert connection.ask("GET", "/healthz", Connection="close").status == 200
    except Refused:
        return True
    except (Closed, NoAnswer) as lost:
        if isinstance(lost.__cause__, TimeoutError):  # connected, but never answered
            raise
    return False


def test_sigterm_answers_a_login_that_is_still_hashing(tmp_path: Path) -> None:
    """SIGTERM waits for a slow request, and the token that it returns is valid."""
    config = write_config(tmp_path, "[passwords]\nmemory_kib = 8\ntime_cost = 1\nthreads = 1\n", users=SLOW_USER)
    with worker(config) as server, Connection(server.port) as connection:
        answers: list[str] = []

        def log_in() -> None:
            if not answers:
                answers.append(connection.log_in("slow", "admin"))

        with background(log_in):
            until(lambda: busy(server.process.pid), "the password is being hashed")
            server.process.send_signal(signal.SIGTERM)
            until(lambda: bool(answers), "the login is answered")
        server.process.wait(30)
    with worker(config) as server, Connection(server.port) as connection:
        assert connection.valid(answers[0])


# the password "admin", at a cost of about half a second
SLOW_USER = """
[[users]]
username = "slow"
password = "$argon2id$v=19$m=65536,t=12,p=1$hseKy6u/muQ5aIsVjar/Ng$Q3KiURnWY5IKjU+pvkwS9JTnObt8X/b7q2PChJWcYWs"
"""


def busy(process: int) -> bool:
    """Whether the thread that hashes passwords is running."""
    for task in Path(f"/proc/{process}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        if int(fields[16]) == LOW_PRIORITY and int(fields[11]) > 0:  # nice; ticks of user time
            return True
    return False


def test_sigterm_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Clients log in and out until the end and record every answer. The next server agrees with all of them."""
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    journals = [Journal() for _ in range(4)]
    with serving(config, "--workers", "2") as server:
        clients: list[Client] = run_clients([server.port], journals, seed=7)
        until(lambda: sum(len(one.issued) for one in journals) >= 100, "the clients have tokens")
        server.stop()
        for client in clients:
            client.finish()
    with worker(config) as server, Connection(server.port) as connection:
        for journal in journals:
            journal.check(connection.valid)
    check_file(tmp_path / "tokenauth.db", journals)
