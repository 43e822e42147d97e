"""The dialects that are switched on: their routes and their documentation."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import InsufficientScope
from tokenauth.metrics import OTHERS
from tokenauth.pools import Pools
from tokenauth.service import Service
from tokenauth.settings.dialects import DialectSettings
from tokenauth.settings.model import Settings
from tokenauth.web.csrf import CsrfMiddleware, Hosts
from tokenauth.web.dialects import random_token_generator, simple_token_implement, token_management_service, token_pool
from tokenauth.web.exceptions import ForeignOrigin
from tokenauth.web.middleware import TokenMiddleware
from tokenauth.web.openapi import Section
from tokenauth.web.routing import Handlers, Route
from tokenauth.web.validation_counting import counted


class _Translator(Protocol):
    def handlers(self) -> Mapping[str, Handlers]: ...


class _Dialect(NamedTuple):
    create: Callable[[Service, DialectSettings], _Translator]
    documentation: Section


_DIALECTS: Mapping[str, _Dialect] = {
    dialect.documentation.name: dialect
    for dialect in (
        _Dialect(simple_token_implement.SimpleTokenImplement, simple_token_implement.DOCUMENTATION),
        _Dialect(token_pool.TokenPool, token_pool.DOCUMENTATION),
        _Dialect(random_token_generator.RandomTokenGenerator, random_token_generator.DOCUMENTATION),
        _Dialect(token_management_service.TokenManagementService, token_management_service.DOCUMENTATION),
    )
}


def dialect_routes(service: Service, hosts: Hosts) -> Mapping[str, list[Route]]:
    """Return the routes of each dialect that is switched on, by the name of its table in the configuration."""
    return {
        f"dialects.{name}": [
            Route(settings.prefix + path, methods, _middleware(service, hosts, settings))
            for path, methods in _DIALECTS[name].create(service, settings).handlers().items()
        ]
        for name, settings in service.settings.dialects.items()
    }


def dialect_sections(config: Settings) -> list[Section]:
    """Return the documentation of each dialect that is switched on."""
    sections = []
    for name, settings in config.dialects.items():
        section = _DIALECTS[name].documentation.below(settings.prefix)
        if settings.require_token:
            sections.append(section.guarded(InsufficientScope))
        else:
            sections.append(section.refusing(ForeignOrigin))
    return sections


def _middleware(service: Service, hosts: Hosts, settings: DialectSettings) -> Sequence[Middleware]:
    if settings.require_token:
        # No CsrfMiddleware: a page of another origin cannot send a token unless its origin is listed.
        return [
            Middleware(TokenMiddleware, counted(service, OTHERS)),
            Middleware(PoolGuard, service.pools, settings.pool),
        ]
    return [Middleware(CsrfMiddleware, service.settings.server.cors_origins, hosts)]


class PoolGuard:
    """ASGI middleware that refuses users who may not use a pool. TokenMiddleware goes before it."""

    def __init__(self, app: ASGIApp, pools: Pools, pool: str) -> None:
        self._app = app
        self._pools = pools
        self._pool = pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on. Raises UnknownPool or InsufficientScope."""
        self._pools.find(self._pool, scope["user"])
        await self._app(scope, receive, send)
