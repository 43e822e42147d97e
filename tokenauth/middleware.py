"""TokenMiddleware: lets through whoever sends a valid token, in this app and in anybody's ASGI app."""

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import InvalidToken, TokenRequired
from tokenauth.models import Token
from tokenauth.routes.refusals import refuse
from tokenauth.routes.requests import bearer
from tokenauth.tokens import Tokens


class TokenMiddleware:
    """Reads X-Token or Authorization: Bearer, and puts the token and its user into the scope.

    The guarded app finds them as `scope["token"]` and `scope["user"]`. Whoever sends no valid token is answered
    400, 401 or 503 in place of it, a websocket is closed; whatever goes wrong here, the app is not reached.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request."""
        if scope["type"] != "lifespan":
            try:
                token = await self._token(scope)
            except Exception as error:
                if scope["type"] == "http":
                    await refuse(send, error)
                else:
                    await send({"type": "websocket.close", "code": 1008})
                return
            scope["token"] = token
            scope["user"] = self._tokens.owner(token)
        await self._app(scope, receive, send)

    async def _token(self, scope: Scope) -> Token:
        value = bearer(scope)
        if value is None:
            raise TokenRequired
        token = await self._tokens.validate(value)
        if token is None:
            raise InvalidToken
        return token
