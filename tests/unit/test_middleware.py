"""TokenMiddleware in another app: which requests reach the app, and how it answers the others."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.support.servers import START, write_config
from tokenauth.models import ANONYMOUS, Identity, Login, Token
from tokenauth.service import Service, create_service
from tokenauth.settings.loader import load
from tokenauth.web.middleware import TokenMiddleware


async def whoami(request: Request) -> JSONResponse:
    return JSONResponse([request.scope["user"].username, request.scope["token"].expires_at])


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """Run a service in this process."""
    service = create_service(load(write_config(tmp_path)))
    async with service.running():
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a guarded Starlette app."""
    app = TokenMiddleware(Starlette(routes=[Route("/", whoami)]), service.tokens)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        yield client


async def test_a_valid_token_reaches_the_app_with_its_user(service: Service, client: httpx.AsyncClient) -> None:
    issued = await service.tokens.issue("ann", "ann-secret", "127.0.0.1", "test")
    for headers in ({"X-Token": issued.value}, {"Authorization": f"Bearer {issued.value}"}):
        answer = await client.get("/", headers=headers)
        assert answer.json() == ["ann", issued.token.expires_at]


async def test_a_request_without_a_valid_token_misses_the_app(client: httpx.AsyncClient) -> None:
    missing, wrong = await client.get("/"), await client.get("/", headers={"X-Token": "x"})
    assert (missing.status_code, wrong.status_code) == (401, 401)
    assert missing.headers["www-authenticate"] == 'Bearer realm="tokenauth"'
    assert wrong.headers["www-authenticate"] == 'Bearer realm="tokenauth", error="invalid_token"'
    both = await client.get("/", headers={"X-Token": "x", "Authorization": "Bearer y"})
    assert both.status_code == 400


async def test_a_websocket_without_a_token_is_closed(service: Service) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def unreachable(*_: Any) -> None:
        raise AssertionError("the app was reached")

    await TokenMiddleware(unreachable, service.tokens)({"type": "websocket", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_broken_store_refuses_every_request(
    service: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    issued = await service.tokens.issue("ann", "ann-secret", "127.0.0.1", "test")
    (tmp_path / "tokenauth.db").unlink()
    (tmp_path / "tokenauth.db").write_bytes(b"another file")
    service.store.engine._watch()  # type: ignore[attr-defined]  # instead of waiting for the periodic check
    answer = await client.get("/", headers={"X-Token": issued.value})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


class FixedValidator:
    """A validator with fixed logins. With `error`, it fails."""

    def __init__(self, *scopes: str, error: Exception | None = None) -> None:
        token = Token.new(b"digest", "ann", "", START, int(START) + 60)
        self.logins = {b"anns": Login(Identity("ann", scopes), token)}
        self.error = error

    async def identify(self, value: bytes) -> Login | None:
        """Look a token up."""
        if self.error is not None:
            raise self.error
        return self.logins.get(value)


class RecordingApp:
    """An app that stores the scopes of its requests."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 204."""
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def ask(app: TokenMiddleware, scope: dict[str, Any], token: bytes | None = None) -> list[dict[str, Any]]:
    """Send a request, and return the messages of the answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the request was read")

    headers = [] if token is None else [(b"x-token", token)]
    await app({"type": "http", "method": "GET", "path": "/", "headers": headers, **scope}, receive, send)
    return sent


@pytest.mark.parametrize(
    ("needed", "owned", "status"),
    [
        ((), (), 204),
        (("read",), ("read",), 204),
        (("read", "write"), ("write", "other", "read"), 204),
        (("read", "write"), ("read",), 403),
        (("read",), (), 403),
        (("read",), ("reader", "READ", "rea", ""), 403),
    ],
)
async def test_a_user_without_a_required_scope_is_refused(
    needed: tuple[str, ...], owned: tuple[str, ...], status: int
) -> None:
    app = RecordingApp()
    guarded = TokenMiddleware(app, FixedValidator(*owned), scopes=needed)
    answer = await ask(guarded, {}, b"anns")
    assert answer[0]["status"] == status
    assert len(app.scopes) == (status == 204)
    if status == 403:
        challenge = f'Bearer realm="tokenauth", error="insufficient_scope", scope="{" ".join(sorted(needed))}"'
        assert (b"www-authenticate", challenge.encode()) in answer[0]["headers"]
    assert (await ask(guarded, {}, b"other"))[0]["status"] == 401


@pytest.mark.parametrize("what", ["scopes", "exempt"])
def test_a_string_instead_of_a_list_is_refused(what: str) -> None:
    with pytest.raises(TypeError, match=what):
        TokenMiddleware(RecordingApp(), FixedValidator(), **{what: "read"})


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ({"scopes": b"read"}, TypeError),
        ({"scopes": None}, TypeError),
        ({"scopes": [None]}, TypeError),
        ({"scopes": ["read", 1]}, TypeError),
        ({"scopes": [("read",)]}, TypeError),
        ({"scopes": ["read write"]}, ValueError),
        ({"scopes": [""]}, ValueError),
        ({"scopes": ['re"ad']}, ValueError),
        ({"exempt": [b"/healthz"]}, TypeError),
        ({"exempt": ["healthz"]}, ValueError),
        ({"exempt": ["*"]}, ValueError),
        ({"exempt": [""]}, ValueError),
    ],
    ids=str,
)
def test_an_invalid_scope_or_path_fails_at_the_start(what: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="|".join(what) + "|iterable"):
        TokenMiddleware(RecordingApp(), FixedValidator(), **what)


EXEMPT = ["/healthz", "/public/*"]


@pytest.mark.parametrize(
    ("path", "root_path"),
    [
        ("/healthz", ""),
        ("/public/", ""),
        ("/public/a", ""),
        ("/public/a/b", ""),
        ("/public/a/", ""),
        ("/public/..a", ""),
        ("/public/a..b/...", ""),
        ("/app/healthz", "/app"),
        ("/app/public/a", "/app"),
        ("/healthz", "/app"),
    ],
)
async def test_an_exempt_path_has_no_user_and_no_check(path: str, root_path: str) -> None:
    app = RecordingApp()
    guarded = TokenMiddleware(
        app, FixedValidator(error=AssertionError("the validator was called")), scopes=["read"], exempt=EXEMPT
    )
    await ask(guarded, {"path": path, "root_path": root_path}, b"anns")
    (scope,) = app.scopes
    assert scope["user"] is scope["auth"] is ANONYMOUS
    assert not scope["user"].is_authenticated
    assert "token" not in scope


@pytest.mark.parametrize(
    ("path", "root_path"),
    [
        ("/", ""),
        ("", ""),
        ("/Healthz", ""),
        ("/healthz/", ""),
        ("/healthz/a", ""),
        ("//healthz", ""),
        ("/healthz\\..", ""),
        ("/public", ""),
        ("/publica", ""),
        ("/secret/public/a", ""),
        ("//public/a", ""),
        ("/public//a", ""),
        ("/public//", ""),
        ("/public/../secret", ""),
        ("/public/a/../../secret", ""),
        ("/public/..", ""),
        ("/public/../", ""),
        ("/public/.", ""),
        ("/public/./a", ""),
        ("/public/a/..", ""),
        ("/app/healthz", ""),
        ("/app/secret", "/app"),
        ("/application/healthz", "/app"),
        ("/public/secret", "/public"),
        ("/healthz", "/healthz"),
        ("/app/public/../secret", "/app"),
    ],
)
async def test_a_path_that_only_looks_exempt_needs_a_token(path: str, root_path: str) -> None:
    app = RecordingApp()
    guarded = TokenMiddleware(app, FixedValidator(), exempt=EXEMPT)
    assert (await ask(guarded, {"path": path, "root_path": root_path}))[0]["status"] == 401
    assert app.scopes == []
    await ask(guarded, {"path": path, "root_path": root_path}, b"anns")
    assert [scope["user"].username for scope in app.scopes] == ["ann"]


@pytest.mark.parametrize(
    ("sent", "path", "root_path"),
    [
        ("/admin/public/a", "/public/a", ""),
        ("/admin/healthz", "/healthz", ""),
        ("/app/app/public/a", "/public/a", "/app"),
        ("/public/%2e%2e/secret", "/public/secret", ""),
        ("/secret", "/healthz", ""),
    ],
)
async def test_the_path_as_sent_must_be_exempt_too(sent: str, path: str, root_path: str) -> None:
    app = RecordingApp()
    guarded = TokenMiddleware(app, FixedValidator(), exempt=EXEMPT)
    scope = {"path": path, "root_path": root_path, "raw_path": sent.encode()}
    assert (await ask(guarded, scope))[0]["status"] == 401
    assert app.scopes == []


@pytest.mark.parametrize(
    ("sent", "path", "root_path"),
    [
        ("/healthz", "/healthz", ""),
        ("/%68ealthz", "/healthz", ""),
        ("/public/a%20b", "/public/a b", ""),
        ("/app/public/a", "/app/public/a", "/app"),
        ("/public/%C3%BC", "/public/\u00fc", ""),
    ],
)
async def test_an_exempt_path_may_be_sent_encoded(sent: str, path: str, root_path: str) -> None:
    app = RecordingApp()
    guarded = TokenMiddleware(app, FixedValidator(error=AssertionError("the validator was called")), exempt=EXEMPT)
    await ask(guarded, {"path": path, "root_path": root_path, "raw_path": sent.encode()})
    assert len(app.scopes) == 1


@pytest.mark.parametrize("path", ["/healthz", "/secret"])
async def test_a_client_cannot_name_its_own_user(path: str) -> None:
    """The token's user replaces a user that an outer app has put into the scope."""
    app = RecordingApp()
    forged = {"user": Identity("root", ("admin",)), "auth": Identity("root", ("admin",))}
    await ask(TokenMiddleware(app, FixedValidator("read"), exempt=EXEMPT), {"path": path, **forged}, b"anns")
    (scope,) = app.scopes
    assert scope["user"] == scope["auth"] == (ANONYMOUS if path == "/healthz" else Identity("ann", ("read",)))


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyError("x"), TimeoutError()], ids=lambda error: str(type(error))
)
async def test_a_validator_that_fails_lets_no_request_pass(kind: str, error: Exception) -> None:
    app = RecordingApp()
    with pytest.raises(type(error)):
        await ask(TokenMiddleware(app, FixedValidator(error=error)), {"type": kind}, b"anns")
    assert app.scopes == []


async def test_a_lifespan_passes_through() -> None:
    app = RecordingApp()
    await ask(TokenMiddleware(app, FixedValidator()), {"type": "lifespan"})
    assert [scope["type"] for scope in app.scopes] == ["lifespan"]
