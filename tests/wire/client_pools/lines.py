"""A line to a server that a test can disturb: answers are kept back, or others come in their place."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from tests.support.journal import until


class Line:
    """Listens on a port of its own, and passes on what is said; `replaced` are the requests that were not."""

    def __init__(self, port: int, lag: Callable[[], object] = lambda: None) -> None:
        """Lay it to a port; each answer waits for `lag`."""
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
        """What clients ask."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def hold(self) -> None:
        """Keep all answers back from now on: the server does what it is asked, and nobody hears of it."""
        self._kept = 0
        self._open.clear()

    def wait_for_answer(self) -> None:
        """Wait until an answer is kept back."""
        until(lambda: self._kept > 0, "an answer is on the line")

    def free(self) -> None:
        """Let all answers through."""
        self._open.set()

    def replace(self, answer: bytes) -> None:
        """Answer each request with this, and hang up; the server hears nothing."""
        self.replaced = 0
        self._instead = answer

    def wait_for_request(self) -> None:
        """Wait until a request was answered in place of the server."""
        until(lambda: self.replaced > 0, "a request is on the line")

    def restore(self) -> None:
        """Let the server answer."""
        self._instead = None

    def close(self) -> None:
        """Hang up."""
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
