"""A client of /api/events on a socket, which reads chunks as they come."""

import json
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self


class Event(NamedTuple):
    """One event; a comment has an empty name."""

    name: str
    data: Any
    id: str


class EventStream:
    """One stream. Nothing is read unless it is asked for."""

    def __init__(
        self, port: int, token: str, headers: Mapping[str, str] | None = None, read: bool = True, buffer: int = 0
    ) -> None:
        """Open it. `buffer`: size of the receive buffer of the socket; 0 is that of the system."""
        self._connection = socket.socket()
        if buffer:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self._connection.settimeout(30)
        self._connection.connect(("127.0.0.1", port))
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"GET /api/events HTTP/1.1\r\nHost: localhost\r\nX-Token: {token}\r\n{lines}\r\n"
        self._connection.sendall(head.encode("latin-1"))
        self._data = b""
        self._text = ""
        self.ended = False
        self.status = 0
        self.headers: dict[str, str] = {}
        if read:
            self._read_head()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def next(self, seconds: float = 60) -> Event:
        """Return the next event. Fails if none comes in time; EOFError when the stream has ended."""
        deadline = time.monotonic() + seconds
        while "\n\n" not in self._text:
            if self.ended:
                raise EOFError
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            self._read_chunk()
        frame, _, self._text = self._text.partition("\n\n")
        fields = dict(line.split(": ", 1) for line in frame.split("\n") if not line.startswith(":"))
        return Event(fields.get("event", ""), json.loads(fields.get("data", "null")), fields.get("id", ""))

    def wait(self, name: str, seconds: float = 60) -> Event:
        """Return the next event of this name, and skip others."""
        deadline = time.monotonic() + seconds
        while True:
            event = self.next(max(0.001, deadline - time.monotonic()))
            if event.name == name:
                return event

    def pending(self) -> str:
        """Return what has been read and not returned yet."""
        return self._text if "\n\n" in self._text else ""

    def names(self, seconds: float) -> list[str]:
        """Return the names of the events of some seconds."""
        found, deadline = [], time.monotonic() + seconds
        try:
            while True:
                found.append(self.next(max(0.001, deadline - time.monotonic())).name)
        except (TimeoutError, EOFError):
            return found

    def wait_end(self, seconds: float = 60) -> None:
        """Wait until the connection is closed."""
        self._connection.settimeout(seconds)
        while self._connection.recv(65536):
            pass

    def _read_head(self) -> None:
        while b"\r\n\r\n" not in self._data:
            self._receive()
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    def _read_chunk(self) -> None:
        while b"\r\n" not in self._data:
            self._receive()
        size, _, rest = self._data.partition(b"\r\n")
        length = int(size, 16)
        while len(rest) < length + 2:
            self._receive()
            _, _, rest = self._data.partition(b"\r\n")
        self._text += rest[:length].decode()
        self._data = rest[length + 2 :]
        self.ended = length == 0

    def _receive(self) -> None:
        data = self._connection.recv(65536)
        if not data:
            raise ConnectionError("the stream was cut off")
        self._data += data
