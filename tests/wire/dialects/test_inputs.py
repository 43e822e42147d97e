"""No body makes a 5xx: each malformed one is refused in JSON that names the fault, and changes no pool."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import Server
from tests.wire.dialects.conftest import Reply, Wire, rows

KIB = 1024
JSON = {"Content-Type": "application/json"}
POOLS = ("permits", "uuids", "bounded", "owned")

ROUTES = [
    ("DELETE", "/token-pool/api/token_pool/"),
    ("DELETE", "/token-pool/api/token_pool"),
    ("POST", "/random-token-generator/generate"),
    ("POST", "/random-token-generator/unblock"),
    ("DELETE", "/random-token-generator/delete"),
    ("POST", "/random-token-generator/keep-alive"),
    ("POST", "/token-management-service/assign-token"),
    ("POST", "/token-management-service/keep-alive"),
    ("POST", "/token-management-service/unblock-token"),
    ("POST", "/token-management-service/delete-token"),
    ("DELETE", "/token-management-service/delete-token"),
]
"""Every route that reads a body."""

GENERATE, ASSIGN = ROUTES[2], ROUTES[6]
WITH_TOKEN = [route for route in ROUTES[2:] if route not in {GENERATE, ASSIGN}]
WITH_CLIENT = [ASSIGN, ROUTES[7]]
WITHOUT_BODY = ("/random-token-generator/generate", "/random-token-generator/keep-alive")


def in_every_field(value: bytes) -> bytes:
    """Return a body that has this JSON value in every known field."""
    return b'{"token": %s, "token_uuid": %s, "client_id": %s, "count": %s}' % (value, value, value, value)


BROKEN: dict[str, tuple[bytes, int, str]] = {
    "half an object": (b"{", 400, "not JSON"),
    "a trailing comma": (b'{"token": "x",}', 400, "not JSON"),
    "two objects": (b"{}{}", 400, "not JSON"),
    "words": (b"token", 400, "not JSON"),
    "an array": (b"[]", 400, "must be a JSON object"),
    "null": (b"null", 400, "must be a JSON object"),
    "a number": (b"1", 400, "must be a JSON object"),
    "a string": (b'"token"', 400, "must be a JSON object"),
    "NaN": (in_every_field(b"NaN"), 400, "not JSON"),
    "a lone surrogate, escaped": (in_every_field(rb'"\ud800"'), 400, ""),
    "a lone surrogate in bytes": (in_every_field(b'"\xed\xa0\x80"'), 400, "UTF-8"),
    "a bare NUL": (in_every_field(b'"\0"'), 400, ""),
    "bytes that are not UTF-8": (b'{"x": "\xff"}', 400, "UTF-8"),
    "a BOM": (b"\xef\xbb\xbf{}", 400, "UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), 400, "UTF-8"),
    "many levels": (b'{"x": ' + b"[" * 8000 + b"]" * 8000 + b"}", 400, "deep"),
    "many open levels": (b'{"x":' * 3000, 400, "deep"),
    "more than 16 KiB": (b'{"x": "' + b"x" * 16 * KIB + b'"}', 413, "16 KiB"),
    "more than 16 KiB of blanks": (b" " * 16 * KIB + b"{}", 413, "16 KiB"),
    "much more than 16 KiB": (b"x" * 300 * KIB, 413, "16 KiB"),
}

TWICE = '{"token": "x", "token": "x", "token_uuid": "x", "token_uuid": "x", "client_id": "x", "client_id": "x"'
TWICE += ', "count": 1, "count": 1}'

WRONG = ["5", "0", "-1.5", "1e400", "true", "false", "[]", '["x"]', "{}", '{"token": "x"}']


@pytest.fixture(scope="module")
def wire(clients: Sequence[httpx.Client]) -> Wire:
    """Send requests to both workers."""
    return Wire(clients)


@pytest.fixture(autouse=True)
def _pools_are_unchanged(wire: Wire, config_file: Path, server: Server, sibling: Server) -> Iterator[None]:
    """Put a free and a leased token into each pool, and check that they are unchanged and that no error was logged."""
    for _ in range(2):
        wire.post("/token-pool/api/token_pool/")
        wire.post("/token-management-service/generate-token")
    wire.post("/random-token-generator/generate", {"count": 2})
    for path in ("/token-pool/api/block_token/", "/random-token-generator/assign"):
        assert wire.post(path).status == 200
    assert wire.post("/token-management-service/assign-token", {"client_id": "ann"}).status == 200
    before = [rows(config_file, pool) for pool in POOLS]
    logged = [each.errors() for each in (server, sibling)]  # tests of other modules may have locked the database
    yield
    assert [rows(config_file, pool) for pool in POOLS] == before
    assert [each.errors() for each in (server, sibling)] == logged
    for each in (server, sibling):
        assert "Traceback" not in each.log.read_text()


def is_explained(answer: Reply, status: int, *named: str) -> bool:
    """Return whether a refusal has the native form and names the fault."""
    body: dict[str, Any] = answer.document
    assert answer.status == status, answer.body
    assert list(body) == ["error", "error_description"]
    return any(word in body["error_description"] for word in named)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_body_is_refused_with_a_reason(wire: Wire, fault: str) -> None:
    content, status, named = BROKEN[fault]
    for method, path in ROUTES:
        assert is_explained(wire.ask(method, path, content=content, headers=JSON), status, named), path


def test_a_field_given_twice_is_refused(wire: Wire) -> None:
    for method, path in ROUTES:
        assert is_explained(wire.ask(method, path, content=TWICE, headers=JSON), 400, "twice"), path


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/plain"}, {"Content-Type": ""},
     {"Content-Type": "application/json; charset=latin-1"}, {**JSON, "Content-Encoding": "gzip"}],
)  # fmt: skip
def test_another_content_type_is_415(wire: Wire, headers: dict[str, str]) -> None:
    named = next(reversed(headers))
    for method, path in ROUTES:
        assert is_explained(wire.ask(method, path, content=b'{"count": 1}', headers=headers), 415, named), path


@pytest.mark.parametrize("value", WRONG)
def test_a_token_or_client_must_be_text(wire: Wire, value: str) -> None:
    for method, path in WITH_TOKEN:
        content = f'{{"client_id": "ann", "token": {value}}}'
        assert is_explained(wire.ask(method, path, content=content, headers=JSON), 400, "token: "), path
    for method, path in WITH_CLIENT:
        content = f'{{"token": "x", "client_id": {value}}}'
        assert is_explained(wire.ask(method, path, content=content, headers=JSON), 400, "client_id: "), path


@pytest.mark.parametrize(
    "value", ["0", "-1", "1.5", "2.0", "1e400", "true", "false", '"2"', '""', "null", "[]", "{}", str(-(2**70))]
)
def test_an_invalid_count_is_refused_with_its_name(wire: Wire, value: str) -> None:
    assert is_explained(wire.ask(*GENERATE, content=f'{{"count": {value}}}', headers=JSON), 400, "count")


@pytest.mark.parametrize("value", [101, 1001, 2**31, 2**63, 2**64, 10**300])
def test_a_count_above_the_capacity_is_pool_full(wire: Wire, value: int) -> None:
    answer = wire.ask(*GENERATE, {"count": value})
    assert (answer.status, answer.document) == (400, {"error": "Pool max size exceeded"})


@pytest.mark.parametrize(
    "headers",
    [{}, JSON, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data; boundary=x"},
     {"Content-Type": ""}, {"Content-Encoding": "gzip"}],
)  # fmt: skip
def test_an_empty_body_counts_as_no_body(wire: Wire, headers: dict[str, str]) -> None:
    """The missing field is named; the wire contracts have the exact words."""
    for method, path in ROUTES:
        if path not in WITHOUT_BODY:
            answer = wire.ask(method, path, content=b"", headers=headers)
            assert answer == wire.ask(method, path)
            assert answer.status == 400
            assert "oken" in answer.body or "client_id" in answer.body


@pytest.mark.parametrize(
    "path", ["/token-pool", "/token-pool/", "/generate", "/random-token-generator/generate/", "/api/token_pool/",
             "/random-token-generator//assign", "/RANDOM-TOKEN-GENERATOR/assign", "/simple-token-implement/tokens/"],
)  # fmt: skip
def test_a_path_without_a_route_is_404(wire: Wire, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert is_explained(wire.ask(method, path), 404, "nothing at this address")


def test_a_body_of_almost_16_kib_is_read(wire: Wire) -> None:
    padding = "x" * (16 * KIB - len(json.dumps({"token": "x", "padding": ""})))
    answer = wire.ask(
        "DELETE", "/random-token-generator/delete", content=json.dumps({"token": "x", "padding": padding})
    )
    assert (answer.status, answer.document) == (404, {"error": "Token not found"})


@pytest.mark.parametrize("client", ["\0", "x" * 257])
def test_an_invalid_client_name_is_refused_by_field(wire: Wire, client: str) -> None:
    answer = wire.post("/token-management-service/assign-token", {"client_id": client})
    assert is_explained(answer, 400, "client_id")
    assert "holder" not in answer.document["error_description"]
