"""A small issuer of tokens whose lifetimes slide, and an API that takes them, for pages of any origin.

Tests set its time and its answers, and see every request that arrives.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import NamedTuple

IDLE = 7200
"""A use extends a token to this many seconds and a quarter more, as `tokens.idle` does."""


Answer = tuple[int, Mapping[str, str], str]
"""A status, headers and a body."""


class Seen(NamedTuple):
    """A request that has arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        """The token that the request carries."""
        return self.headers.get("x-token") or self.headers.get("authorization")


class Issuer(ThreadingHTTPServer):
    """The server. Its addresses are those of tokenauth; any other address is the API."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.now = 0
        self.max_ttl = 24 * 3600
        self.seen: list[Seen] = []
        self.answers: dict[tuple[str, str], Answer] = {}
        self.gates: dict[tuple[str, str], threading.Event] = {}
        self.tokens: dict[str, tuple[int, int]] = {}
        self._numbers = count()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, status: int, body: str = "", **headers: str) -> None:
        """Answer these requests in this way from now on."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers[method, path] = (status, named, body)

    def hold(self, method: str, path: str) -> threading.Event:
        """Answer these requests only once the event is set."""
        gate = self.gates[method, path] = threading.Event()
        return gate

    def count(self, method: str, path: str) -> int:
        return sum((each.method, each.path.partition("?")[0]) == (method, path) for each in self.seen)

    def reply(self, request: Seen) -> Answer:
        """Answer as the test has said, or else as tokenauth or an API does."""
        path = request.path.partition("?")[0]
        answer = self.answers.get((request.method, path)) or self._reply_as_tokenauth(request, path)
        if answer is not None:
            return answer
        if not self._is_valid((request.token or "").removeprefix("Bearer ")):
            return _json(401, error="invalid_token", error_description="The token is not valid.")
        return _json(200, method=request.method, path=path)

    def _reply_as_tokenauth(self, request: Seen, path: str) -> Answer | None:
        match request.method, path:
            case "POST", "/api/token":
                token = f"{next(self._numbers):064}"
                self.tokens[token] = (self._slide(), self.now + self.max_ttl)
                return _json(200, token=token, expiry_time=self.tokens[token][0])
            case "POST", "/api/token/renew" if self._is_valid(request.token):
                return _json(200, valid=True, **self.use(request.token or ""))
            case "GET", "/api/token":
                assert request.path.endswith("?touch=0")
                valid = self._is_valid(request.token)
                return _json(200, valid=valid, expiry_time=self.tokens[request.token or ""][0] if valid else None)
            case "DELETE", "/api/token":
                self.tokens.pop(request.token or "", None)
                return _json(200, valid=False, expiry_time=None)
        return None

    def use(self, token: str) -> dict[str, int]:
        """Extend a token, as any use does."""
        _, latest = self.tokens[token]
        self.tokens[token] = (min(self._slide(), latest), latest)
        return {"expiry_time": self.tokens[token][0], "max_expiry_time": latest}

    def _slide(self) -> int:
        return self.now + IDLE * 5 // 4

    def _is_valid(self, token: str | None) -> bool:
        return token in self.tokens and self.now < self.tokens[token or ""][0]


def _json(status: int, **fields: object) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(fields)


class _Handler(BaseHTTPRequestHandler):
    server: Issuer
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Seen(self.command, self.path, headers, body)
        answer: Answer = 204, {"Access-Control-Max-Age": "600"}, ""
        if self.command != "OPTIONS":
            gate = self.server.gates.get((self.command, self.path.partition("?")[0]))
            if gate is None:
                answer = self.server.reply(request)  # first: tests look at its effect as soon as they see the request
                self.server.seen.append(request)
            else:
                self.server.seen.append(request)
                gate.wait(30)
                answer = self.server.reply(request)
        status, more, text = answer
        content = text.encode()
        self.send_response_only(status)
        allowed = {
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Allow-Methods": "*",
            "Access-Control-Allow-Headers": "X-Token, Authorization, Content-Type, X-Trace",
            "Content-Length": str(len(content)),
        }
        for name, value in {**allowed, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = _handle  # noqa: N815 - names of the library


@contextmanager
def running_issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    thread = threading.Thread(target=issuer.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield issuer
    finally:
        for gate in issuer.gates.values():
            gate.set()
        issuer.shutdown()
        thread.join()
        issuer.server_close()
