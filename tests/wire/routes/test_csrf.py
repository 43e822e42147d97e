"""A web page of another origin cannot use the browser of a visitor to guess passwords or to take permits."""

from collections.abc import Mapping

import httpx
import pytest

from tests.support.servers import Server
from tokenauth.settings.model import ServerSettings
from tokenauth.web.csrf import Hosts
from tokenauth.web.exceptions import ForeignOrigin

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


ROUTES: Mapping[str, tuple[str, str]] = {
    "token": ("POST", "/oauth/token"),
    "introspect": ("POST", "/oauth/introspect"),
    "revoke": ("POST", "/oauth/revoke"),
    "permit by GET": ("GET", "/issue_token"),
    "permit by POST": ("POST", "/recycle_token"),
    "generate": ("POST", "/random/generate"),
    "assign": ("POST", "/random/assign"),
    "a uuid": ("POST", "/pool/api/token_pool"),
    "a managed token": ("POST", "/managed/generate-token"),
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
    "an invalid origin": ({"Origin": "https://[::1"}, False),
    "an empty origin": ({"Origin": ""}, False),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("page", PAGES)
def test_only_listed_and_own_pages_are_served(server: Server, client: httpx.Client, route: str, page: str) -> None:
    headers, allowed = PAGES[page]
    method, path = ROUTES[route]
    sent = {name: server.url if value == "HERE" else value for name, value in headers.items()}
    answer = client.request(method, path, headers=sent)
    if allowed:
        assert answer.status_code != 403
    else:
        assert (answer.status_code, answer.json()["error"]) == (403, "foreign_origin")
        assert (headers.get("Origin") or headers.get("Sec-Fetch-Site", "")) in answer.json()["error_description"]


def test_a_foreign_form_is_not_counted_as_an_attempt(client: httpx.Client) -> None:
    form = {"grant_type": "client_credentials", "client_id": "ann", "client_secret": "wrong"}
    tries = [client.post("/oauth/token", data=form, headers={"Origin": FOREIGN}).status_code for _ in range(10)]
    assert tries == [403] * 10
    assert client.post("/oauth/token", data={**form, "client_secret": "ann-secret"}).status_code == 200


def test_metadata_may_be_read_by_any_page(client: httpx.Client) -> None:
    answer = client.get("/.well-known/oauth-authorization-server", headers={"Origin": FOREIGN})
    assert answer.status_code == 404, "404 because no issuer is configured; not 403"


@pytest.mark.parametrize("route", [*ROUTES, "login"])
def test_a_page_with_a_rebound_name_is_foreign(client: httpx.Client, route: str) -> None:
    """DNS rebinding: the browser treats the page as same-origin."""
    method, path = ("POST", "/api/token") if route == "login" else ROUTES[route]
    here = client.base_url.port
    for page in ({"Origin": f"http://evil.example:{here}"}, {"Sec-Fetch-Site": "same-origin"}):
        host = f"evil.example:{here}"
        body = {"username": "ann", "password": "ann-secret"}
        answer = client.request(method, path, headers={**page, "Host": host}, json=body)
        assert (answer.status_code, answer.json()["error"]) == (403, "foreign_origin")
        assert f"'{host}'" in answer.json()["error_description"]
    program = client.request(method, path, headers={"Host": "evil.example"})
    assert program.status_code != 403, "a program may use any Host"


ISSUER = "https://auth.example.com/at"
PROXY = ("10.0.0.1",)
HOSTS: Mapping[str, tuple[ServerSettings, str, str, bool]] = {
    "localhost": (ServerSettings(), "", "localhost:8000", True),
    "a subdomain of localhost": (ServerSettings(), "", "app.localhost:8000", True),
    "loopback": (ServerSettings(), "", "127.1.2.3:8000", True),
    "loopback of IPv6": (ServerSettings(), "", "[::1]:8000", True),
    "capitals and a dot": (ServerSettings(), "", "LOCALHOST.", True),
    "a name": (ServerSettings(), "", "evil.example", False),
    "a name that begins like it": (ServerSettings(), "", "localhost.evil.example", False),
    "a name that begins like an address": (ServerSettings(), "", "127.0.0.1.evil.example", False),
    "a userinfo part": (ServerSettings(), "", "evil.example:80@x", False),
    "an empty host": (ServerSettings(), "", "", False),
    "an invalid host": (ServerSettings(), "", "[::1", False),
    "the issuer": (ServerSettings(), ISSUER, "auth.example.com", True),
    "not the issuer": (ServerSettings(host="0.0.0.0"), ISSUER, "evil.example", False),
    "an address other than the issuer": (ServerSettings(host="0.0.0.0"), ISSUER, "192.0.2.1:8000", True),
    "public, no issuer": (ServerSettings(host="0.0.0.0"), "", "evil.example", True),
    "behind a proxy, no issuer": (ServerSettings(trusted_proxies=PROXY), "", "auth.example.com", True),
    "behind a proxy, not the issuer": (ServerSettings(trusted_proxies=PROXY), ISSUER, "evil.example", False),
}


@pytest.mark.parametrize("case", HOSTS)
def test_pages_may_use_only_hosts_of_the_service(case: str) -> None:
    server, issuer, host, allowed = HOSTS[case]
    scope = {"headers": [(b"host", host.encode()), (b"sec-fetch-site", b"same-origin")]}
    try:
        Hosts.from_settings(server, issuer).check(scope)
    except ForeignOrigin:
        assert not allowed
    else:
        assert allowed
