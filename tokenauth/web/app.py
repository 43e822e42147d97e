"""The application: the only module that sees everything, and wires it together."""

import asyncio
import gc
import ipaddress
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, cast

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tokenauth import __version__
from tokenauth.clock import Clock
from tokenauth.errors import (
    Forbidden,
    ForeignPage,
    InsufficientScope,
    InvalidRequest,
    InvalidToken,
    NotFound,
    StartError,
    StoreUnavailable,
    TokenRequired,
)
from tokenauth.logs import describe, log
from tokenauth.pools import Pools
from tokenauth.risks import demand_acceptable, find_risks
from tokenauth.service import Service, create_service
from tokenauth.settings.model import Config
from tokenauth.sweeper import Sweeper
from tokenauth.web import requests
from tokenauth.web.access_log import AccessLog
from tokenauth.web.asgi_extensions import REFUSAL_RULES, RefusalRules
from tokenauth.web.dialects.random_token_generator import RandomTokenGenerator
from tokenauth.web.dialects.simple_token_implement import SimpleTokenImplement
from tokenauth.web.dialects.token_management_service import TokenManagementService
from tokenauth.web.dialects.token_pool import TokenPool
from tokenauth.web.foreign_pages import Hosts, PageGuard
from tokenauth.web.middleware import TokenMiddleware
from tokenauth.web.operations import exact, whole
from tokenauth.web.responses import refuse
from tokenauth.web.routes.account import AccountRoutes
from tokenauth.web.routes.docs import DocsRoutes
from tokenauth.web.routes.forward_auth import PATH as FORWARD_AUTH_PATH
from tokenauth.web.routes.forward_auth import ForwardAuth
from tokenauth.web.routes.health import HealthRoutes
from tokenauth.web.routes.oauth import OAuthRoutes
from tokenauth.web.routes.pools import PoolRoutes
from tokenauth.web.routes.token import Probe, TokenRoutes
from tokenauth.web.routing import Guard, Handlers, Routes

Life = Callable[[], AbstractAsyncContextManager[None]]
"""What the service does from its start to its stop."""


class Dialect(Protocol):
    """What serves the HTTP of another service."""

    def routes(self) -> Mapping[str, Handlers]:
        """List the addresses, below the prefix that the configuration gives it."""


_DIALECTS: Mapping[str, Callable[[Service, Any], Dialect]] = {
    "simple-token-implement": lambda service, terms: SimpleTokenImplement(service.pools, terms, service.throttle),
    "token-pool": lambda service, terms: TokenPool(service.pools, terms),
    "random-token-generator": lambda service, terms: RandomTokenGenerator(service.pools, terms),
    "token-management-service": lambda service, terms: TokenManagementService(service.pools, terms),
}


def create_app(config: Config, clock: Clock | None = None, monotonic: Clock = time.monotonic) -> ASGIApp:
    """Build the ASGI app that a configuration describes.

    `clock` replaces the clock of the store; `monotonic` sets the pace of time after `clock` is set back. Raises
    ConfigError, also for a risk that is not accepted. The store is opened when the server starts.
    """
    service = create_service(config, clock, monotonic)
    demand_acceptable(config, find_risks(config, service.passwords))
    return build_app(service)


def build_app(service: Service) -> ASGIApp:
    """Build the ASGI app of a service. Raises ConfigError when two routes are the same."""
    config = service.config
    routes = find_routes(service)
    rules = RefusalRules(frozenset(config.server.cors_origins), frozenset({FORWARD_AUTH_PATH}))
    app: ASGIApp = Application(routes, partial(_live, service), {REFUSAL_RULES: rules})
    app = Probe(service.tokens, app)
    if config.server.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.server.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=_headers_of_pages(config),
            expose_headers=("WWW-Authenticate", "Retry-After"),
        )
    app = ForwardAuth(service.tokens, app)  # outside of all that answers by itself: a preflight there is a request
    if config.server.access_log:
        app = AccessLog(app, routes)
    if config.server.trusted_proxies:
        # the same middleware that uvicorn has built in, whose own default is to trust this machine
        app = cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, app), _both_spellings(config.server.trusted_proxies)))
    return app


def _both_spellings(proxies: Sequence[str]) -> list[str]:
    """List proxies with IPv4 addresses as IPv4-mapped IPv6 addresses, too, and the other way round."""
    networks = list(map(ipaddress.ip_network, proxies))
    for network in list(networks):
        first = network.network_address
        if isinstance(first, ipaddress.IPv4Address):
            networks.append(ipaddress.ip_network((_MAPPED | int(first), 96 + network.prefixlen)))
        elif first.ipv4_mapped is not None and network.prefixlen >= 96:
            networks.append(ipaddress.ip_network((first.ipv4_mapped, network.prefixlen - 96)))
    return list(map(str, networks))


_MAPPED = int(ipaddress.IPv6Address("::ffff:0.0.0.0"))


def _headers_of_pages(config: Config) -> Sequence[str]:
    """List what a page of another origin may send beside what every page may."""
    usual = ("X-Token", "Authorization", "Content-Type", "traceparent", "tracestate")
    return (*usual, "X-API-PASSWORD") if "simple-token-implement" in config.dialects.chosen() else usual


_ASKING = (InvalidRequest, TokenRequired, InvalidToken, StoreUnavailable)
"""What is refused wherever a token is asked for."""


def find_routes(service: Service) -> Routes:
    """List the addresses that a service answers at. Raises ConfigError when two of them are one."""
    guard = Guard(partial(TokenMiddleware, tokens=service.tokens), _ASKING)
    routes = Routes()
    routes.add(HealthRoutes(service.ready).routes())
    hosts = Hosts.of(service.config.server, service.config.oauth.issuer)
    routes.add(TokenRoutes(service.tokens, hosts).routes())
    routes.add(ForwardAuth(service.tokens).routes())
    origins = service.config.server.cors_origins
    pages = Guard(partial(PageGuard, origins=origins, hosts=hosts, safe=True), (ForeignPage,), asks_token=False)
    routes.add(OAuthRoutes(service.tokens, service.credentials, service.config.oauth.issuer).routes(), pages)
    routes.add(exact(AccountRoutes(service.tokens).routes()), guard)
    routes.add(exact(PoolRoutes(service.pools).routes()), guard)
    if service.config.server.docs:
        routes.add(DocsRoutes(routes, service.config.oauth.issuer).routes())
    for name, terms in service.config.dialects.chosen().items():
        asks = Guard(partial(_asks, service, terms.pool), (*_ASKING, InsufficientScope))
        # A page cannot send a token unless it is listed, so a dialect that asks for one needs no other guard.
        pages = Guard(partial(PageGuard, origins=origins, hosts=hosts), (ForeignPage,), asks_token=False)
        dialect = {path: whole(handlers) for path, handlers in _DIALECTS[name](service, terms).routes().items()}
        routes.add(dialect, asks if terms.require_token else pages, f"dialects.{name}", terms.prefix)
    return routes


def _asks(service: Service, pool: str, app: ASGIApp) -> ASGIApp:
    """Guard a dialect with a token, whose user may use its pool."""
    return TokenMiddleware(PoolGuard(app, service.pools, pool), service.tokens)


class PoolGuard:
    """Lets through whoever may use a pool; TokenMiddleware has found out who it is."""

    def __init__(self, app: ASGIApp, pools: Pools, pool: str) -> None:
        self._app = app
        self._pools = pools
        self._pool = pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request."""
        self._pools.find(self._pool, scope["user"])
        await self._app(scope, receive, send)


@asynccontextmanager
async def _live(service: Service) -> AsyncIterator[None]:
    """Run the service, and its sweeper beside it."""
    async with service.running():
        await service.pools.prefill()
        sweeper = Sweeper(service.store, service.pools, service.clock, service.config.throttle.forget)
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
    """Finds what answers a request, and turns whatever that raises into an answer."""

    def __init__(self, routes: Routes, life: Life, state: Mapping[str, object] = MappingProxyType({})) -> None:
        """Serve routes while `life` lasts; `state` is what the server gets to know when it starts."""
        self._routes = routes
        self._life = life
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or live through one lifespan."""
        if scope["type"] == "http":
            try:
                await self._endpoint(scope)(scope, receive, send)
            except Exception as error:
                if isinstance(error, InsufficientScope | Forbidden):
                    self._note_denied(scope, error)
                await refuse(send, error)
        elif scope["type"] == "lifespan":
            scope.get("state", {}).update(self._state)
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _note_denied(self, scope: Scope, error: InsufficientScope | Forbidden) -> None:
        """Log who may not do what, with the route: a path may hold a token."""
        found = self._routes.find(scope["path"])
        route = "(none)" if found is None else found[0].template
        user, lacking = requests.username(scope) or "(unknown)", getattr(error, "scope", "")
        log.warning("access_denied", user=user, route=route, scope=lacking, reason=error.code)

    def _endpoint(self, scope: Scope) -> ASGIApp:
        """Return what answers at an address. Raises NotFound."""
        found = self._routes.find(scope["path"])
        if found is None:
            raise NotFound
        route, scope["path_params"] = found
        return route.endpoint

    async def _live(self, receive: Receive, send: Send) -> None:
        """Start and stop, and say in one line what prevented it (ASGI lifespan)."""
        await receive()
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._life())
            except Exception as error:
                reason = str(error) if isinstance(error, StartError) else describe(error)
                await send({"type": "lifespan.startup.failed", "message": reason})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
