"""TokenMiddleware in Starlette, FastAPI and Litestar, with the validator in process and with the remote one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.support.servers import HandClock, Server, log_in, worker, write_config
from tokenauth.client import RemoteTokens
from tokenauth.models import Identity, Validator
from tokenauth.service import create_service
from tokenauth.settings.loader import load
from tokenauth.web.middleware import TokenMiddleware


@pytest.fixture(params=["in process", "remote"])
async def tokens(
    request: pytest.FixtureRequest, server: Server, config_file: Path, clock: HandClock
) -> AsyncIterator[Validator]:
    """Return a validator for the tokens of the server."""
    async with AsyncExitStack() as stack:
        if request.param == "remote":
            yield await stack.enter_async_context(RemoteTokens(server.url, max_age=0, clock=clock))
        else:
            service = create_service(load(config_file), clock, lambda: 0.0)
            await stack.enter_async_context(service.running())
            yield service.tokens


@pytest.fixture(scope="module")
def issuer(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


@requires("write")
async def _write(request: Request) -> JSONResponse:
    return JSONResponse([request.user.display_name, *request.auth.scopes])


async def _me(request: Request) -> JSONResponse:
    return JSONResponse([request.user.is_authenticated, request.user.username, request.user.identity])


def starlette_app(tokens: Validator) -> ASGIApp:
    """Return a Starlette app. `/write` needs a scope: it uses the `requires` decorator."""
    return Starlette(
        routes=[
            Route("/write", _write, methods=["GET"]),
            Route("/me", _me),
            Mount("/open", routes=[Route("/me", _me)]),
        ],
        middleware=[Middleware(TokenMiddleware, tokens=tokens, exempt=["/open/*"])],
    )


def fastapi_app(tokens: Validator) -> ASGIApp:
    """Return the same app in FastAPI, with the user as a dependency."""
    from fastapi import Depends, FastAPI
    from fastapi import Request as FastAPIRequest

    def _user(request: FastAPIRequest) -> Identity:
        user: Identity = request.user
        return user

    app = FastAPI(openapi_url=None)
    app.add_middleware(TokenMiddleware, tokens=tokens, exempt=["/open/*"])

    @app.get("/me")
    @app.get("/open/me")
    async def me(user: Annotated[Identity, Depends(_user)]) -> list[Any]:
        return [user.is_authenticated, user.username, user.identity]

    @app.get("/write")
    @requires("write")
    async def write(request: FastAPIRequest) -> list[str]:
        return [request.user.display_name, *request.auth.scopes]

    return app


def litestar_app(tokens: Validator) -> ASGIApp:
    """Return the same app in Litestar, with a guard."""
    import litestar
    import litestar.middleware

    def can_write(connection: Any, _: Any) -> None:
        if "write" not in connection.auth.scopes:
            raise litestar.exceptions.PermissionDeniedException

    @litestar.get(["/me", "/open/me"])
    async def me(request: litestar.Request[Identity, Identity, Any]) -> list[Any]:
        return [request.user.is_authenticated, request.user.username, request.user.identity]

    @litestar.get("/write", guards=[can_write])
    async def write(request: litestar.Request[Identity, Identity, Any]) -> list[str]:
        return [request.user.display_name, *request.auth.scopes]

    guard = litestar.middleware.DefineMiddleware(cast(Any, TokenMiddleware), tokens=tokens, exempt=["/open/*"])
    return litestar.Litestar([me, write], middleware=[guard], openapi_config=None)  # type: ignore[return-value]


def wrapped_litestar_app(tokens: Validator) -> ASGIApp:
    """Return the Litestar app with the middleware around it."""
    inner = litestar_app(tokens)
    return TokenMiddleware(inner, tokens, exempt=["/open/*"])


async def test_an_exemption_needs_the_full_path_under_litestar(tokens: Validator) -> None:
    import litestar
    import litestar.middleware

    @litestar.asgi("/admin", is_mount=True, copy_scope=True)
    async def admin(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"reached"})

    guard = litestar.middleware.DefineMiddleware(cast(Any, TokenMiddleware), tokens=tokens, exempt=["/open/*"])
    app = litestar.Litestar([admin], middleware=[guard], openapi_config=None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(cast(Any, app)), base_url="http://app") as client:
        assert (await client.get("/admin/open/me")).status_code == 401
        assert (await client.get("/admin/me")).status_code == 401


@pytest.fixture(params=[starlette_app, fastapi_app, litestar_app, wrapped_litestar_app])
async def app(request: pytest.FixtureRequest, tokens: Validator) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a guarded app."""
    make: Callable[[Validator], ASGIApp] = request.param
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make(tokens)), base_url="http://app") as client:
        yield client


async def test_an_app_sees_the_user_and_its_scopes(app: httpx.AsyncClient, issuer: httpx.Client) -> None:
    ann = {"X-Token": log_in(issuer, "ann", "ann-secret")}
    bob = {"X-Token": log_in(issuer, "bob", "bob-secret")}
    assert (await app.get("/me", headers=ann)).json() == [True, "ann", "ann"]
    assert (await app.get("/write", headers=ann)).json() == ["ann", "read", "write"]
    assert (await app.get("/me", headers=bob)).json() == [True, "bob", "bob"]
    assert (await app.get("/write", headers=bob)).status_code == 403
    assert (await app.get("/open/me", headers=ann)).json() == [False, "", ""]
    assert (await app.get("/open/me")).json() == [False, "", ""]
    assert [(await app.get(path)).status_code for path in ("/me", "/write")] == [401, 401]
    await asyncio.to_thread(issuer.request, "DELETE", "/api/token", headers=ann)
    assert (await app.get("/me", headers=ann)).status_code == 401


async def test_a_stopped_issuer_refuses_every_request(tmp_path: Path) -> None:
    clock = HandClock(tmp_path / "clock", create=True)
    with worker(write_config(tmp_path), clock) as server, server.client() as client:
        value = log_in(client)
        async with RemoteTokens(server.url, max_age=0, clock=clock) as tokens:
            transport = httpx.ASGITransport(starlette_app(tokens))
            async with httpx.AsyncClient(transport=transport, base_url="http://app") as app:
                assert (await app.get("/me", headers={"X-Token": value})).status_code == 200
                server.stop()
                answer = await app.get("/me", headers={"X-Token": value})
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                assert answer.json()["error"] == "issuer_unavailable"
                assert (await app.get("/open/me")).status_code == 200
