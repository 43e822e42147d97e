"""My logins: who am I, where am I logged in, end one, end all. All behind TokenMiddleware."""

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.config import canonical
from tokenauth.errors import InsufficientScope, InvalidRequest, MethodNotAllowed
from tokenauth.models import Token, User
from tokenauth.routes import requests
from tokenauth.routes.refusals import answer, answer_json
from tokenauth.tokens import Tokens

ADMIN = "admin"
"""The scope that may act for other users."""


class _Me(msgspec.Struct):
    username: str
    scopes: tuple[str, ...]
    expiry_time: int


class _Listed(msgspec.Struct):
    id: str
    issued_at: int
    expiry_time: int
    address: str
    user_agent: str
    current: bool


async def me(scope: Scope, receive: Receive, send: Send) -> None:
    """GET /api/me: say whose token this is."""
    if scope["method"] not in {"GET", "HEAD"}:
        raise MethodNotAllowed(("GET", "HEAD"))
    user: User = scope["user"]
    await answer_json(send, _Me(user.username, user.scopes, scope["token"].expires_at))


class TokensEndpoint:
    """ASGI app of /api/tokens: GET lists, DELETE ends all, or with `?keep=current` all but this one."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        current: Token = scope["token"]
        if scope["method"] in {"GET", "HEAD"}:
            listed = await self._tokens.live(_whose(scope))
            await answer_json(send, {"tokens": [_show(token, current) for token in listed]})
        elif scope["method"] == "DELETE":
            keep = requests.query_value(scope, "keep")
            if keep not in {None, "current"}:
                raise InvalidRequest("keep: may only be 'current'.")
            revoked = await self._tokens.revoke_all(_whose(scope), current if keep else None)
            await answer_json(send, {"revoked": revoked})
        else:
            raise MethodNotAllowed(("GET", "HEAD", "DELETE"))


class OneTokenEndpoint:
    """ASGI app of /api/tokens/{id}: DELETE ends that one."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["method"] != "DELETE":
            raise MethodNotAllowed(("DELETE",))
        await self._tokens.revoke_id(scope["path_params"]["id"], _whose(scope))
        await answer(send, 204, b"")


def _whose(scope: Scope) -> str:
    """Return the user whose tokens are meant: oneself, or for an admin whoever `?user=` names."""
    user: User = scope["user"]
    named = requests.query_value(scope, "user")
    if named is None or canonical(named) == user.username:
        return user.username
    if ADMIN not in user.scopes:
        raise InsufficientScope(ADMIN)
    return canonical(named)


def _show(token: Token, current: Token) -> _Listed:
    return _Listed(
        id=token.id,
        issued_at=int(token.issued_at),
        expiry_time=token.expires_at,
        address=token.address,
        user_agent=token.user_agent,
        current=token.digest == current.digest,
    )
