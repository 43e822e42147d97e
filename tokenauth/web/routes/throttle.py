"""/api/throttle: who is throttled after failed logins, and clearing that. For admins only."""

import math
from collections.abc import Container, Sequence
from typing import Literal

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth.addresses import is_address, read_range
from tokenauth.errors import InvalidRequest
from tokenauth.models import ADMIN
from tokenauth.settings.model import canonical
from tokenauth.status import Node
from tokenauth.throttle import Throttle
from tokenauth.web.exceptions import NotFound
from tokenauth.web.requests import Request
from tokenauth.web.responses import NO_CONTENT, JSONResponse
from tokenauth.web.routing import Route, strict


class ThrottledAnswer(msgspec.Struct):
    kind: Literal["user", "network", "unknown"]
    user: str | None
    address: str
    failures: int
    until: int


class ThrottleAnswer(msgspec.Struct):
    throttled: list[ThrottledAnswer]


class ThrottleRoutes:
    def __init__(self, throttle: Throttle, users: Container[str], node: Node) -> None:
        self._throttle = throttle
        self._users = users
        self._node = node

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        handlers = {"GET": strict(self.show), "DELETE": strict(self.clear, ["user", "address", "network"])}
        return [Route("/api/throttle", handlers, middleware)]

    async def show(self, request: Request) -> Response:
        request.user.require_scope(ADMIN)
        found = await self._throttle.check_throttled(await self._node.throttled(self._throttle.list_throttled))
        shown = [
            ThrottledAnswer(each.kind, each.user, each.address, each.failures, math.ceil(each.until)) for each in found
        ]
        return JSONResponse(ThrottleAnswer(shown))

    async def clear(self, request: Request) -> Response:
        request.user.require_scope(ADMIN)
        user, address, network = (request.query_value(name) for name in ("user", "address", "network"))
        by = request.user.username
        if network is not None and user is None and address is None:
            addresses = read_range(network)
            if addresses is None:
                raise InvalidRequest("network: must be a range of addresses of /24 or /16, or of IPv6 /64 or /48.")
            done = await self._throttle.clear_network(addresses, by)
        elif network is None and user is not None and address is not None:
            name = canonical(user)
            if not is_address(address):
                raise InvalidRequest("address: must be an IP address.")
            # A name that no user has may be a password: it is not looked for, and not logged.
            done = name in self._users and await self._throttle.clear_user(name, address, by)
        else:
            raise InvalidRequest("Send user and address, or network.")
        if not done:
            raise NotFound("No failed login is counted there.")
        return NO_CONTENT
