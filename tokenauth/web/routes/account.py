"""My logins: who am I, where am I logged in, end one, end all. All behind TokenMiddleware."""

from typing import Annotated, Literal

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import InsufficientScope, InvalidRequest, NotFound
from tokenauth.models import Identity, Token
from tokenauth.settings.model import canonical
from tokenauth.tokens import Tokens
from tokenauth.web import requests
from tokenauth.web.operations import NO_NUL, Answer, operation, said
from tokenauth.web.responses import answer, answer_json
from tokenauth.web.routing import Handlers

ADMIN = "admin"
"""The scope that may act for other users."""


_USER = {"user": Annotated[str, said(pattern=NO_NUL)]}
_KEEP = {"keep": Literal["current"]}


class Me(msgspec.Struct):
    """Whose token this is; `id` names it and proves nothing. Times are Unix seconds."""

    username: str
    scopes: tuple[str, ...]
    id: str
    issued_at: int
    expiry_time: int


class Login(msgspec.Struct):
    """A live token: since when, until when, and who asked for it."""

    id: str
    issued_at: int
    expiry_time: int
    address: str
    user_agent: str
    current: bool


class Logins(msgspec.Struct):
    """Live tokens, newest first."""

    tokens: list[Login]


class Revoked(msgspec.Struct):
    """How many tokens have ended."""

    revoked: int


class AccountRoutes:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def routes(self) -> dict[str, Handlers]:
        """List the addresses."""
        return {
            "/api/me": {"GET": self.me},
            "/api/tokens": {"GET": self.list, "DELETE": self.end_all},
            "/api/tokens/{id}": {"DELETE": self.end},
        }

    @operation(Answer(200, Me))
    async def me(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say whose token this is."""
        user: Identity = scope["user"]
        token: Token = scope["token"]
        await answer_json(send, Me(user.username, user.scopes, token.id, int(token.issued_at), token.expires_at))

    @operation(Answer(200, Logins), refuses=(InsufficientScope,), query=_USER)
    async def list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """List the tokens of a user."""
        listed = await self._tokens.live(_whose(scope))
        await answer_json(send, Logins([_show(token, scope["token"]) for token in listed]))

    @operation(Answer(200, Revoked), refuses=(InsufficientScope,), query=_KEEP | _USER)
    async def end_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End all tokens of a user, or with `?keep=current` all but this one."""
        keep = requests.query_value(scope, "keep")
        if keep not in {None, "current"}:
            raise InvalidRequest("keep: may only be 'current'.")
        revoked = await self._tokens.revoke_all(_whose(scope), scope["token"] if keep else None)
        await answer_json(send, Revoked(revoked))

    @operation(Answer(204), refuses=(InsufficientScope, NotFound), query=_USER)
    async def end(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End one token."""
        await self._tokens.revoke_id(scope["path_params"]["id"], _whose(scope))
        await answer(send, 204, b"")


def _whose(scope: Scope) -> str:
    """Return the user whose tokens are meant: oneself, or for an admin whoever `?user=` names."""
    user: Identity = scope["user"]
    named = requests.query_value(scope, "user")
    if named is None or canonical(named) == user.username:
        return user.username
    if ADMIN not in user.scopes:
        raise InsufficientScope(ADMIN)
    if "\0" in named:
        raise InvalidRequest("user: has a NUL character.")
    return canonical(named)


def _show(token: Token, current: Token) -> Login:
    return Login(
        id=token.id,
        issued_at=int(token.issued_at),
        expiry_time=token.expires_at,
        address=token.address,
        user_agent=token.user_agent,
        current=token.digest == current.digest,
    )
