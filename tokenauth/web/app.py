"""The application: its routes, middleware and lifespan."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import chain

from starlette.middleware import Middleware
from starlette.routing import Router
from starlette.types import ASGIApp

from tokenauth import build
from tokenauth.audit.log import auditing
from tokenauth.logs import log
from tokenauth.metrics import OTHERS
from tokenauth.service import Service
from tokenauth.settings.dialects import DIALECTS
from tokenauth.settings.model import Settings
from tokenauth.sweeper import Sweeper
from tokenauth.web.access_log import AccessLog
from tokenauth.web.asgi_extensions import AT_ONCE, DURATIONS, LOGGED_ONCE, REFUSAL_RULES, AtOnce, RefusalRules
from tokenauth.web.browser_auth import BrowserAuth
from tokenauth.web.console_guard import ConsoleGuard
from tokenauth.web.cookies import Cookies
from tokenauth.web.cors import CORS, answer_with_cors
from tokenauth.web.csrf import CsrfMiddleware, Hosts
from tokenauth.web.dialects.serving import dialect_routes
from tokenauth.web.error_handling import ErrorMiddleware, not_found
from tokenauth.web.openapi import Document
from tokenauth.web.proxy_headers import ProxyHeaders
from tokenauth.web.return_to import ReturnTo
from tokenauth.web.route_index import RouteIndex
from tokenauth.web.routes.account import AccountRoutes
from tokenauth.web.routes.console import CONSOLE, ConsoleRoutes
from tokenauth.web.routes.docs import DocsRoutes
from tokenauth.web.routes.events import EventRoutes
from tokenauth.web.routes.forward_auth import PATH as FORWARD_AUTH
from tokenauth.web.routes.forward_auth import ForwardAuth
from tokenauth.web.routes.health import HealthRoutes
from tokenauth.web.routes.home import HomeRoutes
from tokenauth.web.routes.javascript import MODULE, TYPES, javascript_routes
from tokenauth.web.routes.login import PATHS as PAGES
from tokenauth.web.routes.login import LoginRoutes
from tokenauth.web.routes.oauth import INTROSPECTION, OAuthRoutes
from tokenauth.web.routes.pools import PoolRoutes
from tokenauth.web.routes.status import StatusRoutes
from tokenauth.web.routes.throttle import ThrottleRoutes
from tokenauth.web.routes.token import PATH as TOKEN
from tokenauth.web.routes.token import TokenRoutes
from tokenauth.web.routing import Endpoint, Handler, Route, refuse_collisions
from tokenauth.web.validation_counting import counted

GC_THRESHOLD = 20_000
"""New objects after which Python searches for cycles. With its default of 700, leases take 5 % more CPU time."""


_WITHOUT_CORS = frozenset({FORWARD_AUTH, MODULE, TYPES, CONSOLE, *PAGES})
"""Paths that CORS does not concern.

A preflight at /auth needs a token like any request: it is meant for the application behind the proxy. Pages of other
origins may read the JavaScript module, and never read the pages for people.
"""


def build_app(service: Service) -> ASGIApp:
    """Build the ASGI app of a service, which opens the store when it starts.

    Raises ConfigError when two routes match one path.

    This is Starlette's Router instead of its Starlette class, which adds two layers of error handling: they cost 5
    microseconds a request, a sixth of what the HTTP server needs, and raise unexpected exceptions again for the server
    to log, whose texts may contain a token.
    """
    routes = find_routes(service)
    router = Router(
        routes=routes,
        redirect_slashes=False,
        default=not_found,
        lifespan=partial(_lifespan, service, _find_at_once(service.settings, routes)),
        middleware=[
            *_find_middleware(service.settings, routes),
            Middleware(RouteIndex, routes),
            Middleware(ErrorMiddleware),
        ],
    )
    return router.middleware_stack  # the router itself would only call it, which costs one more coroutine


def _find_middleware(config: Settings, routes: Sequence[Route]) -> Iterator[Middleware]:
    server = config.server
    if server.behind_proxy:
        yield Middleware(ProxyHeaders, server.trusted_proxies, bool(server.socket))
    if server.access_log:
        yield Middleware(AccessLog, routes)
    if server.cors_origins:
        headers = list(chain.from_iterable(DIALECTS[name].request_headers for name in config.dialects))
        yield Middleware(CORS, server.cors_origins, headers, exempt=_WITHOUT_CORS)


def _find_at_once(config: Settings, routes: Sequence[Route]) -> Mapping[str, tuple[Route, AtOnce]]:
    """Return what the server may ask before it calls the application: nothing, if each request is logged.

    ProxyHeaders changes only what these answers do not depend on.
    """
    found: dict[str, tuple[Route, AtOnce]] = {}
    for route in routes:
        endpoint = route.handlers.get("GET")
        if isinstance(endpoint, Endpoint) and not config.server.access_log:
            has_cors = config.server.cors_origins and route.path not in _WITHOUT_CORS
            found[route.path] = route, answer_with_cors(endpoint.at_once) if has_cors else endpoint.at_once
    return found


def find_routes(service: Service) -> list[Route]:
    """List the routes of a service. Raises ConfigError when two of them match one path."""
    config, tokens = service.settings, service.tokens
    hosts = Hosts.from_settings(config.server, config.oauth.issuer, config.browser.url)
    browser_auth, pages, show_logins = _create_pages(service)
    metrics = service.metrics
    with_token = [Middleware(ConsoleGuard, counted(service, OTHERS), config.browser)]
    csrf_guard = [Middleware(CsrfMiddleware, config.server.cors_origins, hosts, allow_safe_methods=True)]
    leasing = PoolRoutes(service.pools).routes(with_token)
    others = [
        *AccountRoutes(tokens, service.named_tokens).routes(with_token),
        *StatusRoutes(service).routes(with_token),
        *EventRoutes(service.events).routes(with_token),
        *ThrottleRoutes(service.throttle, service.users, service.node).routes(with_token),
        *TokenRoutes(tokens, hosts, metrics.validations(TOKEN)).routes(with_token),
        Route(FORWARD_AUTH, ForwardAuth(tokens, metrics.validations(FORWARD_AUTH), browser_auth)),
        *HomeRoutes(config, show_logins).routes(),
        *pages,
        *OAuthRoutes(tokens, service.credentials, config.oauth.issuer, counted(service, INTROSPECTION)).routes(
            csrf_guard
        ),
        *HealthRoutes(service.ready, service.audit, service.node).routes(),
        *ConsoleRoutes().routes(),
        *javascript_routes(),
        *(DocsRoutes(partial(_describe_api, config)).routes() if config.server.docs else []),
    ]
    dialects = dialect_routes(service, hosts)
    refuse_collisions({"tokenauth itself": [*leasing, *others], **dialects})
    return [*leasing, *chain.from_iterable(dialects.values()), *others]


def _describe_api(config: Settings) -> Document:
    from tokenauth.web.api_documentation import describe  # only when it is asked for: a start takes 2 % longer with it

    return describe(config)


def _create_pages(service: Service) -> tuple[BrowserAuth | None, Sequence[Route], Handler | None]:
    """Create what browsers need, if there is a login page: the rules of /auth, the pages, and the one at /."""
    config = service.settings
    if not config.browser.url:
        return None, (), None
    cookies, return_to = Cookies(config.browser), ReturnTo(config.browser)
    login = LoginRoutes(config, service.tokens, cookies, return_to)
    return BrowserAuth(config.browser, cookies, return_to), login.routes(), login.show_logins


@asynccontextmanager
async def _lifespan(
    service: Service, at_once: Mapping[str, tuple[Route, AtOnce]], app: None
) -> AsyncIterator[Mapping[str, object]]:
    """Run the service and its sweeper. The state has what the HTTP server must know, and what is logged once."""
    with auditing(service.audit):
        async with _serving(service) as state:
            yield {**state, AT_ONCE: at_once}
    log.info("stopped")


@asynccontextmanager
async def _serving(service: Service) -> AsyncIterator[Mapping[str, object]]:
    async with service.running():
        await service.pools.prefill()
        sweeper = Sweeper(service.store, service.pools, service.clock, service.settings.throttle.forget)
        sweeping = asyncio.create_task(sweeper.run())
        if gc.isenabled():
            gc.collect()
        gc.freeze()  # objects that live until the end need not be collected again and again
        gc.set_threshold(GC_THRESHOLD)
        gc.enable()  # a worker starts without it, and leaves next to nothing to collect
        log.info("started", version=build(), users=len(service.settings.users_by_name))
        try:
            origins = frozenset(service.settings.server.cors_origins)
            yield {
                REFUSAL_RULES: RefusalRules(origins, frozenset({FORWARD_AUTH})),
                LOGGED_ONCE: set[str](),
                DURATIONS: service.metrics.durations,
            }
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
