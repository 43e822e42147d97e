"""A Django site guarded by django-oauth-toolkit introspects tokens at tokenauth, as documented by the toolkit."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import Server, log_in, spawn, worker, write_config
from tests.wire.oauth.forms import ANN, CLIENTS, GATEWAY, UNKNOWN, fetch, post, table

pytestmark = pytest.mark.extended

CAL = ("cal", "cal-secret")
SETTINGS = ["RESOURCE_SERVER_INTROSPECTION_CREDENTIALS", "RESOURCE_SERVER_AUTH_TOKEN"]


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a worker on the real clock, which Django uses."""
    config = write_config(tmp_path_factory.mktemp("issuer"), users=CLIENTS + table(*CAL, "read"))
    with worker(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(issuer: Server) -> Iterator[httpx.Client]:
    with issuer.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def sites(
    issuer: Server, client: httpx.Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """Run a site for each kind of credential, both started at the same time."""
    with ExitStack() as stack:
        running = {}
        for setting, credential in zip(SETTINGS, [GATEWAY, (fetch(client, GATEWAY),)], strict=True):
            directory = tmp_path_factory.mktemp("site")
            arguments = [str(directory / "site.db"), issuer.url, setting, *credential]
            command = [sys.executable, "-m", "tests.wire.oauth.django_site", *arguments]
            running[setting] = stack.enter_context(spawn(command, directory))
        for site in running.values():
            site.port = site.wait("listening", 60)["port"]
        yield running


@pytest.fixture(params=SETTINGS)
def site(request: pytest.FixtureRequest, sites: dict[str, Server]) -> Iterator[httpx.Client]:
    with sites[request.param].client() as connected:
        yield connected


def get(site: httpx.Client, path: str, token: str | None) -> httpx.Response:
    """Get a page, optionally with a token."""
    return site.get(path, headers={} if token is None else {"Authorization": f"Bearer {token}"})


def test_a_valid_token_is_accepted_as_its_user(site: httpx.Client, client: httpx.Client) -> None:
    for token in (fetch(client), log_in(client, *ANN)):
        for path in ("/any", "/write", "/advertised"):
            answer = get(site, path, token)
            assert (answer.status_code, answer.json()) == (200, {"user": "ann"})


def test_an_invalid_or_missing_token_is_refused(site: httpx.Client) -> None:
    for token in (UNKNOWN, "malformed", None):
        assert get(site, "/any", token).status_code == 403
        assert get(site, "/advertised", token).status_code == 401


def test_a_revoked_token_is_refused_by_the_site(site: httpx.Client, client: httpx.Client) -> None:
    token = fetch(client)
    post(client, "revoke", ANN, token=token)
    assert get(site, "/any", token).status_code == 403
    assert get(site, "/advertised", token).status_code == 401


def test_a_site_accepts_a_token_while_it_is_cached(sites: dict[str, Server], client: httpx.Client) -> None:
    """The cache of the toolkit: one second here, 10 hours by default."""
    token = fetch(client)
    with ExitStack() as stack:
        connected = [stack.enter_context(site.client()) for site in sites.values()]
        assert [get(site, "/any", token).status_code for site in connected] == [200, 200]
        post(client, "revoke", ANN, token=token)
        for site in connected:
            until(lambda: get(site, "/any", token).status_code == 403, "the cache entry has expired")  # noqa: B023


def test_a_user_without_the_required_scope_is_refused(site: httpx.Client, client: httpx.Client) -> None:
    token = fetch(client, CAL)
    assert get(site, "/any", token).json() == {"user": "cal"}
    assert get(site, "/write", token).status_code == 403
    assert get(site, "/advertised", token).status_code == 403
