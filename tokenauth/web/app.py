"""The application: the only module that sees everything, and wires it together."""

import asyncio
import gc
import ipaddress
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, Protocol, cast

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tokenauth import __version__
from tokenauth.clock import Clock
from tokenauth.errors import (
    ForeignPage,
    InsufficientScope,
    InvalidRequest,
    InvalidToken,
    StoreUnavailable,
    TokenRequired,
)
from tokenauth.logs import log
from tokenauth.pools import Pools
from tokenauth.risks import demand_acceptable, find_risks
from tokenauth.service import Service, create_service
from tokenauth.settings.model import Settings
from tokenauth.sweeper import Sweeper
from tokenauth.web import operations
from tokenauth.web.access_log import AccessLog
from tokenauth.web.api_documentation import describe as describe_api
from tokenauth.web.asgi_extensions import REFUSAL_RULES, RefusalRules
from tokenauth.web.cors import CORS
from tokenauth.web.dialects.random_token_generator import RandomTokenGenerator
from tokenauth.web.dialects.simple_token_implement import SimpleTokenImplement
from tokenauth.web.dialects.token_management_service import TokenManagementService
from tokenauth.web.dialects.token_pool import TokenPool
from tokenauth.web.error_handling import HANDLERS, ErrorMiddleware
from tokenauth.web.foreign_pages import Hosts, PageGuard
from tokenauth.web.middleware import TokenMiddleware
from tokenauth.web.operations import whole
from tokenauth.web.routes.account import AccountRoutes
from tokenauth.web.routes.docs import DocsRoutes
from tokenauth.web.routes.forward_auth import PATH as FORWARD_AUTH_PATH
from tokenauth.web.routes.forward_auth import ForwardAuth
from tokenauth.web.routes.health import HealthRoutes
from tokenauth.web.routes.oauth import OAuthRoutes
from tokenauth.web.routes.pools import PoolRoutes
from tokenauth.web.routes.token import TokenRoutes
from tokenauth.web.routing import OPEN, Guard, Handlers, Route, Shortcuts, refuse_collisions


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


def create_app(config: Settings, clock: Clock | None = None, monotonic: Clock = time.monotonic) -> ASGIApp:
    """Build the ASGI app that a configuration describes.

    `clock` replaces the clock of the store; `monotonic` sets the pace of time after `clock` is set back. Raises
    ConfigError, also for a risk that is not accepted. The store is opened when the server starts.
    """
    service = create_service(config, clock, monotonic)
    demand_acceptable(config, find_risks(config, service.passwords))
    return build_app(service)


def build_app(service: Service) -> Starlette:
    """Build the ASGI app of a service. Raises ConfigError when two routes are the same."""
    server = service.config.server
    routes = find_routes(service)
    middleware = [Middleware(Shortcuts, routes), Middleware(ErrorMiddleware)]
    if server.cors_origins:
        # A preflight of forward-auth is a request to be judged: the application behind the proxy answers it.
        cors = Middleware(CORS, server.cors_origins, _headers_of_pages(service.config), exempt={FORWARD_AUTH_PATH})
        middleware.insert(0, cors)
    if server.access_log:
        middleware.insert(0, Middleware(AccessLog))
    if server.trusted_proxies:
        # uvicorn's own option would trust this machine by default
        middleware.insert(0, Middleware(ProxyHeaders, _both_spellings(server.trusted_proxies)))
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers=HANDLERS, lifespan=partial(_lifespan, service)
    )
    app.router.redirect_slashes = False
    return app


class ProxyHeaders(ProxyHeadersMiddleware):
    """uvicorn's middleware, with the types of Starlette."""

    def __init__(self, app: ASGIApp, trusted_hosts: list[str]) -> None:
        super().__init__(cast(Any, app), trusted_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        """Pass one request on."""
        await super().__call__(cast(Any, scope), cast(Any, receive), cast(Any, send))


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


def _headers_of_pages(config: Settings) -> Sequence[str]:
    """List what a page of another origin may send beside what every page may."""
    usual = ("X-Token", "Authorization", "Content-Type", "traceparent", "tracestate")
    return (*usual, "X-API-PASSWORD") if "simple-token-implement" in config.dialects.chosen() else usual


_ASKING = (InvalidRequest, TokenRequired, InvalidToken, StoreUnavailable)
"""What is refused wherever a token is asked for."""


def find_routes(service: Service) -> list[Route]:
    """List the routes of a service. Raises ConfigError when two of them match one path."""
    config = service.config
    hosts = Hosts.of(config.server, config.oauth.issuer)
    origins = config.server.cors_origins
    token = Guard([Middleware(TokenMiddleware, service.tokens)], _ASKING)
    own_pages = Guard([Middleware(PageGuard, origins, hosts, safe=True)], (ForeignPage,), asks_token=False)
    routes = [
        *HealthRoutes(service.ready).routes(),
        *TokenRoutes(service.tokens, hosts).routes(),
        Route(FORWARD_AUTH_PATH, ForwardAuth(service.tokens)),
        *_listed(OAuthRoutes(service.tokens, service.credentials, config.oauth.issuer).routes(), own_pages),
        *AccountRoutes(service.tokens).routes(token),
        *_listed(operations.exact(PoolRoutes(service.pools).routes()), token),
    ]
    if config.server.docs:
        routes += DocsRoutes(partial(describe_api, config)).routes()
    owners = {"tokenauth itself": routes}
    for name, terms in config.dialects.chosen().items():
        guard = Guard(
            [Middleware(TokenMiddleware, service.tokens), Middleware(PoolGuard, service.pools, terms.pool)],
            (*_ASKING, InsufficientScope),
        )
        # A page cannot send a token unless it is listed, so a dialect that asks for one needs no other guard.
        if not terms.require_token:
            guard = Guard([Middleware(PageGuard, origins, hosts)], (ForeignPage,), asks_token=False)
        dialect = {
            terms.prefix + path: whole(handlers) for path, handlers in _DIALECTS[name](service, terms).routes().items()
        }
        owners[f"dialects.{name}"] = _listed(dialect, guard)
    refuse_collisions(owners)
    return list(chain.from_iterable(owners.values()))


def _listed(handlers: Mapping[str, Handlers], guard: Guard = OPEN) -> list[Route]:
    return [Route(path, methods, guard) for path, methods in handlers.items()]


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
async def _lifespan(service: Service, app: Starlette) -> AsyncIterator[Mapping[str, object]]:
    """Run the service and its sweeper, and give the server what it needs to refuse requests by itself."""
    async with service.running():
        await service.pools.prefill()
        sweeper = Sweeper(service.store, service.pools, service.clock, service.config.throttle.forget)
        sweeping = asyncio.create_task(sweeper.run())
        gc.collect()
        gc.freeze()  # objects that live until the end need not be collected again and again
        log.info("started", version=__version__, users=len(service.config.directory))
        try:
            origins = frozenset(service.config.server.cors_origins)
            yield {REFUSAL_RULES: RefusalRules(origins, frozenset({FORWARD_AUTH_PATH}))}
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
    log.info("stopped")
