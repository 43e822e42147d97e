"""TokenMiddleware: lets through whoever sends a valid token, in this app and in anybody's ASGI app."""

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import InvalidToken, TokenRequired
from tokenauth.routes.requests import bearer
from tokenauth.tokens import Tokens


class TokenMiddleware:
    """Reads X-Token or Authorization: Bearer, and puts the token and its user into the scope.

    The guarded app finds them as `scope["token"]` and `scope["user"]`. Raises TokenRequired, InvalidToken,
    InvalidRequest or StoreUnavailable in place of calling it.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request."""
        value = bearer(scope)
        if value is None:
            raise TokenRequired
        token = await self._tokens.validate(value)
        if token is None:
            raise InvalidToken
        scope["token"] = token
        scope["user"] = self._tokens.owner(token)
        await self._app(scope, receive, send)
