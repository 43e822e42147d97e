"""Servers whose responses the test sets and which record their requests, and clients of both kinds."""

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import httpx

from tests.support.servers import NO_TLS, START
from tokenauth.client import TokenAuth

EXPIRY = int(START) + 3600


class Seen(NamedTuple):
    """A request as the server received it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        """The token of either header."""
        return self.headers.get("x-token") or self.headers.get("authorization", "").removeprefix("Bearer ") or None


OPTIONS: dict[str, Any] = {"trust_env": False, "verify": NO_TLS}
"""Arguments of clients: no proxies, no TLS."""

Answer = tuple[int, dict[str, str], bytes]


class Site:
    """A server with an origin of its own."""

    def __init__(self, port: int, answer: Callable[[Seen], Answer]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.answer = answer
        self.seen: list[Seen] = []

    def paths(self) -> list[str]:
        """Return the paths of its requests."""
        return [f"{request.method} {request.path}" for request in self.seen]


class Issuer:
    """The responses of an issuer with numbered tokens, and of a service that accepts the tokens in `valid`."""

    def __init__(self) -> None:
        self.logins = 0
        self.valid: set[str] = set()
        self.expiry = EXPIRY
        self.refuse: Answer | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, request: Seen) -> Answer:
        if request.path.endswith("/api/token"):
            return self._log_in(request)
        if request.token in self.valid:
            return 200, {}, request.body
        return 401, {}, b"who?"

    def _log_in(self, request: Seen) -> Answer:
        assert json.loads(request.body) == {"username": "ann", "password": "ann-secret"}
        with self._lock:
            self.logins += 1
            value, gate = f"{self.logins:064}", self.gate
        self.asked.set()
        assert gate.wait(60)
        if self.refuse:
            return self.refuse
        self.valid.add(value)
        return 200, {}, json.dumps({"token": value, "expiry_time": self.expiry}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def site(answer: Callable[[Seen], Answer]) -> Iterator[Site]:

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet for each response: otherwise each waits for an acknowledgement

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            headers = {name.lower(): ", ".join(self.headers.get_all(name, [])) for name in self.headers}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            while "transfer-encoding" in headers and (size := int(self.rfile.readline(), 16)):
                body += self.rfile.read(size + 2)[:size]
            self.close_connection = "transfer-encoding" in headers
            request = Seen(self.command, self.path, headers, body)
            running.seen.append(request)
            status, more, content = running.answer(request)
            self.send_response(status)
            for name, value in {**more, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    with _Server(("127.0.0.1", 0), Handler) as server:
        running = Site(server.server_address[1], answer)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()
            thread.join()


class Kind:
    """A way to send requests: httpx.Client in threads, or httpx.AsyncClient in tasks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def send(self, auth: TokenAuth, method: str, url: str, **options: Any) -> httpx.Response:
        """Send one request with a new client."""
        client = {name: options.pop(name) for name in ("follow_redirects", "timeout") if name in options}
        if self.name == "threads":
            with httpx.Client(auth=auth, **OPTIONS, **client) as sync:
                return sync.request(method, url, **options)

        async def run() -> httpx.Response:
            async with httpx.AsyncClient(auth=auth, **OPTIONS, **client) as connected:
                return await connected.request(method, url, **options)

        return asyncio.run(run())

    def storm(
        self, auth: TokenAuth, url: str, count: int, ready: Callable[[], None]
    ) -> list[httpx.Response | Exception]:
        """Send `count` requests at once. When all but one wait for the login, call `ready`."""
        if self.name == "threads":
            with httpx.Client(auth=auth, **OPTIONS) as sync, ThreadPoolExecutor(count) as pool:
                running = [pool.submit(sync.get, url) for _ in range(count)]
                deadline = time.monotonic() + 20
                while self.waiting(auth) < count - 1 and time.monotonic() < deadline:
                    time.sleep(0.001)
                ready()
                return [future.exception() or future.result() for future in running]  # type: ignore[misc]

        async def run() -> list[Any]:
            async with httpx.AsyncClient(auth=auth, **OPTIONS) as connected:
                running = [asyncio.create_task(connected.get(url)) for _ in range(count)]
                await queued(auth, count - 1)
                ready()
                return await asyncio.gather(*running, return_exceptions=True)

        return asyncio.run(run())

    def generator(self, body: bytes) -> Any:
        """Return a body that can be read once."""
        if self.name == "threads":
            return (part for part in [body])

        async def parts() -> AsyncIterator[bytes]:
            yield body

        return parts()

    def waiting(self, auth: TokenAuth) -> int:
        """Return the number of requests that wait for the pending login."""
        login = auth._pending.get((os.getpid(), self.name))
        return 0 if login is None else len(login._waiters) + len(login._done_callbacks)  # type: ignore[attr-defined]


async def queued(auth: TokenAuth, count: int) -> None:
    """Wait until `count` tasks wait for a login."""
    async with asyncio.timeout(20):
        while Kind("tasks").waiting(auth) < count:  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.001)
