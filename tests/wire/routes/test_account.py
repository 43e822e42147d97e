"""Users list and end their own logins, admins those of others. Errors do not reveal why a token is invalid."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import HandClock, Server, exchange, log_in, probe, worker, write_config
from tests.wire.oauth.forms import table

DAY = 24 * 3600
PER_USER = 4
UNKNOWN = "u" * 64
UNKNOWN_ID = "0" * 24

GUARDED = [
    ("GET", "/api/me"),
    ("HEAD", "/api/me"),
    ("GET", "/api/tokens"),
    ("DELETE", "/api/tokens"),
    ("DELETE", f"/api/tokens/{UNKNOWN_ID}"),
    ("POST", "/api/tokens"),
    ("POST", f"/api/tokens/{UNKNOWN_ID}/rotate"),
    ("POST", "/api/me"),  # 405 only with a valid token
]


@pytest.fixture(scope="module")
def settings() -> str:
    return f"[tokens]\nper_user = {PER_USER}"


def token_header(token: str) -> dict[str, str]:
    return {"X-Token": token}


def ann(client: httpx.Client, **options: Any) -> str:
    """Log in as a user without the scope `admin`."""
    return log_in(client, "ann", "ann-secret", **options)


def listed(client: httpx.Client, token: str, **params: str) -> list[dict[str, Any]]:
    """Return the logins listed for the user of this token."""
    answer = client.get("/api/tokens", headers=token_header(token), params=params)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"tokens"}
    return list(answer.json()["tokens"])


def id_of(client: httpx.Client, token: str) -> str:
    return next(str(entry["id"]) for entry in listed(client, token) if entry["current"])


@pytest.mark.parametrize(
    ("username", "password", "scopes"),
    [("admin", "admin", ["admin"]), ("ann", "ann-secret", ["read", "write"]), ("bob", "bob-secret", [])],
)
def test_me_names_the_user_of_the_token(
    client: httpx.Client, clock: HandClock, username: str, password: str, scopes: list[str]
) -> None:
    token = log_in(client, username, password)
    for headers in (token_header(token), {"Authorization": f"Bearer {token}"}):
        answer = client.get("/api/me", headers=headers)
        assert answer.status_code == 200
        me = answer.json()
        assert me.pop("id") == sha256(token.encode()).hexdigest()[:24]
        assert me == {
            "username": username,
            "scopes": scopes,
            "kind": "login",
            "name": None,
            "issued_at": int(clock()),
            "expiry_time": int(clock()) + DAY,
        }
        assert answer.headers["cache-control"] == "no-store"


def test_my_logins_are_listed_newest_first(client: httpx.Client, clock: HandClock) -> None:
    first = ann(client, headers={"User-Agent": "first/1"})
    clock.advance(60)
    second = ann(client, headers={"User-Agent": "second/2"})
    log_in(client, "bob", "bob-secret")
    newer, older = listed(client, second)
    now = int(clock())
    for entry, agent, issued_at, current in [(newer, "second/2", now, True), (older, "first/1", now - 60, False)]:
        assert entry == {
            "id": entry["id"],
            "user": "ann",
            "kind": "login",
            "name": None,
            "scopes": None,
            "issued_at": issued_at,
            "expiry_time": issued_at + DAY,
            "last_used_at": None,
            "address": "127.0.0.1",
            "user_agent": agent,
            "current": current,
        }
    assert newer["id"] != older["id"]
    assert [entry["current"] for entry in listed(client, first)] == [False, True]


def everyones(client: httpx.Client, token: str, **query: str | int) -> tuple[list[tuple[str, str]], str | None]:
    """Return the user and the client of each token on a page of those of all users, and where the next page begins."""
    answer = client.get("/api/tokens", params={"user": "*", **query}, headers=token_header(token))
    assert answer.status_code == 200, answer.text
    document = answer.json()
    return [(one["user"], one["user_agent"]) for one in document["tokens"]], document["next"]


def test_an_admin_searches_the_tokens_of_all_users(client: httpx.Client, clock: HandClock) -> None:
    admin = log_in(client)
    for number in range(3):
        clock.advance(1)
        ann(client, headers={"User-Agent": f"Job-{number}"})
    gone = log_in(client, "bob", "bob-secret", headers={"User-Agent": "job-3"})
    client.delete("/api/token", params={"token": gone})
    mine = log_in(client, "bob", "bob-secret", headers={"User-Agent": "phone"})
    jobs = [("ann", f"Job-{number}") for number in (2, 1, 0)]
    assert everyones(client, admin, search="JOB") == (jobs, None)
    assert everyones(client, admin, search="Bob") == ([("bob", "phone")], None)
    assert everyones(client, admin, search=id_of(client, mine)[:6])[0] == [("bob", "phone")]
    assert len(everyones(client, admin, search="127.0.0.1")[0]) == 5
    assert everyones(client, admin, search="nothing", kind="named") == ([], None)
    page, after = everyones(client, admin, search="job", limit=2)
    assert page == jobs[:2]
    assert after is not None
    assert everyones(client, admin, search="job", limit=2, after=after) == (jobs[2:], None)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("?user=*&limit=0", "invalid_request"),
        ("?user=*&limit=1001", "invalid_request"),
        ("?user=*&after=x", "invalid_request"),
        ("?user=*&after=9999999999999999999-000000000000000000000000", "invalid_request"),
        ("?user=*&kind=other", "invalid_request"),
        ("?search=x", "invalid_request"),
        ("?user=ann&limit=5", "invalid_request"),
    ],
)
def test_a_search_with_wrong_parameters_is_refused(client: httpx.Client, query: str, code: str) -> None:
    answer = client.get(f"/api/tokens{query}", headers=token_header(log_in(client)))
    assert (answer.status_code, answer.json()["error"]) == (400, code)


def test_only_an_admin_sees_the_tokens_of_all_users(client: httpx.Client) -> None:
    mine = ann(client)
    assert client.get("/api/tokens?user=*", headers=token_header(mine)).status_code == 403
    assert client.delete(f"/api/tokens/{id_of(client, mine)}?user=*", headers=token_header(mine)).status_code == 403
    admin = token_header(log_in(client))
    assert client.delete("/api/tokens?user=*", headers=admin).status_code == 400
    assert client.delete(f"/api/tokens/{id_of(client, mine)}?user=*", headers=admin).status_code == 204
    assert not probe(client, mine)


def test_logins_that_have_ended_are_not_listed(client: httpx.Client, clock: HandClock) -> None:
    ann(client)
    clock.advance(DAY)
    ended, mine = ann(client), ann(client)
    client.request("DELETE", "/api/token", json={"token": ended})
    assert [entry["current"] for entry in listed(client, mine)] == [True]


@pytest.mark.parametrize(("sent", "kept"), [("x" * 300, "x" * 256), ("", ""), ("Ünïcode <b>", "Ünïcode <b>")])
def test_a_user_agent_is_kept_up_to_256_characters(client: httpx.Client, sent: str, kept: str) -> None:
    token = ann(client, headers={"User-Agent": sent.encode("latin-1")})
    assert listed(client, token)[0]["user_agent"] == kept


def test_the_id_of_a_token_is_not_its_secret(client: httpx.Client) -> None:
    token = ann(client)
    public = id_of(client, token)
    assert re.fullmatch("[0-9a-f]{24}", public)
    assert public not in token
    assert token not in client.get("/api/tokens", headers=token_header(token)).text
    assert not probe(client, public)
    assert client.get("/api/me", headers=token_header(public)).status_code == 401


@pytest.mark.parametrize(("query", "kept"), [("", False), ("?keep=current", True)])
def test_i_can_end_all_my_logins(client: httpx.Client, sibling_client: httpx.Client, query: str, kept: bool) -> None:
    mine, others, bobs = ann(client), [ann(client), ann(client)], log_in(client, "bob", "bob-secret")
    assert all(probe(sibling_client, token) for token in [mine, *others, bobs])
    answer = client.delete(f"/api/tokens{query}", headers=token_header(mine))
    assert (answer.status_code, answer.json()) == (200, {"revoked": 2 if kept else 3})
    for each in (sibling_client, client):
        assert probe(each, mine) is kept
        assert not any(probe(each, token) for token in others)
        assert probe(each, bobs)


@pytest.mark.parametrize("query", ["keep=all", "keep=", "keep=current&keep=none", "keep=CURRENT"])
def test_an_invalid_value_of_keep_ends_no_login(client: httpx.Client, query: str) -> None:
    mine, other = ann(client), ann(client)
    answer = client.delete(f"/api/tokens?{query}", headers=token_header(mine))
    assert answer.status_code == 400
    assert "keep" in answer.json()["error_description"]
    assert probe(client, mine)
    assert probe(client, other)


def test_i_can_end_one_login_by_its_id(client: httpx.Client, sibling_client: httpx.Client) -> None:
    mine, other = ann(client), ann(client)
    assert probe(sibling_client, other)
    public = id_of(client, other)
    answer = client.delete(f"/api/tokens/{public}", headers=token_header(mine))
    assert (answer.status_code, answer.content) == (204, b"")
    assert not probe(sibling_client, other)
    assert not probe(client, other)
    assert probe(client, mine)
    assert client.delete(f"/api/tokens/{public}", headers=token_header(mine)).status_code == 404


def test_i_can_end_the_login_that_i_use(client: httpx.Client) -> None:
    mine = ann(client)
    assert client.delete(f"/api/tokens/{id_of(client, mine)}", headers=token_header(mine)).status_code == 204
    assert not probe(client, mine)


def test_another_users_id_is_answered_like_an_unknown_one(client: httpx.Client) -> None:
    mine, bobs = ann(client), log_in(client, "bob", "bob-secret")
    public = id_of(client, bobs)
    theirs = client.delete(f"/api/tokens/{public}", headers=token_header(mine))
    unknown = client.delete(f"/api/tokens/{UNKNOWN_ID}", headers=token_header(mine))
    assert theirs.status_code == unknown.status_code == 404
    assert theirs.json()["error"] == "not_found"
    assert theirs.text.replace(public, UNKNOWN_ID) == unknown.text
    assert probe(client, bobs)


def test_an_admin_acts_for_the_user_it_names(client: httpx.Client, sibling_client: httpx.Client) -> None:
    admins, anns = log_in(client), [ann(client), ann(client), ann(client)]
    bobs = log_in(client, "bob", "bob-secret")
    assert [entry["current"] for entry in listed(client, admins, user="ANN")] == [False] * 3
    assert listed(client, admins, user="nobody") == []
    public = id_of(client, anns[0])
    assert client.delete(f"/api/tokens/{public}", headers=token_header(admins)).status_code == 404
    assert client.delete(f"/api/tokens/{public}?user=bob", headers=token_header(admins)).status_code == 404
    assert client.delete(f"/api/tokens/{public}?user=ann", headers=token_header(admins)).status_code == 204
    assert [probe(sibling_client, token) for token in anns] == [False, True, True]
    answer = client.delete("/api/tokens?user=ann&keep=current", headers=token_header(admins))
    assert answer.json() == {"revoked": 2}
    assert not any(probe(sibling_client, token) for token in anns)
    assert probe(client, admins)
    assert probe(client, bobs)


@pytest.mark.parametrize("named", ["bob", "admin", "nobody", "", "ann2"])
def test_only_an_admin_may_name_another_user(client: httpx.Client, named: str) -> None:
    mine, bobs = ann(client), log_in(client, "bob", "bob-secret")
    for method, path in [("GET", "/api/tokens"), ("DELETE", "/api/tokens"), ("DELETE", f"/api/tokens/{UNKNOWN_ID}")]:
        answer = client.request(method, path, params={"user": named}, headers=token_header(mine))
        assert answer.status_code == 403
        assert answer.json()["error"] == "insufficient_scope"
        challenge = answer.headers["www-authenticate"]
        assert challenge == 'Bearer realm="tokenauth", error="insufficient_scope", scope="admin"'
    assert probe(client, mine)
    assert probe(client, bobs)


def test_any_user_may_name_itself_and_only_one_user(client: httpx.Client) -> None:
    mine, admins = ann(client), log_in(client)
    assert [entry["current"] for entry in listed(client, mine, user="Ann")] == [True]
    answer = client.delete("/api/tokens?user=ann&user=bob", headers=token_header(admins))
    assert answer.status_code == 400
    assert "user" in answer.json()["error_description"]
    assert probe(client, mine)


def test_above_the_limit_the_oldest_login_ends(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock
) -> None:
    bobs = log_in(client, "bob", "bob-secret")
    tokens: list[str] = []
    for number in range(PER_USER + 3):
        tokens.append(ann((client, sibling_client)[number % 2]))
        clock.advance(1)
        for each in (client, sibling_client):
            assert all(probe(each, token) for token in tokens[-PER_USER:])
            assert not any(probe(each, token) for token in tokens[:-PER_USER])
    assert len(listed(client, tokens[-1])) == PER_USER
    assert probe(client, bobs)


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Basic YWRtaW46YWRtaW4="}, {"X_Token": UNKNOWN}])
def test_a_missing_token_is_401_with_a_challenge(
    client: httpx.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="tokenauth"'
    assert answer.headers["cache-control"] == "no-store"
    assert method == "HEAD" or set(answer.json()) == {"error", "error_description"}


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_all_invalid_tokens_get_the_same_answer(
    server: Server, client: httpx.Client, clock: HandClock, method: str, path: str
) -> None:
    expired = ann(client)
    clock.advance(DAY)
    revoked = ann(client)
    client.request("DELETE", "/api/token", json={"token": revoked})
    answers = []
    for token in (UNKNOWN, expired, revoked, "malformed", "a" * 65):
        for carrier in ("X-Token: ", "Authorization: Bearer "):
            method_sent = "GET" if method == "HEAD" else method
            sent = f"{method_sent} {path} HTTP/1.1\r\nHost: x\r\n{carrier}{token}\r\n\r\n"
            status, headers, body = exchange(server.port, sent.encode())
            del headers["date"]
            answers.append((status, headers, body))
    status, headers, body = answers[0]
    assert answers == [answers[0]] * len(answers)
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="tokenauth", error="invalid_token"'
    assert headers["cache-control"] == "no-store"
    assert b'"error":"invalid_token"' in body


def test_the_guard_reads_one_token_from_the_headers(client: httpx.Client) -> None:
    one, other = ann(client), ann(client)
    assert client.get("/api/me", params={"token": one}).status_code == 401
    both = {"X-Token": one, "Authorization": f"Bearer {other}"}
    assert client.get("/api/me", headers=both).status_code == 400
    same = {"X-Token": one, "Authorization": f"Bearer {one}"}
    assert client.get("/api/me", headers=same).status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed", "methods"),
    [
        ("/api/me", "GET, HEAD", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]),
        ("/api/tokens", "GET, HEAD, POST, DELETE", ["PUT", "PATCH", "OPTIONS", "TRACE"]),
        (f"/api/tokens/{UNKNOWN_ID}/rotate", "POST", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]),
        (f"/api/tokens/{UNKNOWN_ID}", "DELETE", ["GET", "HEAD", "POST", "PUT", "PATCH", "OPTIONS", "TRACE"]),
    ],
)
def test_other_methods_are_405_with_an_allow_header(
    client: httpx.Client, path: str, allowed: str, methods: list[str]
) -> None:
    token = ann(client)
    for method in methods:
        answer = client.request(method, path, headers=token_header(token))
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert probe(client, token)


def test_a_user_who_is_named_as_everyone_is_one_user(tmp_path: Path) -> None:
    users = table("ann", "ann-secret") + table("*", "star-secret")
    with worker(write_config(tmp_path, "", users)) as server, server.client() as client:
        mine, star = ann(client), log_in(client, "*", "star-secret")
        for query in ({}, {"user": "*"}):
            answer = client.delete(f"/api/tokens/{id_of(client, mine)}", params=query, headers=token_header(star))
            assert answer.status_code == (403 if query else 404)
        assert client.get("/api/tokens", params={"user": "*"}, headers=token_header(star)).status_code == 403
        assert probe(client, mine)
        assert client.delete(f"/api/tokens/{id_of(client, star)}", headers=token_header(star)).status_code == 204
