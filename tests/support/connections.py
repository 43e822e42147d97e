"""Raw keep-alive connections. They never retry, and distinguish unsent from unanswered requests."""

import select
import socket
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

TIMEOUT = 150.0
"""Seconds after which a server counts as hanging. The machine may be suspended for a part of them."""

LOGIN = {"username": "admin", "password": "admin"}


class Refused(Exception):
    """The connection failed. Nothing was sent."""


class Closed(Exception):
    """The server closed the connection, or announced that, before the request was sent."""


class NoAnswer(Exception):
    """A request was sent, but no complete answer arrived."""


def connect(port: int | Path, timeout: float = TIMEOUT) -> socket.socket:
    """Connect to a port of this machine, or to a Unix socket. Raises OSError."""
    if isinstance(port, Path):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        try:
            connection.connect(str(port))
        except OSError:
            connection.close()
            raise
        return connection
    connection = socket.create_connection(("127.0.0.1", port), timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Answer(NamedTuple):
    """An answer. Its head is raw bytes, so that answers can be compared."""

    status: int
    head: bytes
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def headers(self) -> dict[str, str]:
        """The headers, names in lower case."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


class Connection:
    """One keep-alive connection without a client library. It never retries."""

    def __init__(self, port: int | Path, timeout: float = TIMEOUT) -> None:
        """Connect to a port of this machine, or to a Unix socket. Raises Refused."""
        try:
            self._socket = connect(port, timeout)
        except OSError as error:
            raise Refused from error
        self._ended = False

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def ask(self, method: str, target: str, document: object = None, **headers: str) -> Answer:
        """Send a request and read its answer. A GET has no body, as usual. Raises Closed or NoAnswer."""
        body = b"" if document is None else msgspec.json.encode(document)
        lines = [f"{method} {target} HTTP/1.1", "Host: test"]
        if method != "GET" or body:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def send(self, request: bytes) -> Answer:
        """Send raw bytes and read one answer. Raises Closed or NoAnswer."""
        poll = select.poll()  # unlike select, for any number of open files
        poll.register(self._socket, select.POLLIN)
        if poll.poll(0) or self._ended:
            raise Closed
        try:
            self._socket.sendall(request)
            data = self._more(b"")
            while b"\r\n\r\n" not in data:
                data = self._more(data)
            head, _, body = data.partition(b"\r\n\r\n")
            answer = Answer(int(head[9:12]), head, b"")
            while len(body) < int(answer.headers.get("content-length", 0)):
                body = self._more(body)
        except (OSError, EOFError) as error:
            raise NoAnswer from error
        self._ended = answer.headers.get("connection", "").lower() == "close"
        return answer._replace(body=body)

    def _more(self, data: bytes) -> bytes:
        more = self._socket.recv(65536)
        if not more:
            raise EOFError
        return data + more

    def log_in(self, username: str = "admin", password: str = "admin") -> str:
        """Log in and return the token's value."""
        answer = self.ask("POST", "/api/token", {"username": username, "password": password})
        assert answer.status == 200, answer
        return str(answer.json()["token"])

    def valid(self, token: str) -> bool:
        """Probe a token. Any status but 200 fails the test."""
        answer = self.ask("GET", f"/api/token?token={token}")
        assert answer.status == 200, answer
        return bool(answer.json()["valid"])

    def log_out(self, token: str) -> None:
        assert self.ask("DELETE", "/api/token", {"token": token}).status == 200


def takes_connections(port: int | Path) -> bool:
    """Whether a server answers there."""
    try:
        with Connection(port) as connection:
            return connection.ask("GET", "/healthz").status == 200
    except Refused:
        return False
