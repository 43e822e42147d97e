"""The table of addresses: which handler answers which method of which path."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import ConfigError, MethodNotAllowed, NotFound, Refusal

Handlers = Mapping[str, ASGIApp]
"""The methods that an address takes, and what answers each of them."""

_ITSELF = "tokenauth itself"
_PARAMETER = re.compile(r"\{(\w+)\}")


class Methods:
    """ASGI app that has each method answered by its handler; what answers GET answers HEAD.

    Where GET does what POST does it has an effect, which HEAD must not have (RFC 9110 section 9.2.1): it is refused.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._handlers: dict[str, ASGIApp] = {}
        for method, handler in handlers.items():
            self._handlers[method] = handler
            if method == "GET" and handlers.get("POST") != handler:
                self._handlers["HEAD"] = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises MethodNotAllowed."""
        handler = self._handlers.get(scope["method"])
        if handler is None:
            raise MethodNotAllowed(tuple(self._handlers))
        await handler(scope, receive, send)


class Guard(NamedTuple):
    """What wraps an ASGI app so that not everybody reaches it, and what it refuses."""

    wrap: Callable[[ASGIApp], ASGIApp]
    refuses: tuple[type[Refusal], ...]
    asks_token: bool = True


class Route(NamedTuple):
    """An address, as a template with `{parameters}`, what answers there, and whose it is."""

    template: str
    endpoint: ASGIApp
    owner: str
    handlers: Handlers
    guard: Guard | None


class Routes:
    """Finds the route of a path in about a microsecond: with a dict, or with one regular expression for all the others.

    No path has two routes, so their order does not matter.
    """

    def __init__(self) -> None:
        self._all: list[Route] = []
        self._exact: dict[str, Route] = {}
        self._others: dict[int, tuple[Route, list[str]]] = {}  # by the number of the last group that matched
        self._pattern = re.compile(r"(?!)")

    def add(
        self, routes: Mapping[str, Handlers], guard: Guard | None = None, owner: str = _ITSELF, prefix: str = ""
    ) -> None:
        """Add addresses, behind a guard or not. Raises ConfigError when a path would have two routes."""
        for path, handlers in routes.items():
            methods = Methods(handlers)
            endpoint = methods if guard is None else guard.wrap(methods)
            route = Route(prefix + path, endpoint, owner, handlers, guard)
            for other in self._all:
                if _meet(route.template, other.template):
                    raise ConfigError(
                        f"{owner} and {other.owner}: both answer {route.template}; give them other prefixes"
                    )
            self._all.append(route)
        self._exact = {route.template: route for route in self._all if "{" not in route.template}
        self._others.clear()
        patterns, groups = [], 0
        for route in self._all:
            names = _PARAMETER.findall(route.template)
            if names:
                groups += len(names)
                self._others[groups] = route, names
                literals = map(re.escape, _PARAMETER.split(route.template)[::2])
                patterns.append("([^/]+)".join(literals))
        self._pattern = re.compile("|".join(patterns) or r"(?!)")

    def __iter__(self) -> Iterator[Route]:
        """Go through all routes, in the order in which they were added."""
        return iter(self._all)

    def find(self, path: str) -> tuple[Route, dict[str, str]] | None:
        """Return the route of a path, and the values of its parameters."""
        route = self._exact.get(path)
        if route is not None:
            return route, {}
        match = self._pattern.fullmatch(path)
        if match is None or match.lastindex is None:
            return None
        route, names = self._others[match.lastindex]
        values = match.groups()[match.lastindex - len(names) : match.lastindex]
        return route, dict(zip(names, values, strict=True))


def _meet(one: str, other: str) -> bool:
    """Whether some path matches both templates."""
    segments = list(zip(one.split("/"), other.split("/"), strict=False))
    if one.count("/") != other.count("/"):
        return False
    return all(left == right or (left and right and "{" in left + right) for left, right in segments)


async def nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    """Raise NotFound."""
    raise NotFound
