"""The caller's own account and tokens: /api/me and /api/tokens. All require a token."""

from collections.abc import Sequence

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth.errors import InsufficientScope, InvalidRequest
from tokenauth.models import Kind, Token
from tokenauth.settings.model import canonical
from tokenauth.tokens import Tokens
from tokenauth.web.requests import Request
from tokenauth.web.responses import NO_CONTENT, JSONResponse
from tokenauth.web.routing import Route, strict

ME = "/api/me"

ADMIN = "admin"
"""The scope that may act for other users."""


class MeAnswer(msgspec.Struct):
    username: str
    scopes: tuple[str, ...]
    kind: Kind
    name: str | None
    id: str
    issued_at: int
    expiry_time: int


class ListedTokenAnswer(msgspec.Struct):
    id: str
    kind: Kind
    name: str | None
    scopes: tuple[str, ...] | None
    issued_at: int
    expiry_time: int
    last_used_at: int | None
    address: str
    user_agent: str
    current: bool


class ListedTokensAnswer(msgspec.Struct):
    tokens: list[ListedTokenAnswer]


class RevokedAnswer(msgspec.Struct):
    revoked: int


class AccountRoutes:
    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        tokens = {"GET": strict(self.list, ["user"]), "DELETE": strict(self.revoke_all, ["keep", "user"])}
        return [
            Route(ME, {"GET": strict(self.me)}, middleware),
            Route("/api/tokens", tokens, middleware),
            Route("/api/tokens/{id}", {"DELETE": strict(self.revoke, ["user"])}, middleware),
        ]

    async def me(self, request: Request) -> Response:
        user, token = request.user, request.token
        issued_at, expires_at = int(token.issued_at), token.expires_at
        me = MeAnswer(user.username, user.scopes, token.kind, token.name, token.id, issued_at, expires_at)
        return JSONResponse(me)

    async def list(self, request: Request) -> Response:
        listed = await self._tokens.list_live(_username(request))
        return JSONResponse(ListedTokensAnswer([_show(token, request.token) for token in listed]))

    async def revoke_all(self, request: Request) -> Response:
        keep = request.query_value("keep")
        if keep not in {None, "current"}:
            raise InvalidRequest('keep: must be "current".')
        revoked = await self._tokens.revoke_all(_username(request), request.token if keep else None)
        return JSONResponse(RevokedAnswer(revoked))

    async def revoke(self, request: Request) -> Response:
        await self._tokens.revoke_id(request.path_params["id"], _username(request))
        return NO_CONTENT


def _username(request: Request) -> str:
    """Return the user that is asked about: `?user=`, for admins only, or the caller."""
    named = request.query_value("user")
    if named is None or canonical(named) == request.user.username:
        return request.user.username
    if ADMIN not in request.user.scopes:
        raise InsufficientScope(ADMIN)
    if "\0" in named:
        raise InvalidRequest("user: has a NUL character.")
    return canonical(named)


def _show(token: Token, current: Token) -> ListedTokenAnswer:
    return ListedTokenAnswer(
        id=token.id,
        kind=token.kind,
        name=token.name,
        scopes=token.scopes,
        issued_at=int(token.issued_at),
        expiry_time=token.expires_at,
        last_used_at=None if token.last_used_at is None else int(token.last_used_at),
        address=token.address,
        user_agent=token.user_agent,
        current=token.digest == current.digest,
    )
