"""POST /oauth/introspect describes a token (RFC 7662)."""

from collections.abc import Callable

import httpx
import pytest

from tests.support.servers import HandClock, Server, exchange, log_in
from tests.wire.oauth.forms import ANN, GATEWAY, INACTIVE, UNKNOWN, active, basic, fetch, form_bytes, post, refusal

DAY = 24 * 3600
BOB = ("bob", "bob-secret")

Obtain = Callable[[httpx.Client], str]


@pytest.mark.parametrize("obtain", [fetch, lambda client: log_in(client, *ANN)], ids=["as a client", "as a user"])
def test_introspection_describes_a_valid_token(client: httpx.Client, clock: HandClock, obtain: Obtain) -> None:
    clock.advance(0.75)
    token = obtain(client)
    answer = post(client, "introspect", token=token)
    [listed] = client.get("/api/tokens", headers={"X-Token": token}).json()["tokens"]
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "active": True,
        "sub": "ann",
        "username": "ann",
        "client_id": "ann",
        "scope": "read write",
        "iat": int(clock()),
        "exp": int(clock()) + DAY,
        "jti": listed["id"],
        "token_type": "Bearer",
    }
    assert listed["expiry_time"] == answer.json()["exp"]


def test_a_token_without_scopes_is_active(client: httpx.Client) -> None:
    answer = post(client, "introspect", token=fetch(client, BOB)).json()
    assert (answer["active"], answer["scope"]) == (True, "")


@pytest.mark.parametrize(
    "more",
    [
        {"token_type_hint": "access_token"},
        {"token_type_hint": "refresh_token"},
        {"token_type_hint": "pickle"},
        {"resource": "https://x", "x": "y"},
        {"client_id": "gateway"},
    ],
    ids=str,
)
def test_other_form_fields_change_nothing(client: httpx.Client, more: dict[str, str]) -> None:
    token = fetch(client)
    assert (
        post(client, "introspect", GATEWAY, token=token, **more).json()
        == post(client, "introspect", token=token).json()
    )


@pytest.mark.parametrize(
    "malformed",
    [
        "u",
        "u" * 63,
        "u" * 65,
        "-" * 64,
        "\u00e4" * 32,
        "\0",
        "Bearer " + UNKNOWN,
        "' OR 1=1 --",
        "x" * 15_000,
        "\ud7ff",
    ],
    ids=range(10),
)
def test_a_malformed_token_is_inactive(client: httpx.Client, malformed: str) -> None:
    assert post(client, "introspect", token=malformed).content == INACTIVE
    assert post(client, "introspect", token=malformed).status_code == 200


def test_an_inactive_token_gets_no_reason(client: httpx.Client, clock: HandClock) -> None:
    expired = fetch(client)
    clock.advance(DAY)
    revoked, ended = fetch(client), fetch(client)
    post(client, "revoke", ANN, token=revoked)
    client.request("DELETE", "/api/token", json={"token": ended})
    answers = []
    for token in (UNKNOWN, expired, revoked, ended, "malformed"):
        answer = post(client, "introspect", token=token)
        answers.append((answer.status_code, answer.content, {**answer.headers, "date": ""}))
    assert answers[0][:2] == (200, INACTIVE)
    assert all(each == answers[0] for each in answers)


def test_a_token_is_inactive_from_exp_onward(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock
) -> None:
    clock.advance(0.5)
    token = fetch(client)
    exp = post(client, "introspect", token=token).json()["exp"]
    clock.set(exp - 0.001)
    assert active(client, token)
    assert active(sibling_client, token)
    clock.set(exp)
    assert post(client, "introspect", token=token).content == INACTIVE
    assert post(sibling_client, "introspect", token=token).content == INACTIVE


@pytest.mark.parametrize("header", ["Authorization: Bearer {}", "Authorization: bearer {}", "X-Token: {}"])
def test_a_caller_may_authenticate_with_a_token(server: Server, client: httpx.Client, header: str) -> None:
    token = fetch(client)
    sent = with_headers([header.format(fetch(client, GATEWAY))], token)
    status, _, body = exchange(server.port, sent)
    assert status == 200
    assert b'"username":"ann"' in body


def with_headers(lines: list[str], token: str, more: str = "") -> bytes:
    """Return an introspection request with these header lines."""
    sent = form_bytes("introspect", "none", f"token={token}{more}".encode())
    return sent.replace(b"Authorization: none", "\r\n".join(lines).encode())


@pytest.mark.parametrize("bad", [UNKNOWN, "malformed", "\u00e4", "expired"], ids=range(4))
def test_a_caller_with_an_invalid_token_is_401(
    server: Server, client: httpx.Client, clock: HandClock, bad: str
) -> None:
    if bad == "expired":
        bad = fetch(client, GATEWAY)
        clock.advance(DAY)
    token = fetch(client)
    status, headers, body = exchange(server.port, with_headers([f"Authorization: Bearer {bad}"], token))
    assert (status, b'"error":"invalid_token"' in body) == (401, True)
    assert headers["www-authenticate"] == 'Bearer realm="tokenauth", error="invalid_token"'


def test_a_caller_with_a_revoked_token_fails_everywhere(client: httpx.Client, sibling_client: httpx.Client) -> None:
    caller, token = fetch(client, GATEWAY), fetch(client)
    headers = {"Authorization": f"Bearer {caller}"}
    for each in (client, sibling_client):
        assert each.post("/oauth/introspect", data={"token": token}, headers=headers).json()["active"]
    post(client, "revoke", GATEWAY, token=caller)
    for each in (client, sibling_client):
        answer = each.post("/oauth/introspect", data={"token": token}, headers=headers)
        assert refusal(answer) == (401, "invalid_token")


@pytest.mark.parametrize("method", ["basic", "form", "token"])
@pytest.mark.parametrize("caller", [ANN, BOB, ("admin", "admin")], ids=lambda caller: str(caller[0]))
def test_a_caller_without_the_scope_is_403(client: httpx.Client, caller: tuple[str, str], method: str) -> None:
    token = fetch(client, caller)
    if method == "basic":
        answer = post(client, "introspect", caller, token=token)
    elif method == "form":
        answer = post(client, "introspect", None, token=token, client_id=caller[0], client_secret=caller[1])
    else:
        answer = client.post("/oauth/introspect", data={"token": token}, headers={"X-Token": token})
    assert refusal(answer) == (403, "insufficient_scope")
    challenge = 'Bearer realm="tokenauth", error="insufficient_scope", scope="introspect"'
    assert answer.headers["www-authenticate"] == challenge


def test_two_credentials_of_a_caller_are_refused(server: Server, client: httpx.Client) -> None:
    token, caller, other = fetch(client), fetch(client, GATEWAY), fetch(client, GATEWAY)
    right = basic(":".join(GATEWAY))
    for lines, more in [
        ([f"Authorization: Bearer {caller}", f"X-Token: {other}"], ""),
        ([f"Authorization: Bearer {caller}", f"Authorization: Bearer {other}"], ""),
        ([f"X-Token: {caller}", f"Authorization: {right}"], ""),
        ([f"Authorization: Bearer {caller}", f"Authorization: {right}"], ""),
        ([f"Authorization: Bearer {caller}"], "&client_id=gateway&client_secret=gateway-secret"),
        ([f"X-Token: {caller}"], "&client_secret=wrong"),
        ([f"X-Token: {caller}"], f"&token={token}"),
    ]:
        status, _, body = exchange(server.port, with_headers(lines, token, more))
        assert (status, b'"error":"invalid_request"' in body) == (400, True), (lines, more)


def test_the_same_token_in_both_headers_is_accepted(server: Server, client: httpx.Client) -> None:
    caller = fetch(client, GATEWAY)
    sent = with_headers([f"Authorization: Bearer {caller}", f"X-Token: {caller}"], fetch(client), "&client_id=gateway")
    assert exchange(server.port, sent)[0] == 200


@pytest.mark.parametrize("form", [{}, {"token": ""}, {"Token": UNKNOWN}, {"access_token": UNKNOWN}], ids=str)
def test_a_form_without_a_token_is_400(client: httpx.Client, form: dict[str, str]) -> None:
    answer = post(client, "introspect", GATEWAY, **{"x": "y", **form})
    assert refusal(answer) == (400, "invalid_request")
    assert "token" in answer.json()["error_description"]


def test_a_named_token_is_active_with_its_scopes(client: httpx.Client) -> None:
    login = {"X-Token": fetch(client, ANN)}
    made = client.post("/api/tokens", headers=login, json={"name": "nightly", "scopes": ["write"]}).json()
    found = post(client, "introspect", token=made["token"]).json()
    assert (found["active"], found["sub"], found["scope"]) == (True, "ann", "write")
    assert (found["exp"], found["jti"]) == (made["expiry_time"], made["id"])
