"""The application: the only module that sees everything, and wires it together."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, cast

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tokenauth import __version__
from tokenauth.access import AccessLog
from tokenauth.config import Config
from tokenauth.errors import NotFound, StartError
from tokenauth.logs import log
from tokenauth.middleware import TokenMiddleware
from tokenauth.models import Clock, ForwardClock
from tokenauth.passwords import Passwords
from tokenauth.risks import find_risks, judge
from tokenauth.routes.account import OneTokenEndpoint, TokensEndpoint, me
from tokenauth.routes.health import ReadyEndpoint, healthz
from tokenauth.routes.refusals import refuse
from tokenauth.routes.token import PATH, Probe, TokenEndpoint
from tokenauth.stores.base import Store
from tokenauth.stores.open import open_store
from tokenauth.sweeper import Sweeper
from tokenauth.throttle import Throttle
from tokenauth.tokens import Tokens

Life = Callable[[], AbstractAsyncContextManager[None]]
"""What the service does from its start to its stop."""


class Service(NamedTuple):
    """Everything below HTTP, wired together."""

    config: Config
    clock: ForwardClock
    store: Store
    passwords: Passwords
    tokens: Tokens

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store and bring its schema up to date; close it at the end. Raises StartError."""
        behind = self.clock.advance(await self.store.start())
        if behind > 1:
            log.warning("clock_is_behind", seconds=round(behind), action="time goes on from where it was")
        try:
            yield
        finally:
            await self.tokens.close()
            await self.store.stop(self.clock())
            self.passwords.close()


def create_service(config: Config, clock: Clock = time.time, ticks: Clock = time.monotonic) -> Service:
    """Wire up what a configuration describes, without HTTP. Raises ConfigError."""
    passwords = Passwords(config.passwords)
    passwords.check(config.directory.values())
    now = ForwardClock(clock, ticks)
    store = open_store(config.database.url, config.tokens.cache_size)
    throttle = Throttle(config.throttle, config.server.workers, store, now)
    tokens = Tokens(config.tokens, config.directory, store, passwords, throttle, now)
    return Service(config, now, store, passwords, tokens)


def create_app(config: Config, clock: Clock = time.time, ticks: Clock = time.monotonic) -> ASGIApp:
    """Build the ASGI app that a configuration describes.

    `clock` says what time it is; `ticks` is the pace at which time goes on when `clock` is set back.
    Raises ConfigError, also for a risk that is not accepted. The store is opened when the server starts.
    """
    service = create_service(config, clock, ticks)
    judge(config, find_risks(config, service.passwords))
    exact, patterns = _routes(service)
    app: ASGIApp = Probe(service.tokens, Application(exact, patterns, partial(_live, service)))
    if config.server.access_log:
        app = AccessLog(app, exact)
    if config.server.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.server.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("X-Token", "Authorization", "Content-Type"),
            expose_headers=("WWW-Authenticate", "Retry-After"),
        )
    if config.server.trusted_proxies:
        # the same middleware that uvicorn has built in, whose own default is to trust this machine
        app = cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, app), list(config.server.trusted_proxies)))
    return app


def _routes(service: Service) -> tuple[dict[str, ASGIApp], list[BaseRoute]]:
    """List the addresses: those without parameters, and those with."""
    tokens = service.tokens
    exact: dict[str, ASGIApp] = {
        PATH: TokenEndpoint(tokens),
        "/api/me": TokenMiddleware(me, tokens),
        "/api/tokens": TokenMiddleware(TokensEndpoint(tokens), tokens),
        "/healthz": healthz,
        "/readyz": ReadyEndpoint(service.store.ready),
    }
    return exact, [Route("/api/tokens/{id}", TokenMiddleware(OneTokenEndpoint(tokens), tokens))]


@asynccontextmanager
async def _live(service: Service) -> AsyncIterator[None]:
    """Run the service, and its sweeper beside it."""
    async with service.running():
        sweeper = Sweeper(service.store, service.clock, service.config.throttle.forget)
        sweeping = asyncio.create_task(sweeper.run())
        gc.collect()
        gc.freeze()  # what stands from the start to the end need not be looked through again and again
        log.info("started", version=__version__, users=len(service.config.directory))
        try:
            yield
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
    log.info("stopped")


class Application:
    """Finds the endpoint of an address, and turns whatever it raises into an answer.

    Addresses without parameters are found with one look-up, before Starlette's router is asked.
    """

    def __init__(self, exact: Mapping[str, ASGIApp], patterns: Sequence[BaseRoute], life: Life) -> None:
        self._exact = exact
        self._router = Router(patterns, redirect_slashes=False, default=_nothing_here)
        self._life = life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or live through one lifespan."""
        if scope["type"] != "http":
            await self._other(scope, receive, send)
            return
        endpoint = self._exact.get(scope["path"])
        try:
            if endpoint is not None:
                await endpoint(scope, receive, send)
            else:
                await self._router(scope, receive, send)
        except Exception as error:
            await refuse(send, error)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start and stop, and say in one line what prevented it (ASGI lifespan)."""
        await receive()
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._life())
            except StartError as error:
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound
