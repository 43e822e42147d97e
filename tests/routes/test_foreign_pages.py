"""Web pages of other origins cannot make a visitor's browser guess a secret, or take a permit."""

from collections.abc import Mapping

import httpx
import pytest

from tests.servers import Server

LISTED, FOREIGN = "https://app.example.com", "https://foreign.example"


@pytest.fixture(scope="module")
def settings() -> str:
    return f"""
[server]
cors_origins = ["{LISTED}"]
[pools.permits]
capacity = 1000
prefill = true
[pools.uuids]
[pools.managed]
[dialects.simple-token-implement]
pool = "permits"
password = "permits-secret"
[dialects.random-token-generator]
pool = "uuids"
prefix = "/random"
[dialects.token-pool]
pool = "uuids"
prefix = "/pool"
[dialects.token-management-service]
pool = "managed"
prefix = "/managed"
"""


DOORS: Mapping[str, tuple[str, str]] = {
    "token": ("POST", "/oauth/token"),
    "introspect": ("POST", "/oauth/introspect"),
    "revoke": ("POST", "/oauth/revoke"),
    "permit by GET": ("GET", "/issue_token"),
    "permit by POST": ("POST", "/recycle_token"),
    "generate": ("POST", "/random/generate"),
    "assign": ("POST", "/random/assign"),
    "a uuid": ("POST", "/pool/api/token_pool"),
    "a managed one": ("POST", "/managed/generate-token"),
}

PAGES: Mapping[str, tuple[dict[str, str], bool]] = {
    "a program": ({}, True),
    "a listed origin": ({"Origin": LISTED}, True),
    "a listed origin, cross-site": ({"Origin": LISTED, "Sec-Fetch-Site": "cross-site"}, True),
    "a page of the same origin": ({"Origin": "HERE", "Sec-Fetch-Site": "same-origin"}, True),
    "a page of the same origin, old browser": ({"Origin": "HERE"}, True),
    "typed by a person": ({"Sec-Fetch-Site": "none"}, True),
    "a foreign form": ({"Origin": FOREIGN, "Sec-Fetch-Site": "cross-site"}, False),
    "a foreign form, old browser": ({"Origin": FOREIGN}, False),
    "a foreign image": ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, False),
    "a sibling domain": ({"Sec-Fetch-Site": "same-site"}, False),
    "a sandboxed frame": ({"Origin": "null"}, False),
    "a file": ({"Origin": "null", "Sec-Fetch-Site": "cross-site"}, False),
    "a listed origin with a port": ({"Origin": f"{LISTED}:444"}, False),
    "a listed origin as a prefix": ({"Origin": f"{LISTED}.foreign.example"}, False),
    "no origin at all": ({"Origin": "https://[::1"}, False),
    "an empty origin": ({"Origin": ""}, False),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("page", PAGES)
def test_only_listed_and_own_pages_are_served(server: Server, client: httpx.Client, door: str, page: str) -> None:
    headers, allowed = PAGES[page]
    method, path = DOORS[door]
    sent = {name: server.url if value == "HERE" else value for name, value in headers.items()}
    answer = client.request(method, path, headers=sent)
    if allowed:
        assert answer.status_code != 403
    else:
        assert (answer.status_code, answer.json()["error"]) == (403, "foreign_origin")
        assert (headers.get("Origin") or headers.get("Sec-Fetch-Site", "")) in answer.json()["error_description"]


def test_a_foreign_form_spends_no_try(client: httpx.Client) -> None:
    form = {"grant_type": "client_credentials", "client_id": "ann", "client_secret": "wrong"}
    tries = [client.post("/oauth/token", data=form, headers={"Origin": FOREIGN}).status_code for _ in range(10)]
    assert tries == [403] * 10
    assert client.post("/oauth/token", data={**form, "client_secret": "ann-secret"}).status_code == 200


def test_metadata_may_be_read_by_every_page(client: httpx.Client) -> None:
    answer = client.get("/.well-known/oauth-authorization-server", headers={"Origin": FOREIGN})
    assert answer.status_code == 404, "no issuer is configured; it is not refused"
