"""GET /.well-known/oauth-authorization-server: the server metadata (RFC 8414)."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.servers import HandClock, Server, exchange, worker, write_config
from tests.wire.oauth.forms import refusal

WELL_KNOWN = "/.well-known/oauth-authorization-server"
ENCODED = "https://example.com/a%20b"
PLAIN, WITH_PATH, LOCAL = "https://auth.example.com", "https://example.com:8443/auth/one", "http://127.0.0.1:8000"
METHODS = ["client_secret_basic", "client_secret_post"]


@pytest.fixture(scope="module")
def issuers(directory: Path, clock: HandClock) -> Iterator[dict[str, Server]]:
    """Run a worker for each issuer, and one without an issuer."""
    with ExitStack() as stack:
        running = {}
        for number, issuer in enumerate(("", PLAIN, WITH_PATH, LOCAL, ENCODED)):
            (directory / str(number)).mkdir()
            settings = f'[oauth]\nissuer = "{issuer}"' if issuer else ""
            if issuer == PLAIN:
                settings += '\n[server]\ntrusted_proxies = ["127.0.0.1"]'
            config = write_config(directory / str(number), settings)
            running[issuer] = stack.enter_context(worker(config, clock))
        yield running


def get(server: Server, path: str) -> httpx.Response:
    with server.client() as client:
        return client.get(path)


@pytest.mark.parametrize("issuer", [PLAIN, WITH_PATH, LOCAL])
def test_the_metadata_names_the_issuer_and_its_endpoints(issuers: dict[str, Server], issuer: str) -> None:
    answer = get(issuers[issuer], WELL_KNOWN)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document.pop("response_types_supported") in ([], ["none"]), "there is no authorization endpoint"
    assert document == {
        "issuer": issuer,
        "token_endpoint": f"{issuer}/oauth/token",
        "introspection_endpoint": f"{issuer}/oauth/introspect",
        "revocation_endpoint": f"{issuer}/oauth/revoke",
        "grant_types_supported": ["client_credentials"],
        "token_endpoint_auth_methods_supported": METHODS,
        "introspection_endpoint_auth_methods_supported": METHODS,
        "revocation_endpoint_auth_methods_supported": METHODS,
    }


def test_an_issuer_path_may_be_percent_encoded(issuers: dict[str, Server]) -> None:
    assert get(issuers[ENCODED], f"{WELL_KNOWN}/a%20b").json()["issuer"] == ENCODED
    assert get(issuers[ENCODED], f"{WELL_KNOWN}/a%2520b").status_code == 404


def test_an_issuer_with_a_path_has_two_metadata_urls(issuers: dict[str, Server]) -> None:
    """The URL of RFC 8414 section 3.1, and that behind a proxy that strips the path."""
    server = issuers[WITH_PATH]
    assert get(server, f"{WELL_KNOWN}/auth/one").content == get(server, WELL_KNOWN).content
    for other in ("/", "/auth", "/auth/one/", "/auth/two"):
        assert refusal(get(server, WELL_KNOWN + other)) == (404, "not_found")
    assert refusal(get(issuers[PLAIN], f"{WELL_KNOWN}/auth/one")) == (404, "not_found")


def test_without_an_issuer_the_answer_names_the_setting(issuers: dict[str, Server]) -> None:
    answer = get(issuers[""], WELL_KNOWN)
    assert refusal(answer) == (404, "not_found")
    assert "oauth.issuer" in answer.json()["error_description"]


@pytest.mark.parametrize("issuer", ["", PLAIN, WITH_PATH])
def test_nothing_in_a_request_changes_the_metadata(issuers: dict[str, Server], issuer: str) -> None:
    server = issuers[issuer]
    expected = get(server, WELL_KNOWN)
    evil = "evil.example.net"
    head = f"Host: {evil}\r\nX-Forwarded-Host: {evil}\r\nX-Forwarded-Proto: gopher\r\nX-Forwarded-For: 192.0.2.1\r\n"
    head += f"Forwarded: host={evil};proto=http\r\nX-Forwarded-Prefix: /evil\r\nX-Original-URL: /evil\r\n"
    for target in (WELL_KNOWN, f"{WELL_KNOWN}?issuer=https://{evil}", f"http://{evil}{WELL_KNOWN}"):
        status, _, body = exchange(server.port, f"GET {target} HTTP/1.1\r\n{head}\r\n".encode())
        if target.startswith("http"):  # the absolute form, for proxies
            assert status in {expected.status_code, 404}
            assert b"evil" not in body
        else:
            assert (status, body) == (expected.status_code, expected.content)


def test_the_metadata_allows_only_get_and_head(issuers: dict[str, Server]) -> None:
    with issuers[PLAIN].client() as client:
        assert client.head(WELL_KNOWN).status_code == 200
        for method in ("POST", "PUT", "DELETE"):
            answer = client.request(method, WELL_KNOWN)
            assert refusal(answer) == (405, "method_not_allowed")
            assert answer.headers["allow"] == "GET, HEAD"
