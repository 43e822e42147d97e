"""Each 403 is logged with the user, the missing scope and the route, never with the path or the query."""

import httpx
import pytest

from tests.support.servers import Server, log_in

SETTINGS = """
[pools.restricted]
scope = "write"
[pools.open]
capacity = 1
prefill = true
[dialects.token-pool]
pool = "restricted"
prefix = "/pool"
require_token = true
"""
REFUSED = [
    ("GET", "/api/tokens?user=ann", "/api/tokens", "admin"),
    ("DELETE", "/api/tokens?user=ann", "/api/tokens", "admin"),
    ("DELETE", "/api/tokens/{token}?user=ann", "/api/tokens/{id}", "admin"),
    ("POST", "/api/pools/restricted/leases", "/api/pools/{pool}/leases", "write"),
    ("DELETE", "/api/pools/restricted/tokens/{token}", "/api/pools/{pool}/tokens/{token}", "write"),
    ("POST", "/pool/api/token_pool/", "/pool/api/token_pool/", "write"),
    ("POST", "/oauth/introspect", "/oauth/introspect", "introspect"),
    ("GET", "/auth?scope=read", "/auth", "read"),
    ("GET", "/auth?scope=write+read", "/auth", "read write"),
    ("GET", "/auth?scope=read+{token}", "/auth", ("(unknown) read", "read (unknown)")),
    ("GET", "/auth?scope=hunter2", "/auth", "(unknown)"),
]


@pytest.fixture(scope="module")
def settings() -> str:
    return SETTINGS


@pytest.mark.parametrize(("method", "target", "route", "scope"), REFUSED)
def test_a_user_without_the_scope_is_named_in_the_log(
    server: Server, client: httpx.Client, method: str, target: str, route: str, scope: str
) -> None:
    token = log_in(client, "bob", "bob-secret")
    before = len(server.events("access_denied"))
    data = {"token": token} if route == "/oauth/introspect" else None
    answer = client.request(method, target.replace("{token}", token), headers={"X-Token": token}, data=data)
    assert answer.status_code == 403
    [event] = server.events("access_denied")[before:]
    assert (event["user"], event["route"], event["level"]) == ("bob", route, "warning")
    assert event["scope"] in scope if isinstance(scope, tuple) else event["scope"] == scope
    assert token not in server.log.read_text()


def test_a_denied_release_of_a_lease_is_logged(server: Server, client: httpx.Client) -> None:
    ann, bob = log_in(client, "ann", "ann-secret"), log_in(client, "bob", "bob-secret")
    leased = client.post("/api/pools/open/leases", headers={"X-Token": ann}).json()["token"]
    before = len(server.events("access_denied"))
    assert client.delete(f"/api/pools/open/leases/{leased}", headers={"X-Token": bob}).status_code == 403
    [event] = server.events("access_denied")[before:]
    route = "/api/pools/{pool}/leases/{token}"
    assert (event["user"], event["route"], event["scope"]) == ("bob", route, "")
    assert event["reason"] not in {"", "insufficient_scope"}
    assert leased not in server.log.read_text()


def test_an_invalid_forward_auth_query_is_logged(server: Server, client: httpx.Client) -> None:
    token = log_in(client, "bob", "bob-secret")
    before = len(server.events("access_denied"))
    for query in (f"{token}={token}", "cookie&scope=read"):
        answer = client.get(f"/auth?{query}", headers={"X-Token": token})
        assert answer.status_code == 403
        event = server.events("access_denied")[-1]
        assert (event["user"], event["route"], event["scope"], event["reason"]) == ("bob", "/auth", "", "forbidden")
        assert event["problem"] == answer.json()["error_description"]
    assert event["problem"] == "The query has 'cookie': 'cookie' needs browser.url in the configuration."
    assert len(server.events("access_denied")) == before + 2
    assert token not in server.log.read_text()


def test_every_403_is_logged_exactly_once(server: Server, client: httpx.Client) -> None:
    """On every path and method. Requests without a valid token get 401 and are not logged as denied."""
    paths = [path.replace("{pool}", "restricted") for path in client.get("/openapi.json").json()["paths"]]
    before, refused = len(server.events("access_denied")), 0
    for token in (log_in(client, "bob", "bob-secret"), "no-token"):
        for path in paths:
            for method in ("GET", "POST", "PUT"):
                answer = client.request(method, f"{path}?user=ann", headers={"X-Token": token})
                refused += answer.status_code == 403
    assert refused > 10
    assert len(server.events("access_denied")) - before == refused
