"""The application: the only module that sees everything, and wires it together."""

import asyncio
import gc
import ipaddress
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, cast

from starlette.middleware import Middleware
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tokenauth import __version__
from tokenauth.clock import Clock
from tokenauth.errors import (
    ForeignPage,
    InvalidRequest,
    InvalidToken,
    StoreUnavailable,
    TokenRequired,
)
from tokenauth.logs import log
from tokenauth.risks import demand_acceptable, find_risks
from tokenauth.service import Service, create_service
from tokenauth.settings.dialects import DIALECTS
from tokenauth.settings.model import Settings
from tokenauth.sweeper import Sweeper
from tokenauth.web.access_log import AccessLog
from tokenauth.web.api_documentation import describe as describe_api
from tokenauth.web.asgi_extensions import REFUSAL_RULES, RefusalRules
from tokenauth.web.cors import CORS
from tokenauth.web.dialects.serving import dialect_routes
from tokenauth.web.error_handling import ErrorMiddleware, not_found
from tokenauth.web.foreign_pages import Hosts, PageGuard
from tokenauth.web.middleware import TokenMiddleware
from tokenauth.web.routes.account import ME, AccountRoutes
from tokenauth.web.routes.docs import DocsRoutes
from tokenauth.web.routes.forward_auth import PATH as FORWARD_AUTH
from tokenauth.web.routes.forward_auth import ForwardAuth
from tokenauth.web.routes.health import HealthRoutes
from tokenauth.web.routes.oauth import INTROSPECTION, OAuthRoutes
from tokenauth.web.routes.pools import PoolRoutes
from tokenauth.web.routes.token import PATH as PROBE
from tokenauth.web.routes.token import TokenRoutes
from tokenauth.web.routing import Guard, Route, refuse_collisions
from tokenauth.web.shortcuts import Shortcuts


def create_app(config: Settings, clock: Clock | None = None, monotonic: Clock = time.monotonic) -> ASGIApp:
    """Build the ASGI app that a configuration describes.

    `clock` replaces the clock of the store; `monotonic` sets the pace of time after `clock` is set back. Raises
    ConfigError, also for a risk that is not accepted. The store is opened when the server starts.
    """
    service = create_service(config, clock, monotonic)
    demand_acceptable(config, find_risks(config, service.passwords))
    return build_app(service)


BUSIEST = {("GET", PROBE), ("GET", FORWARD_AUTH), ("GET", ME), ("POST", INTROSPECTION)}
"""What Shortcuts answers. The benchmark (`make bench`) asks it of the two that are an Endpoint, too."""


def build_app(service: Service) -> Router:
    """Build the ASGI app of a service. Raises ConfigError when two routes match one path.

    It is Starlette's router and not its application: the error handling of that costs 5 microseconds a request, a tenth
    of what the fastest routes take, and has the server log the text of exceptions, which may hold a token.
    """
    routes = find_routes(service)
    return Router(
        routes,
        redirect_slashes=False,
        default=not_found,
        lifespan=partial(_lifespan, service),
        middleware=[
            *_outer_middleware(service.settings),
            Middleware(Shortcuts, routes, BUSIEST),
            Middleware(ErrorMiddleware),
        ],
    )


def _outer_middleware(config: Settings) -> Iterator[Middleware]:
    server = config.server
    if server.trusted_proxies:
        yield Middleware(ProxyHeaders, _both_spellings(server.trusted_proxies))
    if server.access_log:
        yield Middleware(AccessLog)
    if server.cors_origins:
        # A preflight of forward-auth is judged as any request: the application behind the proxy answers it.
        yield Middleware(CORS, server.cors_origins, _headers_of_pages(config), exempt={FORWARD_AUTH})


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
    return [*usual, *chain.from_iterable(DIALECTS[name].request_headers for name in config.dialects)]


_ASKING = (InvalidRequest, TokenRequired, InvalidToken, StoreUnavailable)
"""What is refused wherever a token is asked for."""


def find_routes(service: Service) -> list[Route]:
    """List the routes of a service, the busiest first. Raises ConfigError when two of them match one path."""
    config, tokens, pools = service.settings, service.tokens, service.pools
    hosts = Hosts.of(config.server, config.oauth.issuer)
    origins = config.server.cors_origins
    token = Guard([Middleware(TokenMiddleware, tokens)], _ASKING)
    own_pages = Guard([Middleware(PageGuard, origins, hosts, safe=True)], (ForeignPage,), asks_token=False)
    owners = {
        "tokenauth itself": [
            *PoolRoutes(pools).routes(token),
            *AccountRoutes(tokens).routes(token),
            *TokenRoutes(tokens, hosts).routes(),
            Route(FORWARD_AUTH, ForwardAuth(tokens)),
            *OAuthRoutes(tokens, service.credentials, config.oauth.issuer).routes(own_pages),
            *HealthRoutes(service.ready).routes(),
            *(DocsRoutes(partial(describe_api, config)).routes() if config.server.docs else []),
        ],
        **dialect_routes(service, hosts),
    }
    refuse_collisions(owners)
    return list(chain.from_iterable(owners.values()))


@asynccontextmanager
async def _lifespan(service: Service, app: None) -> AsyncIterator[Mapping[str, object]]:
    """Run the service and its sweeper, and give the server what it needs to refuse requests by itself."""
    async with service.running():
        await service.pools.prefill()
        sweeper = Sweeper(service.store, service.pools, service.clock, service.settings.throttle.forget)
        sweeping = asyncio.create_task(sweeper.run())
        gc.collect()
        gc.freeze()  # objects that live until the end need not be collected again and again
        log.info("started", version=__version__, users=len(service.settings.users_by_name))
        try:
            origins = frozenset(service.settings.server.cors_origins)
            yield {REFUSAL_RULES: RefusalRules(origins, frozenset({FORWARD_AUTH}))}
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
    log.info("stopped")
