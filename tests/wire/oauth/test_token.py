"""POST /oauth/token: tokens for clients (RFC 6749 section 4.4) and its errors (section 5.2)."""

import httpx
import pytest

from tests.support.servers import HandClock, log_in, probe
from tests.wire.oauth.forms import ANN, ENDPOINTS, FULL_FORMS, GATEWAY, fetch, post, refusal

DAY = 24 * 3600
BOB = ("bob", "bob-secret")
GRANT = {"grant_type": "client_credentials"}


def test_a_client_token_is_valid_on_all_workers(
    client: httpx.Client, sibling_client: httpx.Client, clock: HandClock
) -> None:
    answer = post(client, "token", ANN, **GRANT)
    document = answer.json()
    token = document.pop("access_token")
    assert document == {"token_type": "Bearer", "expires_in": DAY, "scope": "read write"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    for each in (client, sibling_client):
        me = each.get("/api/me", headers={"Authorization": f"Bearer {token}"}).json()
        assert (me["username"], me["scopes"]) == ("ann", ["read", "write"])
        assert me["expiry_time"] == int(clock()) + DAY
        assert len(each.get("/api/tokens", headers={"X-Token": token}).json()["tokens"]) == 1


def test_each_response_has_a_new_token(client: httpx.Client) -> None:
    tokens = {post(client, "token", ANN, **GRANT, access_token="mine", token="mine").json()["access_token"]}
    tokens |= {fetch(client) for _ in range(5)} | {log_in(client, *ANN)}
    assert len(tokens) == 7
    assert {len(token) for token in tokens} == {64}


def test_a_token_expires_after_expires_in(client: httpx.Client, clock: HandClock) -> None:
    document = post(client, "token", ANN, **GRANT).json()
    clock.advance(document["expires_in"] - 1)
    assert probe(client, document["access_token"])
    clock.advance(1)
    assert not probe(client, document["access_token"])


@pytest.mark.parametrize(
    ("scope", "granted"),
    [
        ("", "read write"),
        (" ", "read write"),
        ("read", "read"),
        ("write", "write"),
        ("read write", "read write"),
        ("write read", "read write"),
        ("read read", "read"),
        (" write ", "write"),
        ("read  write", "read write"),
    ],
)
def test_a_client_gets_the_scopes_that_it_requests(
    client: httpx.Client, sibling_client: httpx.Client, scope: str, granted: str
) -> None:
    answer = post(client, "token", ANN, **GRANT, scope=scope)
    assert answer.status_code == 200
    assert answer.json()["scope"] == granted
    token = answer.json()["access_token"]
    for each in (client, sibling_client):
        me = each.get("/api/me", headers={"X-Token": token}).json()
        assert (me["kind"], me["name"], me["scopes"]) == ("login", None, granted.split())
        assert post(each, "introspect", GATEWAY, token=token).json()["scope"] == granted
        assert each.get("/auth", headers={"X-Token": token}).headers["x-auth-scopes"] == granted


def test_a_narrowed_token_passes_where_its_scopes_suffice(client: httpx.Client) -> None:
    narrowed = {"X-Token": post(client, "token", ANN, **GRANT, scope="read").json()["access_token"]}
    full = {"X-Token": fetch(client)}
    for token, scope, status in [(narrowed, "read", 200), (narrowed, "write", 403), (full, "write", 200)]:
        for _ in range(2):
            assert client.get("/auth", params={"scope": scope}, headers=token).status_code == status


def test_a_client_without_scopes_gets_an_empty_scope(client: httpx.Client) -> None:
    assert post(client, "token", BOB, **GRANT).json()["scope"] == ""
    assert refusal(post(client, "token", BOB, **GRANT, scope="read")) == (400, "invalid_scope")


@pytest.mark.parametrize(
    ("scope", "named"),
    [
        ("admin", "scope admin"),
        ("read admin openid", "scopes admin openid"),
        ("READ", "scope READ"),
        ("read,write", "scope (unknown)"),
        ("read\twrite", "scope (unknown)"),
        ("*", "scope (unknown)"),
        ("\u00e4", "scope (unknown)"),
        ("x" * 64, "scope (unknown)"),
    ],
)
def test_a_scope_that_the_client_lacks_is_refused(client: httpx.Client, scope: str, named: str) -> None:
    before = len(my_tokens(client))
    answer = post(client, "token", ANN, **GRANT, scope=scope)
    assert refusal(answer) == (400, "invalid_scope")
    assert answer.json()["error_description"] == f"The client does not have the {named}. It has: read write."
    assert len(my_tokens(client)) == before + 1, "my_tokens fetches one itself"


def my_tokens(client: httpx.Client) -> list[object]:
    """Return the tokens of ann."""
    answer = client.get("/api/tokens", headers={"X-Token": fetch(client)})
    return list(answer.json()["tokens"])


@pytest.mark.parametrize(
    ("grant_type", "error"),
    [
        (None, "invalid_request"),
        ("", "invalid_request"),
        ("password", "unsupported_grant_type"),
        ("authorization_code", "unsupported_grant_type"),
        ("refresh_token", "unsupported_grant_type"),
        ("implicit", "unsupported_grant_type"),
        ("urn:ietf:params:oauth:grant-type:token-exchange", "unsupported_grant_type"),
        ("CLIENT_CREDENTIALS", "unsupported_grant_type"),
        ("client_credentials ", "unsupported_grant_type"),
    ],
)
def test_only_client_credentials_are_granted(client: httpx.Client, grant_type: str | None, error: str) -> None:
    form = {"username": "admin", "password": "admin", "code": "c", "refresh_token": "r", "redirect_uri": "https://x"}
    if grant_type is not None:
        form["grant_type"] = grant_type
    assert refusal(post(client, "token", ANN, **form)) == (400, error)


def test_only_clients_learn_the_supported_grants(client: httpx.Client) -> None:
    assert refusal(post(client, "token", ("ann", "wrong"), grant_type="password")) == (401, "invalid_client")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_405_and_change_nothing(client: httpx.Client, endpoint: str, method: str) -> None:
    answer = client.request(method, f"/oauth/{endpoint}", params=FULL_FORMS[endpoint], auth=GATEWAY)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.headers["cache-control"] == "no-store"
    if method != "HEAD":
        assert refusal(answer) == (405, "method_not_allowed")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_parameters_in_the_query_are_ignored(client: httpx.Client, endpoint: str) -> None:
    """URLs end up in logs (RFC 6749 section 2.3.1, RFC 7662 section 4)."""
    credentials = {"client_id": GATEWAY[0], "client_secret": GATEWAY[1]}
    answer = client.post(f"/oauth/{endpoint}", params=FULL_FORMS[endpoint], data={"x": "y"}, auth=GATEWAY)
    assert refusal(answer) == (400, "invalid_request")
    answer = client.post(f"/oauth/{endpoint}", params=credentials, data=FULL_FORMS[endpoint])
    assert refusal(answer) == (401, "invalid_client")
