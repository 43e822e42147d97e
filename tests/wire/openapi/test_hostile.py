"""No input to any route of the document makes a 5xx, and each refusal names the fault.

The requests are generated from the document: invalid values for each field, parameter and path, and bodies that do not
match their headers. The fast tests send a part of them, `make faults` all.
"""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import pytest

from tests.support.connections import Answer, Closed, Connection
from tests.support.servers import USERS, HandClock, Server, log_in, worker, write_config
from tests.wire.openapi.checked_client import FORM, JSON
from tests.wire.openapi.configurations import ALL_DIALECTS, API_PASSWORD, with_dialects
from tests.wire.openapi.conformance import Documented, Operation

KIB = 1024
SHARE = 41
"""The fast tests send every 41st request."""

VALUES = [
    b"null", b"true", b"0", b"-1", b"1.5", b"1e400", b"-1e-400", b"9" * 5000, b"-" + b"9" * 19, b"NaN", b"Infinity",
    b'""', b'" "', b'"\\u0000"', b'"\\ud800"', b'"\\udfff\\ud800"', b'"\xed\xa0\x80"', b'"\xff"', b'"\xc0\xae"',
    b'"\\u202e"', b'"\\r\\nX: y"', b'"' + b"x" * 257 + b'"', b'"' + b"x" * 15 * KIB + b'"', '"\U0001f511"'.encode() ,
    b'"' + "\N{LATIN SMALL LIGATURE FFI}".encode() * 5000 + b'"', b'"\\x"', b"'x'", b"[]", b"{}", b'["x"]', b"[[[[[[",
    b"[" * 33 + b"]" * 33, b'{"x":' * 40 + b"0" + b"}" * 40, b"[" + b"[]," * 5000 + b"0]", b'"%00%ff"', b"0x10", b"1_0",
]  # fmt: skip
"""Values for each field of a JSON body."""

BODIES = [
    b"", b" ", b"\0", b"{", b"[", b'"', b"null", b"[]", b"1", b'"x"', b"{}{}", b'{"x":}', b"{,}", b"{1:2}", b'{"":""}',
    b"\xef\xbb\xbf{}", "{}".encode("utf-16"), "{}".encode("utf-32"), gzip.compress(b"{}"), b"x" * 17 * KIB, b"&" * 200,
    b"=", b"%", b"%zz=%", b"a=b&a=b", b"\xff=\xff", b"--x\r\n\r\n", b"<x/>", bytes(range(256)), b'{"x": ' + b"[" * 9000,
]  # fmt: skip
"""Bodies for any content type."""

HEADERS: list[dict[str, bytes]] = [
    {"Content-Type": JSON.encode()},
    {"Content-Type": FORM.encode()},
    {},
    {"Content-Type": b"application/json; charset=utf-7"},
    {"Content-Type": b"multipart/form-data; boundary=x"},
    {"Content-Type": b"\xff/\xfe;;=;"},
    {"Content-Type": JSON.encode(), "Content-Encoding": b"gzip"},
    {"Content-Type": FORM.encode(), "Content-Encoding": b"br, zstd"},
    {"Origin": b"https://evil.example"},
    {"Accept": b"image/png", "Accept-Encoding": b"identity;q=0"},
    {"Range": b"bytes=0-0", "If-None-Match": b"*", "If-Modified-Since": b"x"},
    {"X-Forwarded-For": b"\xff, [::1, 999.1.1.1", "Forwarded": b"for=;;"},
    {"User-Agent": bytes(range(0x80, 0x100)) * 4},
    {"Cookie": b"a=b; " * 500},
]

TEXTS = [
    b"",
    b" ",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\r\nX: y",
    b"-1",
    b"1e9",
    b"9" * 5000,
    b"../..",
    b"'--",
    b"%",
]
TEXTS += [b"x" * 2000, "\U0001f511".encode() * 300, b"{pool}", b"[]", b"\\", b"\xc2\x85", "\u202e".encode()]
"""Values for each parameter of a path or a query."""


LOGIN = b'POST /api/token HTTP/1.1\r\nHost: x\r\nContent-Length: 39\r\n\r\n{"username":"admin","password":"admin"}'


ALL_SCOPES = USERS.replace('["admin"]', '["admin", "read", "write", "introspect"]')
"""The admin has all scopes, so no request is refused for a missing scope."""


class Sent(NamedTuple):
    """A generated request."""

    method: str
    target: str
    headers: dict[str, bytes]
    body: bytes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, clock: HandClock) -> Iterator[Server]:
    """Run a worker. No lease lapses during a test: a busy machine may take longer than it lasts."""
    limits = "[throttle]\nfree = 1000000\nnetwork_free = 1000000\n[tokens]\nper_user = 0\n"
    config: Path = write_config(tmp_path_factory.mktemp("hostile"), limits + with_dialects(**ALL_DIALECTS), ALL_SCOPES)
    with worker(config, clock) as running:
        yield running


def requests_of(operation: Operation, document: dict[str, Any]) -> Iterator[Sent]:
    """Generate the requests of an operation."""
    method, path = operation.method, _path(operation.path, "t")
    kind = operation.body or JSON
    for headers in HEADERS:
        yield from (Sent(method, path, headers, body) for body in BODIES)
    for field in _fields(operation, document):
        name = json.dumps(field).encode()
        for value in VALUES:
            body = b"{%s: %s}" % (name, value)
            if kind == FORM:
                body = f"{field}=".encode() + quote_from_bytes(value).encode()
            yield Sent(method, path, {"Content-Type": kind.encode()}, body)
        twice = b"{%s: 1, %s: 1}" % (name, name) if kind == JSON else f"{field}=1&{field}=2".encode()
        yield Sent(method, path, {"Content-Type": kind.encode()}, twice)
    queries = [each["name"] for each in operation.described.get("parameters", ()) if each["in"] == "query"]
    for text in map(quote_from_bytes, TEXTS):
        yield from (Sent(method, f"{path}?{name}={text}", {}, b"") for name in (*queries, "unknown"))
        yield from (Sent(method, f"{path}?{name}={text}&{name}=x", {}, b"") for name in queries)
        yield Sent(method, f"{path}?{text}", {}, b"")
        if "{" in operation.path and text:
            yield Sent(method, _path(operation.path, text), {}, b"")
    for other in ("OPTIONS", "PATCH", "PUT", "TRACE", "PROPFIND"):
        yield Sent(other, path, {}, b"")


def _path(template: str, value: str) -> str:
    return re.sub(r"\{\w+\}", lambda _: value, template.replace("{pool}", "uuids"))


def _fields(operation: Operation, document: dict[str, Any]) -> Sequence[str]:
    content = operation.described.get("requestBody", {}).get("content", {})
    for media in content.values():
        schema = media["schema"]
        name = schema.get("$ref", "").rpartition("/")[2]
        return list((document["components"]["schemas"][name] if name else schema)["properties"])
    return []


class Sender:
    """Sends requests as an admin, and logs in again after a log-out."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection = Connection(port)
        self._token = ""

    def send(self, sent: Sent) -> Answer:
        """Send a request, on a new connection if the server has closed the last one."""
        if self._token == "":
            self._token = self._send(LOGIN).json()["token"]
        lines = [f"{sent.method} {sent.target} HTTP/1.1", "Host: x", f"X-Token: {self._token}"]
        lines += [f"X-API-PASSWORD: {API_PASSWORD}", f"Content-Length: {len(sent.body)}"]
        head = "\r\n".join(lines).encode()
        head += b"".join(f"\r\n{name}: ".encode() + value for name, value in sent.headers.items())
        answer = self._send(head + b"\r\n\r\n" + sent.body)
        if sent.method == "DELETE" and sent.target.startswith("/api/token"):
            self._token = ""
        return answer

    def _send(self, request: bytes) -> Answer:
        try:
            return self._connection.send(request)
        except Closed:
            self._connection.close()
            self._connection = Connection(self._port)
            return self._connection.send(request)

    def close(self) -> None:
        self._connection.close()


def names_the_fault(answer: Answer) -> bool:
    """Return whether a refusal describes the fault in words."""
    if answer.status == 431 or answer.headers["content-type"].startswith("text/plain"):
        return len(answer.body) >= len("invalid credentials")
    document = answer.json()
    texts = document if isinstance(document, list) else [v for v in document.values() if isinstance(v, str)]
    return len(" ".join(texts).split()) >= 2 or texts == ["Unauthorized"]


def all_requests(server: Server) -> list[Sent]:
    """Generate the requests of all operations."""
    with Connection(server.port) as connection:
        document = connection.ask("GET", "/openapi.json").json()
    return [each for operation in Documented(document) for each in requests_of(operation, document)]


def check(server: Server, requests: Sequence[Sent]) -> None:
    """Send requests, and check that no response is a 5xx and that each refusal names the fault."""
    sender = Sender(server.port)
    answers = [(request, sender.send(request)) for request in requests]
    sender.close()
    refused = [(request, answer) for request, answer in answers if answer.status >= 400]
    assert [(request, answer) for request, answer in refused if answer.status >= 500] == []
    assert [(request, answer) for request, answer in refused if not names_the_fault(answer)] == []
    assert len(refused) > len(answers) // 4
    assert server.errors() == []
    assert "Traceback" not in server.log.read_text()


def test_no_input_to_any_route_makes_a_5xx(server: Server) -> None:
    """Every 41st request: each value occurs in some fields, and each field with some values."""
    requests = all_requests(server)
    assert len(requests) > 10_000
    check(server, requests[::SHARE])


@pytest.mark.faults
def test_all_generated_requests_make_no_5xx(server: Server) -> None:
    check(server, all_requests(server))


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE"])
def test_no_safe_method_changes_anything(server: Server, method: str) -> None:
    """RFC 9110 section 9.2.1. Also for dialects whose original acts on a GET."""
    with server.client() as client:
        headers = {"X-Token": log_in(client), "X-API-PASSWORD": API_PASSWORD}
        client.headers.update(headers)
        lease = client.post("/api/pools/random/tokens").json()["tokens"][0]
        assert client.post("/simple/issue_token").status_code in {200, 429}
        operations = list(Documented(client.get("/openapi.json").json()))

        def state() -> list[Any]:
            pools = [pool["name"] for pool in client.get("/api/pools").json()["pools"]]
            return [client.get(f"/api/pools/{pool}?limit=1000").json() for pool in pools] + [
                client.get("/api/tokens").json()
            ]

        before = state()
        for path in {operation.path for operation in operations}:
            answer = client.request(method, _path(path.replace("{pool}", "random"), lease))
            assert answer.status_code < 500
        assert state() == before
