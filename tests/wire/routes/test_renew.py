"""POST /api/token/renew, ?touch=0, and last_used_at, over sockets."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import USERS, HandClock, log_in, write_config

IDLE, TTL = 400, 3600
RENEW = "/api/token/renew"


@pytest.fixture(scope="module")
def settings() -> str:
    return f"[tokens]\nidle = {IDLE}\nttl = {TTL}\nper_user = 0"


@pytest.fixture(scope="module")
def config_file(directory: Path, settings: str) -> Path:
    """Let admin introspect tokens."""
    users = USERS.replace('scopes = ["admin"]', 'scopes = ["admin", "introspect"]')
    return write_config(directory, settings, users)


def renew(client: httpx.Client, token: str, **options: Any) -> httpx.Response:
    return client.post(RENEW, headers={"X-Token": token}, **options)


def end(client: httpx.Client, token: str) -> int:
    found: int = client.get("/api/token", params={"token": token, "touch": "0"}).json()["expiry_time"]
    return found


def test_a_renewal_extends_the_same_token(client: httpx.Client, clock: HandClock) -> None:
    token, began = log_in(client), int(clock())
    clock.advance(IDLE / 2)
    answer = renew(client, token)
    expected = {"valid": True, "expiry_time": int(clock()) + IDLE * 5 // 4, "max_expiry_time": began + TTL}
    assert (answer.status_code, answer.json()) == (200, expected)
    assert answer.headers["cache-control"] == "no-store"
    assert end(client, token) == expected["expiry_time"]
    with_bearer = client.post(RENEW, headers={"Authorization": f"Bearer {token}"}, json={})
    assert with_bearer.json() == expected


def test_a_renewal_needs_a_valid_token_in_a_header(client: httpx.Client, clock: HandClock) -> None:
    token, revoked = log_in(client), log_in(client)
    client.delete("/api/token", headers={"X-Token": revoked})
    expired = log_in(client)
    clock.advance(IDLE * 5 / 4)
    for sent, code in ((revoked, "invalid_token"), (expired, "invalid_token"), ("u" * 64, "invalid_token")):
        answer = renew(client, sent)
        assert (answer.status_code, answer.json()["error"]) == (401, code)
    fresh = log_in(client)
    assert client.post(RENEW, params={"token": fresh}).json()["error"] == "token_required"
    assert renew(client, fresh, params={"token": fresh}).status_code == 400
    assert renew(client, fresh, json={"token": fresh}).status_code == 400
    assert client.get(RENEW, headers={"X-Token": fresh}).status_code == 405
    assert renew(client, token).status_code == 401


def named(client: httpx.Client) -> str:
    answer = client.post("/api/tokens", json={"name": "nightly"}, headers={"X-Token": log_in(client)})
    return str(answer.json()["token"])


def granted(client: httpx.Client, **more: str) -> str:
    form = {"grant_type": "client_credentials", "client_id": "ann", "client_secret": "ann-secret", **more}
    return str(client.post("/oauth/token", data=form).json()["access_token"])


def rotated(client: httpx.Client) -> str:
    login = {"X-Token": log_in(client)}
    made = client.post("/api/tokens", json={"name": "hourly"}, headers=login).json()
    client.post(f"/api/tokens/{made['id']}/rotate", json={"overlap": "1d"}, headers=login)
    return str(made["token"])


@pytest.mark.parametrize("make", [named, rotated, granted, lambda client: granted(client, scope="read")])
def test_fixed_lifetimes_cannot_be_renewed(client: httpx.Client, make: Callable[[httpx.Client], str]) -> None:
    """But the tokens are valid, and for longer than logins."""
    token = make(client)
    before = end(client, token)
    answer = renew(client, token)
    assert (answer.status_code, answer.json()["error"]) == (409, "not_renewable")
    assert end(client, token) == before


def test_only_touch_0_is_known(client: httpx.Client) -> None:
    token = log_in(client)
    for wrong in ("1", "", "false"):
        params = {"token": token, "touch": wrong}
        assert client.get("/api/token", params=params).status_code == 400
        assert client.get("/auth", params={"touch": wrong}, headers={"X-Token": token}).status_code == 403
    after_path = client.get("/auth?scope=admin&path=/x&touch=1", headers={"X-Token": token})
    assert after_path.status_code == 200, "what comes after path is the client's"


ASK: dict[str, Callable[[httpx.Client, str, str], httpx.Response]] = {
    "probe": lambda client, token, touch: client.get(f"/api/token?token={token}&{touch}"),
    "probe with a header": lambda client, token, touch: client.get(f"/api/token?{touch}", headers={"X-Token": token}),
    "auth": lambda client, token, touch: client.get(f"/auth?{touch}", headers={"X-Token": token}),
    "introspection": lambda client, token, touch: client.post(
        f"/oauth/introspect?{touch}",
        data={"token": token, "client_id": "admin", "client_secret": "admin"},
    ),
}


@pytest.mark.parametrize("how", ASK)
def test_a_look_with_touch_0_extends_nothing(client: httpx.Client, clock: HandClock, directory: Path, how: str) -> None:
    """Shortly before the end, where uses are written at once."""
    looked, used = log_in(client), log_in(client)
    clock.set(end(client, looked) - 1)
    before = rows(directory)
    assert ASK[how](client, looked, "touch=0").status_code == 200
    assert rows(directory) == before
    assert ASK[how](client, used, "").status_code == 200
    until(lambda: rows(directory) != before, "the use is written")
    clock.advance(1)
    assert client.get("/api/me", headers={"X-Token": looked}).status_code == 401
    assert client.get("/api/me", headers={"X-Token": used}).status_code == 200


def rows(directory: Path) -> list[tuple[int, float | None]]:
    with closing(sqlite3.connect(directory / "tokenauth.db")) as db:
        return db.execute("SELECT expires_at, used_at FROM tokens ORDER BY number").fetchall()


def test_the_last_use_is_listed(client: httpx.Client, clock: HandClock) -> None:
    token = log_in(client)
    headers = {"X-Token": token}

    def listed() -> dict[str, Any]:
        [found] = [one for one in client.get("/api/tokens", headers=headers).json()["tokens"] if one["current"]]
        return dict(found)

    assert listed()["last_used_at"] is None
    clock.set(end(client, token) - 1)
    at = int(clock())
    assert client.get("/api/me", headers=headers).status_code == 200
    until(lambda: listed()["last_used_at"] == at, "the use is written")
    assert listed()["expiry_time"] == at + IDLE * 5 // 4


@pytest.mark.parametrize("header", ["X-Token", "Authorization"])
def test_what_the_console_reads_is_no_use(client: httpx.Client, clock: HandClock, header: str) -> None:
    token, other = log_in(client), log_in(client)
    sent = {header: f"Bearer {token}" if header == "Authorization" else token}
    first = end(client, token)
    clock.set(first - 1)  # so late, a use is written at once, together with those that were noted before
    for method in ("GET", "HEAD"):
        assert client.request(method, "/api/me", headers={**sent, "X-Tokenauth-Console": "1"}).status_code == 200
    assert client.get("/api/me", headers={"X-Token": other}).status_code == 200
    until(lambda: end(client, other) > first, "the use of another login is written")
    assert end(client, token) == first
    assert client.get("/api/me", headers=sent).status_code == 200
    until(lambda: end(client, token) > first, "the use is written")


def test_a_change_from_the_console_is_a_use(client: httpx.Client, clock: HandClock) -> None:
    token = log_in(client)
    first = end(client, token)
    clock.advance(IDLE / 2)
    assert renew(client, token, params={}).status_code == 200
    second = end(client, token)
    assert second > first
    clock.set(second - 1)
    console = {"X-Token": token, "X-Tokenauth-Console": "1"}
    assert client.delete("/api/tokens/none", headers=console).status_code == 404
    until(lambda: end(client, token) > second, "the use is written")
