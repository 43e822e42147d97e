"""The caller's own account and tokens: /api/me and /api/tokens. All require a token."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth.errors import InvalidRequest, LoginNeeded
from tokenauth.models import ADMIN, SCOPE_PATTERN, START_OF_TOKENS, IssuedToken, Token, TokenCursor, TokenKind
from tokenauth.named_tokens import MAX_TOKEN_NAME, NamedTokens, Requester
from tokenauth.settings.durations import Duration
from tokenauth.settings.model import canonical
from tokenauth.tokens import LIST_LIMIT, Tokens
from tokenauth.web.openapi import schema_only
from tokenauth.web.requests import Request, match_cursor
from tokenauth.web.responses import NO_CONTENT, JSONResponse
from tokenauth.web.routing import Route, strict

EVERYONE = "*"
"""What `?user=` says for the tokens of all users."""

PAGE = 100
"""Tokens on a page, unless `?limit=` is given."""

_PAGING = ("search", "limit", "after")
_CURSOR = re.compile(r"(\d{1,18})-([0-9a-f]{24})", re.ASCII)

_KINDS: Mapping[str, TokenKind | None] = {"login": "login", "named": "named", "all": None}
"""What `?kind=` chooses; None is all."""

DURATION = 'Such as "24h" or "90d", or a number of seconds.'


class MeAnswer(msgspec.Struct):
    username: str
    scopes: tuple[str, ...]
    kind: TokenKind
    name: str | None
    id: str
    issued_at: int
    expiry_time: int


class ListedTokenAnswer(msgspec.Struct):
    id: str
    user: str
    kind: TokenKind
    name: str | None
    scopes: tuple[str, ...] | None
    issued_at: int
    expiry_time: int
    last_used_at: int | None
    address: str
    user_agent: str
    current: bool


class ListedTokensAnswer(msgspec.Struct, omit_defaults=True):
    """Tokens. Only pages of those of all users have `next`."""

    tokens: list[ListedTokenAnswer]
    next: str | msgspec.UnsetType | None = msgspec.UNSET


class IssueNamedRequest(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, schema_only(minLength=1, maxLength=MAX_TOKEN_NAME, description="Printable.")]
    scopes: tuple[Annotated[str, schema_only(pattern=f"^{SCOPE_PATTERN}$")], ...] | None = None
    ttl: Annotated[Duration, schema_only(description=DURATION)] | None = None


class RotateRequest(msgspec.Struct, forbid_unknown_fields=True):
    overlap: Annotated[Duration, schema_only(description=DURATION)] = 0


class NamedTokenAnswer(msgspec.Struct):
    token: str
    id: str
    name: str
    scopes: tuple[str, ...] | None
    expiry_time: int


class RevokedAnswer(msgspec.Struct):
    revoked: int


_issue_decoder = msgspec.json.Decoder(IssueNamedRequest)
_rotate_decoder = msgspec.json.Decoder(RotateRequest)


class AccountRoutes:
    def __init__(self, tokens: Tokens, named_tokens: NamedTokens) -> None:
        self._tokens = tokens
        self._named_tokens = named_tokens

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        tokens = {
            "GET": strict(self.list, ["kind", "user", *_PAGING]),
            "POST": strict(self.issue, body=True),
            "DELETE": strict(self.revoke_all, ["keep", "kind", "user"]),
        }
        return [
            Route("/api/me", {"GET": strict(self.me)}, middleware),
            Route("/api/tokens", tokens, middleware),
            Route("/api/tokens/{id}", {"DELETE": strict(self.revoke, ["user"])}, middleware),
            Route("/api/tokens/{id}/rotate", {"POST": strict(self.rotate, body=True)}, middleware),
        ]

    async def me(self, request: Request) -> Response:
        user, token = request.user, request.token
        issued_at, expires_at = int(token.issued_at), token.expires_at
        me = MeAnswer(user.username, user.scopes, token.kind, token.name, token.id, issued_at, expires_at)
        return JSONResponse(me)

    async def list(self, request: Request) -> Response:
        if request.query_value("user") == EVERYONE:
            return await self._search(request)
        for name in _PAGING:
            if request.query_value(name) is not None:
                raise InvalidRequest(f"{name}: goes with ?user={EVERYONE} only.")
        listed = await self._tokens.list_live(_username(request), _kind(request, "all"))
        return JSONResponse(ListedTokensAnswer([_token_answer(token, request.token) for token in listed]))

    async def _search(self, request: Request) -> Response:
        request.user.require_scope(ADMIN)
        text, after = request.query_value("search") or "", request.query_value("after") or ""
        limit = request.query_number("limit", PAGE, 1, LIST_LIMIT)
        found, following = await self._tokens.search(text, _kind(request, "all"), _parse_cursor(after), limit)
        shown = [_token_answer(token, request.token) for token in found]
        return JSONResponse(ListedTokensAnswer(shown, following and f"{following[0]}-{following[1].hex()}"))

    async def issue(self, request: Request) -> Response:
        _check_unlimited(request.token)
        body = await request.json_body(_issue_decoder)
        issued = await self._named_tokens.issue(
            request.user.username, body.name, body.scopes, body.ttl, _requester(request)
        )
        return JSONResponse(_issued_answer(issued), 201)

    async def rotate(self, request: Request) -> Response:
        _check_unlimited(request.token)
        body = await request.json_body(_rotate_decoder, RotateRequest())
        issued = await self._named_tokens.rotate(
            request.path_params["id"], request.user.username, body.overlap, _requester(request)
        )
        return JSONResponse(_issued_answer(issued), 201)

    async def revoke_all(self, request: Request) -> Response:
        keep, kind = request.query_value("keep"), _kind(request, "login")
        if keep not in {None, "current"}:
            raise InvalidRequest('keep: must be "current".')
        if request.query_value("user") == EVERYONE:
            raise InvalidRequest("user: must be the name of one user.")
        kept = request.token if keep else None
        revoked = await self._tokens.revoke_all(_username(request), kept, kind)
        return JSONResponse(RevokedAnswer(revoked))

    async def revoke(self, request: Request) -> Response:
        username: str | None = _username(request)
        if request.query_value("user") == EVERYONE:
            request.user.require_scope(ADMIN)  # a user may have that name
            username = None
        await self._tokens.revoke_id(request.path_params["id"], username)
        return NO_CONTENT


def _check_unlimited(token: Token) -> None:
    """Raise LoginNeeded for a named or narrowed token: nobody may get one from it that can do more or lives longer."""
    if token.kind != "login" or token.scopes is not None:
        raise LoginNeeded


def _requester(request: Request) -> Requester:
    return Requester(request.client_address, request.user_agent, request.disconnect_check, request.token.digest)


def _kind(request: Request, default: str) -> TokenKind | None:
    """Return the kind of tokens that `?kind=` chooses; None is all."""
    kind = request.query_value("kind")
    if kind is None:
        kind = default
    if kind not in _KINDS:
        raise InvalidRequest('kind: must be "login", "named" or "all".')
    return _KINDS[kind]


def _parse_cursor(after: str) -> TokenCursor:
    """Parse where a page begins. Raises InvalidRequest."""
    if not after:
        return START_OF_TOKENS
    place = match_cursor(_CURSOR, after)
    return int(place[1]), bytes.fromhex(place[2])


def _username(request: Request) -> str:
    """Return the user that is asked about: `?user=`, for admins only, or the caller."""
    named = request.query_value("user")
    if named is None or canonical(named) == request.user.username:
        return request.user.username
    request.user.require_scope(ADMIN)
    if "\0" in named:
        raise InvalidRequest("user: has a NUL character.")
    return canonical(named)


def _issued_answer(issued: IssuedToken) -> NamedTokenAnswer:
    token = issued.token
    assert token.name is not None
    return NamedTokenAnswer(issued.value, token.id, token.name, token.scopes, token.expires_at)


def _token_answer(token: Token, current: Token) -> ListedTokenAnswer:
    return ListedTokenAnswer(
        id=token.id,
        user=token.username,
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
