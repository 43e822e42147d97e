"""A Django site that django-oauth-toolkit guards asks tokenauth about tokens: unmodified, as its documentation says."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import Server, log_in, spawn, worker, write_config
from tests.wire.oauth.forms import ANN, CLIENTS, GATEWAY, UNKNOWN, fetch, post, table

CAL = ("cal", "cal-secret")
WAYS = ["RESOURCE_SERVER_INTROSPECTION_CREDENTIALS", "RESOURCE_SERVER_AUTH_TOKEN"]


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a worker by the real clock, which Django goes by."""
    config = write_config(tmp_path_factory.mktemp("issuer"), users=CLIENTS + table(*CAL, "read"))
    with worker(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(issuer: Server) -> Iterator[httpx.Client]:
    """Connect to the worker."""
    with issuer.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def sites(
    issuer: Server, client: httpx.Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """Run a site for each way of asking, both started at the same time."""
    with ExitStack() as stack:
        running = {}
        for way, credential in zip(WAYS, [GATEWAY, (fetch(client, GATEWAY),)], strict=True):
            directory = tmp_path_factory.mktemp("site")
            arguments = [str(directory / "site.db"), issuer.url, way, *credential]
            command = [sys.executable, "-m", "tests.wire.oauth.django_site", *arguments]
            running[way] = stack.enter_context(spawn(command, directory))
        for site in running.values():
            site.port = site.wait("listening", 60)["port"]
        yield running


@pytest.fixture(params=WAYS)
def site(request: pytest.FixtureRequest, sites: dict[str, Server]) -> Iterator[httpx.Client]:
    """Connect to one site."""
    with sites[request.param].client() as connected:
        yield connected


def get(site: httpx.Client, path: str, token: str | None) -> httpx.Response:
    """Ask for a page, perhaps with a token."""
    return site.get(path, headers={} if token is None else {"Authorization": f"Bearer {token}"})


def test_a_good_token_lets_its_user_in(site: httpx.Client, client: httpx.Client) -> None:
    for token in (fetch(client), log_in(client, *ANN)):
        for path in ("/any", "/write", "/told"):
            answer = get(site, path, token)
            assert (answer.status_code, answer.json()) == (200, {"user": "ann"})


def test_a_token_that_is_not_valid_does_not(site: httpx.Client) -> None:
    for token in (UNKNOWN, "malformed", None):
        assert get(site, "/any", token).status_code == 403
        assert get(site, "/told", token).status_code == 401


def test_a_token_that_was_revoked_is_refused(site: httpx.Client, client: httpx.Client) -> None:
    token = fetch(client)
    post(client, "revoke", ANN, token=token)
    assert get(site, "/any", token).status_code == 403
    assert get(site, "/told", token).status_code == 401


def test_a_site_accepts_a_token_while_it_is_cached(sites: dict[str, Server], client: httpx.Client) -> None:
    """The toolkit's own cache, which is set to one second here; it is 10 hours unless set."""
    token = fetch(client)
    with ExitStack() as stack:
        connected = [stack.enter_context(site.client()) for site in sites.values()]
        assert [get(site, "/any", token).status_code for site in connected] == [200, 200]
        post(client, "revoke", ANN, token=token)
        for site in connected:
            until(lambda: get(site, "/any", token).status_code == 403, "the site asks again")  # noqa: B023


def test_a_user_without_the_required_scope_is_refused(site: httpx.Client, client: httpx.Client) -> None:
    token = fetch(client, CAL)
    assert get(site, "/any", token).json() == {"user": "cal"}
    assert get(site, "/write", token).status_code == 403
    assert get(site, "/told", token).status_code == 403
