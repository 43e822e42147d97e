"""A TCP proxy to a server that can hold back or replace responses."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from tests.support.journal import until


class Proxy:
    """Forwards requests and responses. `replaced` counts the requests that were not forwarded."""

    def __init__(self, port: int, lag: Callable[[], object] = lambda: None) -> None:
        """Connect to a port. Each response is delayed by `lag`."""
        self._port = port
        self._lag = lag
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._open = threading.Event()
        self._open.set()
        self._held_back = 0
        self._replacement: bytes | None = None
        self.replaced = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def hold(self) -> None:
        """Hold back all responses from now on. The server still handles the requests."""
        self._held_back = 0
        self._open.clear()

    def wait_for_response(self) -> None:
        """Wait until a response is held back."""
        until(lambda: self._held_back > 0, "a response is held back")

    def resume(self) -> None:
        """Send the responses that were held back."""
        self._open.set()

    def drop(self) -> None:
        """Close all connections. The responses that were held back are lost."""
        connections, self._sockets[1:] = self._sockets[1:], []
        for one in connections:
            _close(one)
        self._open.set()

    def replace(self, answer: bytes) -> None:
        """Answer each request with this, and close the connection. The server receives nothing."""
        self.replaced = 0
        self._replacement = answer

    def wait_for_request(self) -> None:
        """Wait until the proxy has answered a request."""
        until(lambda: self.replaced > 0, "a request was answered by the proxy")

    def restore(self) -> None:
        """Let the server respond again."""
        self._replacement = None

    def close(self) -> None:
        """Close all connections."""
        self._open.set()
        for one in self._sockets:
            _close(one)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                threading.Thread(target=self._forward_requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._forward_responses, args=(client, server), daemon=True).start()

    def _forward_requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if self._replacement is None:
                    server.sendall(data)
                else:
                    client.sendall(self._replacement)
                    self.replaced += 1
                    break
        _close(client)
        _close(server)

    def _forward_responses(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if not self._open.is_set():
                    self._held_back += 1
                    self._open.wait()
                self._lag()
                client.sendall(data)
        _close(client)
        _close(server)


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
