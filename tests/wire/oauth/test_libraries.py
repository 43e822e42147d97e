"""Third-party clients and guards, unmodified: authlib, requests-oauthlib, oauthlib."""

import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.servers import Server, log_in, worker, write_config
from tests.wire.oauth.forms import ANN, CLIENTS, COLON, GATEWAY, ODD, UNKNOWN, active, fetch

ISSUER = "https://auth.example.com/one"
METHODS = ["client_secret_basic", "client_secret_post"]


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a worker on the real clock, which the libraries use."""
    config = write_config(tmp_path_factory.mktemp("issuer"), f'[oauth]\nissuer = "{ISSUER}"', CLIENTS)
    with worker(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(issuer: Server) -> Iterator[httpx.Client]:
    with issuer.client() as connected:
        yield connected


@pytest.fixture(scope="module", autouse=True)
def _warned() -> None:
    """Import authlib: it warns that it prefers httpx2, and forces its warnings to be shown."""
    with warnings.catch_warnings(record=True):
        from authlib.integrations import httpx_client, requests_client  # type: ignore[import-untyped]  # noqa: F401


@pytest.fixture(params=["httpx", "requests"])
def library(request: pytest.FixtureRequest) -> Any:
    """Return the client of authlib for an HTTP library."""
    from authlib.integrations.httpx_client import OAuth2Client  # type: ignore[import-untyped]
    from authlib.integrations.requests_client import OAuth2Session  # type: ignore[import-untyped]

    return OAuth2Client if request.param == "httpx" else OAuth2Session


@pytest.fixture
def _without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let oauthlib connect without TLS."""
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")


@pytest.mark.parametrize("method", METHODS)
def test_authlib_fetches_uses_introspects_and_revokes(
    issuer: Server, client: httpx.Client, library: Any, method: str
) -> None:
    with library(
        *GATEWAY, token_endpoint_auth_method=method, revocation_endpoint_auth_method=method, scope="introspect"
    ) as session:
        token = session.fetch_token(f"{issuer.url}/oauth/token", grant_type="client_credentials")
        assert (token["token_type"], token["scope"], token["expires_in"]) == ("Bearer", "introspect", 86400)
        assert not token.is_expired()
        assert session.get(f"{issuer.url}/api/me").json()["username"] == "gateway"

        anns = fetch(client)
        answer = session.introspect_token(f"{issuer.url}/oauth/introspect", token=anns, token_type_hint="access_token")
        assert (answer.json()["active"], answer.json()["username"]) == (True, "ann")
        ended = session.revoke_token(f"{issuer.url}/oauth/revoke", token=anns, token_type_hint="access_token")
        assert ended.status_code == 200
        answer = session.introspect_token(f"{issuer.url}/oauth/introspect", token=anns)
        assert answer.json() == {"active": False}


async def test_authlib_fetches_a_new_token_before_expiry(issuer: Server) -> None:
    from authlib.integrations.httpx_client import AsyncOAuth2Client

    async with AsyncOAuth2Client(
        *ANN, token_endpoint=f"{issuer.url}/oauth/token", grant_type="client_credentials"
    ) as session:
        first = await session.fetch_token()
        session.token = {**first, "expires_at": first["expires_at"] - 86400}
        assert (await session.get(f"{issuer.url}/api/me")).json()["username"] == "ann"
        assert session.token["access_token"] != first["access_token"]


@pytest.mark.parametrize("method", METHODS)
def test_authlib_reads_the_error_of_a_refusal(issuer: Server, library: Any, method: str) -> None:
    from authlib.integrations.base_client import OAuthError  # type: ignore[import-untyped]

    for auth, scope, error in [(("ann", "no"), None, "invalid_client"), (ANN, "admin", "invalid_scope")]:
        with library(*auth, token_endpoint_auth_method=method, scope=scope) as session:
            with pytest.raises(OAuthError) as refusal:
                session.fetch_token(f"{issuer.url}/oauth/token", grant_type="client_credentials")
            assert refusal.value.error == error
            assert refusal.value.description


@pytest.mark.parametrize(
    ("credentials", "method"),
    [(ODD, "client_secret_basic"), (ODD, "client_secret_post"), (COLON, "client_secret_post")],
    ids=["odd by basic", "odd in the form", "not latin-1, in the form"],
)
def test_authlib_sends_odd_names_and_secrets(
    issuer: Server, library: Any, credentials: tuple[str, str], method: str
) -> None:
    with library(*credentials, token_endpoint_auth_method=method) as session:
        session.fetch_token(f"{issuer.url}/oauth/token", grant_type="client_credentials")
        assert session.get(f"{issuer.url}/api/me").json()["username"] == credentials[0]


def test_authlib_accepts_the_metadata(issuer: Server, client: httpx.Client) -> None:
    from authlib.oauth2.rfc8414 import AuthorizationServerMetadata, get_well_known_url  # type: ignore[import-untyped]

    document = client.get(get_well_known_url(ISSUER)).json()
    metadata = AuthorizationServerMetadata(document)
    metadata.validate()
    assert metadata["issuer"] == ISSUER


def test_authlibs_resource_protector_uses_introspection(issuer: Server, client: httpx.Client) -> None:
    import requests
    from authlib.oauth2.rfc6749 import MissingAuthorizationError, ResourceProtector  # type: ignore[import-untyped]
    from authlib.oauth2.rfc6750 import InsufficientScopeError, InvalidTokenError  # type: ignore[import-untyped]
    from authlib.oauth2.rfc7662 import IntrospectTokenValidator  # type: ignore[import-untyped]

    class Introspection(IntrospectTokenValidator):  # type: ignore[misc]
        """As in the documentation of authlib."""

        def introspect_token(self, token_string: str) -> Any:
            url = f"{issuer.url}/oauth/introspect"
            answer = requests.post(url, data={"token": token_string}, auth=GATEWAY, timeout=30)
            answer.raise_for_status()
            return answer.json()

    guard = ResourceProtector()
    guard.register_token_validator(Introspection())

    def validate(token: str | None, *scopes: str) -> Any:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return guard.validate_request(list(scopes), httpx.Request("GET", "https://resource", headers=headers))

    token, user = fetch(client), log_in(client, *ANN)
    for good in (token, user):
        assert validate(good)["username"] == "ann"
        assert validate(good, "read write")["scope"] == "read write"
        with pytest.raises(InsufficientScopeError):
            validate(good, "read admin")
    client.post("/oauth/revoke", data={"token": token}, auth=ANN)
    for bad in (token, UNKNOWN, "malformed"):
        with pytest.raises(InvalidTokenError):
            validate(bad)
    with pytest.raises(MissingAuthorizationError):
        validate(None)


@pytest.mark.usefixtures("_without_tls")
@pytest.mark.parametrize("method", ["basic", "auth", "form"])
@pytest.mark.parametrize("scope", [None, ["read", "write"], ["read"]], ids=["no scope", "all scopes", "one scope"])
def test_requests_oauthlib_fetches_uses_and_revokes(
    issuer: Server, client: httpx.Client, method: str, scope: list[object] | None
) -> None:
    from oauthlib.oauth2 import BackendApplicationClient
    from requests.auth import HTTPBasicAuth
    from requests_oauthlib import OAuth2Session

    backend = BackendApplicationClient(client_id=ANN[0], scope=scope)
    with OAuth2Session(client=backend) as session:
        options: dict[str, dict[str, Any]] = {
            "basic": {"client_secret": ANN[1]},
            "auth": {"auth": HTTPBasicAuth(*ANN)},
            "form": {"client_secret": ANN[1], "include_client_id": True},
        }
        token = session.fetch_token(f"{issuer.url}/oauth/token", **options[method])
        assert token["scope"] == (scope or ["read", "write"])
        assert session.get(f"{issuer.url}/api/me").json()["username"] == "ann"
        # oauthlib accepts only an https URL here
        url, headers, body = backend.prepare_token_revocation_request(
            "https://auth.example.com/oauth/revoke", token["access_token"], "access_token"
        )
        path = httpx.URL(url).path
        assert client.post(path, content=body, headers=headers, auth=ANN).status_code == 200
        assert session.get(f"{issuer.url}/api/me").status_code == 401
    assert not active(client, token["access_token"])


@pytest.mark.usefixtures("_without_tls")
def test_requests_oauthlib_handles_odd_names_and_no_scopes(issuer: Server) -> None:
    from oauthlib.oauth2 import BackendApplicationClient
    from requests.auth import HTTPBasicAuth
    from requests_oauthlib import OAuth2Session

    for name, secret in (ODD, ("bob", "bob-secret")):
        with OAuth2Session(client=BackendApplicationClient(client_id=name)) as session:
            auth = HTTPBasicAuth(name.encode(), secret.encode())
            session.fetch_token(f"{issuer.url}/oauth/token", auth=auth)
            assert session.get(f"{issuer.url}/api/me").json()["username"] == name


@pytest.mark.usefixtures("_without_tls")
def test_oauthlib_reads_the_error_of_a_refusal(issuer: Server) -> None:
    from oauthlib.oauth2 import BackendApplicationClient, InvalidClientError, InvalidScopeError
    from requests_oauthlib import OAuth2Session

    with OAuth2Session(client=BackendApplicationClient(client_id="ann", scope=["admin"])) as session:
        with pytest.raises(InvalidScopeError):
            session.fetch_token(f"{issuer.url}/oauth/token", client_secret="ann-secret")
        with pytest.raises(InvalidClientError):
            session.fetch_token(f"{issuer.url}/oauth/token", client_secret="wrong")
