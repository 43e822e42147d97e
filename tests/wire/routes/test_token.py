"""The contract of wire/token-api.md over sockets, on two workers that share a database."""

import gzip
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import HandClock, Server, log_in, probe, worker, write_config

DAY = 24 * 3600
INVALID = {"valid": False, "expiry_time": None}
UNKNOWN = "u" * 64
CREDENTIALS = {"username": "admin", "password": "admin"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PADDING = "x" * 20_000


def delete(client: httpx.Client, **options: Any) -> httpx.Response:
    """Log out. The `delete` method of httpx takes no body."""
    return client.request("DELETE", "/api/token", **options)


def test_a_login_returns_a_token_and_its_expiry_time(client: httpx.Client, clock: HandClock) -> None:
    answer = client.post("/api/token", json=CREDENTIALS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert set(document) == {"token", "expiry_time"}
    assert re.fullmatch("[A-Za-z0-9]{64}", document["token"])
    assert type(document["expiry_time"]) is int
    assert document["expiry_time"] == int(clock()) + DAY


def test_each_login_makes_a_new_token_of_the_server(client: httpx.Client) -> None:
    tokens = {client.post("/api/token", json={**CREDENTIALS, "token": UNKNOWN}).json()["token"] for _ in range(20)}
    assert len(tokens | {UNKNOWN}) == 21
    assert not probe(client, UNKNOWN)


@pytest.mark.parametrize(
    ("username", "password"),
    [("admin", "wrong"), ("nobody", "admin"), ("admin", "Admin"), ("admin", ""), ("", "admin"), ("ann", "admin")],
)
def test_a_wrong_name_or_password_is_401_in_plain_text(client: httpx.Client, username: str, password: str) -> None:
    answer = client.post("/api/token", json={"username": username, "password": password})
    assert answer.status_code == 401
    assert answer.content == b"invalid credentials"
    assert answer.headers["content-type"].partition(";")[0] == "text/plain"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("", "empty"),
        ("not JSON", "not JSON"),
        ('{"username": "admin", "password": "admin",}', "not JSON"),
        ("username=admin&password=admin", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "username"),
        ('{"username": "admin"}', "password"),
        ('{"password": "admin"}', "username"),
        ('{"username": 1, "password": "admin"}', "username"),
        ('{"username": "admin", "password": null}', "password"),
        ('{"username": "admin", "password": ["admin"]}', "password"),
        ('{"username": {"is": "admin"}, "password": "admin"}', "username"),
    ],
)
def test_an_unreadable_login_is_400_with_a_reason(client: httpx.Client, body: str, named: str) -> None:
    answer = client.post("/api/token", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"] == "invalid_request"
    assert named in answer.json()["error_description"]


CARRIERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "query": lambda token: {"params": {"token": token}},
    "x-token": lambda token: {"headers": {"X-Token": token}},
    "bearer": lambda token: {"headers": {"Authorization": f"Bearer {token}"}},
    "bearer in small letters": lambda token: {"headers": {"Authorization": f"bearer {token}"}},
    "both headers": lambda token: {"headers": {"X-Token": token, "Authorization": f"Bearer {token}"}},
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_probe_reports_a_valid_token_as_valid(
    client: httpx.Client, sibling_client: httpx.Client, carrier: str
) -> None:
    issued = client.post("/api/token", json=CREDENTIALS).json()
    for each in (client, sibling_client):
        answer = each.get("/api/token", **CARRIERS[carrier](issued["token"]))
        assert answer.status_code == 200
        assert answer.json() == {"valid": True, "expiry_time": issued["expiry_time"]}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("value", [UNKNOWN, "u", "u" * 63, "u" * 65, "-" * 64, "é" * 32, "' OR 1=1 --"])
def test_an_unknown_or_malformed_token_is_not_valid(client: httpx.Client, carrier: str, value: str) -> None:
    options = CARRIERS[carrier](value)
    if "headers" in options:
        options["headers"] = {name: text.encode() for name, text in options["headers"].items()}
    answer = client.get("/api/token", **options)
    assert (answer.status_code, answer.json()) == (200, INVALID)


def test_a_token_ends_exactly_at_its_expiry_time(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock
) -> None:
    clock.advance(0.75)  # clients see whole seconds, and exactly those are enforced
    issued = client.post("/api/token", json=CREDENTIALS).json()
    for before in (1, 0.001):
        clock.set(issued["expiry_time"] - before)
        assert probe(client, issued["token"])
        assert probe(sibling_client, issued["token"])
    clock.set(issued["expiry_time"])
    for each in (client, sibling_client):
        answer = each.get("/api/token", params={"token": issued["token"]})
        assert (answer.status_code, answer.json()) == (200, INVALID)


def test_the_lifetime_of_a_token_is_configurable(tmp_path: Path, clock: HandClock) -> None:
    with worker(write_config(tmp_path, '[tokens]\nttl = "90s"'), clock) as running, running.client() as client:
        assert client.post("/api/token", json=CREDENTIALS).json()["expiry_time"] == int(clock()) + 90


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Basic YWRtaW46YWRtaW4="}, {"Authorization": "Bearer"}, {"X_Token": UNKNOWN}]
)
def test_a_probe_without_a_token_is_400(client: httpx.Client, headers: dict[str, str]) -> None:
    answer = client.get("/api/token", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"] == "invalid_request"
    assert "token" in answer.json()["error_description"]


def test_two_different_tokens_are_400(client: httpx.Client) -> None:
    one, other = log_in(client), log_in(client)
    sent: list[dict[str, Any]] = [
        {"headers": {"X-Token": one, "Authorization": f"Bearer {other}"}},
        {"headers": [("X-Token", one), ("X-Token", other)]},
        {"params": [("token", one), ("token", other)]},
    ]
    for options in sent:
        answer = client.get("/api/token", **options)
        assert answer.status_code == 400
        assert "different" in answer.json()["error_description"]


def test_the_query_token_takes_precedence_over_a_header(client: httpx.Client) -> None:
    token = log_in(client)
    assert client.get("/api/token", params={"token": token}, headers={"X-Token": UNKNOWN}).json()["valid"]
    assert client.get("/api/token", params={"token": UNKNOWN}, headers={"X-Token": token}).json() == INVALID


LOGOUTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "JSON": lambda token: {"json": {"token": token}},
    "JSON with a trailing comma": lambda token: {"content": f'{{"token": "{token}",}}'},
    "truncated JSON": lambda token: {"content": f'{{"token": "{token}"'},
    "JSON in single quotes": lambda token: {"content": f"{{'token': '{token}'}}"},
    "JSON with a BOM": lambda token: {"content": b"\xef\xbb\xbf" + json.dumps({"token": token}).encode()},
    "UTF-16": lambda token: {"content": json.dumps({"token": token}).encode("utf-16")},
    "UTF-16, big-endian": lambda token: {"content": json.dumps({"token": token}).encode("utf-16-be")},
    "UTF-32": lambda token: {"content": json.dumps({"token": token}).encode("utf-32")},
    "JSON declared as a form": lambda token: {"content": json.dumps({"token": token}), "headers": FORM},
    "JSON with escapes": lambda token: {"content": rf'{{"token": "\u{ord(token[0]):04x}{token[1:]}"}}'},
    "a form": lambda token: {"data": {"token": token}},
    "a form of JSON": lambda token: {"data": {f'{{"token": "{token}",}}': ""}},
    "a multipart form": lambda token: {"files": {"token": (None, token)}},
    "gzip": lambda token: {"content": gzip.compress(token.encode()), "headers": {"Content-Encoding": "gzip"}},
    "deflate": lambda token: {"content": zlib.compress(token.encode()), "headers": {"Content-Encoding": "deflate"}},
    "plain JSON declared as gzip": lambda token: {"json": {"token": token}, "headers": {"Content-Encoding": "gzip"}},
    "the bare token": lambda token: {"content": token},
    "the query": lambda token: {"params": {"token": token}},
    "X-Token": lambda token: {"headers": {"X-Token": token}},
    "X-Token and a broken body": lambda token: {"headers": {"X-Token": token}, "content": b'{"tok\xff'},
    "X-Token and an oversized body": lambda token: {"headers": {"X-Token": token}, "content": PADDING},
    "Bearer": lambda token: {"headers": {"Authorization": f"Bearer {token}"}},
    "Bearer and an empty JSON": lambda token: {"headers": {"Authorization": f"Bearer {token}"}, "json": {}},
    "the start of an oversized body": lambda token: {"json": {"token": token, "padding": PADDING}},
    "the end of an oversized body": lambda token: {"json": {"padding": PADDING, "token": token}},
    "across the limit of a body": lambda token: {"content": " " * (16 * 1024 - 32) + token},
}


@pytest.mark.parametrize("form", LOGOUTS)
def test_a_log_out_ends_the_token_everywhere(client: httpx.Client, sibling_client: httpx.Client, form: str) -> None:
    token, other = log_in(client), log_in(client)
    assert probe(client, token)
    assert probe(sibling_client, token)
    answer = delete(client, **LOGOUTS[form](token))
    assert (answer.status_code, answer.json()) == (200, INVALID)
    assert not probe(sibling_client, token)
    assert not probe(client, token)
    assert client.get("/api/me", headers={"X-Token": token}).status_code == 401
    assert probe(client, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"content": b""},
        {"content": b"\xff\xfe{broken"},
        {"content": "x" * 100_000},
        {"content": iter([b"[" * 60_000] * 4)},
        {"json": {"token": UNKNOWN}},
        {"json": {"token": None}},
        {"json": ["token"]},
        {"params": {"token": "malformed"}},
        {"headers": {"X-Token": UNKNOWN}},
        {"headers": {"X-Token": "one", "Authorization": "Bearer other"}},
        {"content": b"{}", "headers": {"Content-Encoding": "gzip", "Content-Type": "image/png"}},
    ],
)
def test_a_log_out_without_a_live_token_is_200(client: httpx.Client, options: dict[str, Any]) -> None:
    token = log_in(client)
    answer = delete(client, **options)
    assert (answer.status_code, answer.json()) == (200, INVALID)
    assert probe(client, token)


def test_a_log_out_may_be_repeated(client: httpx.Client) -> None:
    token = log_in(client)
    for _ in range(2):
        assert delete(client, json={"token": token}).json() == INVALID
        assert not probe(client, token)


@pytest.mark.parametrize(
    ("method", "options", "status"),
    [
        ("POST", {"json": CREDENTIALS}, 200),
        ("POST", {"json": {**CREDENTIALS, "password": "wrong"}}, 401),
        ("POST", {"content": "{"}, 400),
        ("POST", {"content": PADDING}, 413),
        ("POST", {"data": CREDENTIALS}, 415),
        ("GET", {"params": {"token": UNKNOWN}}, 200),
        ("GET", {"headers": {"X-Token": UNKNOWN}}, 200),
        ("GET", {}, 400),
        ("HEAD", {"params": {"token": UNKNOWN}}, 200),
        ("DELETE", {"json": {"token": UNKNOWN}}, 200),
        ("PUT", {}, 405),
    ],
)
def test_every_answer_forbids_caching(client: httpx.Client, method: str, options: dict[str, Any], status: int) -> None:
    answer = client.request(method, "/api/token", **options)
    assert answer.status_code == status
    assert answer.headers["cache-control"] == "no-store"


def test_head_is_get_without_the_body(client: httpx.Client) -> None:
    token = log_in(client)
    for params in ({"token": token}, {"token": UNKNOWN}):
        head, get = client.head("/api/token", params=params), client.get("/api/token", params=params)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))
    assert probe(client, token)


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_other_methods_are_405_with_an_allow_header(client: httpx.Client, method: str) -> None:
    answer = client.request(method, "/api/token")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST", "DELETE"}
    assert answer.json()["error"] == "method_not_allowed"


def test_no_token_is_written_to_the_log(client: httpx.Client, server: Server) -> None:
    token = log_in(client)
    probe(client, token)
    delete(client, params={"token": token})
    server.wait("token_revoked")
    assert token not in server.log.read_text()
