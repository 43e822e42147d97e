"""A TCP proxy to a server that can hold back or replace responses."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from tests.support.journal import until


class Line:
    """Passes on requests and responses. `replaced` counts the requests that were not passed on."""

    def __init__(self, port: int, lag: Callable[[], object] = lambda: None) -> None:
        """Connect to a port. Each response is delayed by `lag`."""
        self._port = port
        self._lag = lag
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._open = threading.Event()
        self._open.set()
        self._kept = 0
        self._instead: bytes | None = None
        self.replaced = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def hold(self) -> None:
        """Hold back all responses from now on. The server still handles the requests."""
        self._kept = 0
        self._open.clear()

    def wait_for_answer(self) -> None:
        """Wait until a response is held back."""
        until(lambda: self._kept > 0, "an answer is on the line")

    def free(self) -> None:
        """Send the responses that were held back."""
        self._open.set()

    def replace(self, answer: bytes) -> None:
        """Answer each request with this, and close the connection. The server receives nothing."""
        self.replaced = 0
        self._instead = answer

    def wait_for_request(self) -> None:
        """Wait until a response was replaced."""
        until(lambda: self.replaced > 0, "a request is on the line")

    def restore(self) -> None:
        """Let the server respond again."""
        self._instead = None

    def close(self) -> None:
        """Close all connections."""
        self._open.set()
        for one in self._sockets:
            _hang_up(one)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [near, far]
                threading.Thread(target=self._pass_questions, args=(near, far), daemon=True).start()
                threading.Thread(target=self._pass_answers, args=(near, far), daemon=True).start()

    def _pass_questions(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(65536):
                if self._instead is None:
                    far.sendall(data)
                else:
                    near.sendall(self._instead)
                    self.replaced += 1
                    break
        _hang_up(near)
        _hang_up(far)

    def _pass_answers(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(65536):
                if not self._open.is_set():
                    self._kept += 1
                    self._open.wait()
                self._lag()
                near.sendall(data)
        _hang_up(near)
        _hang_up(far)


def _hang_up(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
