"""OAuth 2.0: tokens for clients, introspection, revocation, metadata (RFC 6749 section 4.4, 7662, 7009, 8414).

The clients are the users of the configuration; so `client_id` is a user name, and `client_secret` a password.
"""

from collections.abc import Sequence
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth.credentials import Candidate, Credentials
from tokenauth.errors import InvalidCredentials, InvalidRequest, InvalidToken
from tokenauth.models import Identity, User
from tokenauth.tokens import Tokens
from tokenauth.web import urlencoding
from tokenauth.web.exceptions import InvalidClient, InvalidScope, NotFound, UnsupportedGrantType
from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse, NoStoreResponse
from tokenauth.web.routing import Route
from tokenauth.web.validation_counting import CountingValidator

INTROSPECT = "introspect"
"""The scope that may ask about the tokens of others."""

INTROSPECTION = "/oauth/introspect"

METADATA = "/.well-known/oauth-authorization-server"

_BEARER = "Bearer"
_METHODS = ("client_secret_basic", "client_secret_post")

Form = dict[str, str]


class GrantAnswer(msgspec.Struct):
    access_token: str
    expires_in: int
    scope: str
    token_type: str = _BEARER


class ActiveAnswer(msgspec.Struct):
    sub: str
    username: str
    client_id: str
    scope: str
    iat: int
    exp: int
    jti: str
    active: Literal[True] = True
    token_type: str = _BEARER


class InactiveAnswer(msgspec.Struct):
    active: Literal[False] = False


class MetadataAnswer(msgspec.Struct):
    issuer: str
    token_endpoint: str
    introspection_endpoint: str
    revocation_endpoint: str
    grant_types_supported: tuple[str, ...] = ("client_credentials",)
    response_types_supported: tuple[str, ...] = ("none",)  # there must be one, and there is no authorization endpoint
    token_endpoint_auth_methods_supported: tuple[str, ...] = _METHODS
    introspection_endpoint_auth_methods_supported: tuple[str, ...] = _METHODS
    revocation_endpoint_auth_methods_supported: tuple[str, ...] = _METHODS


class OAuthRoutes:
    def __init__(
        self, tokens: Tokens, credentials: Credentials, issuer: str, introspected: CountingValidator | Tokens
    ) -> None:
        self._tokens = tokens
        self._introspected = introspected
        self._credentials = credentials
        self._issuer = issuer

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        """List the routes. An issuer with a path has its metadata at two paths (RFC 8414 section 3.1)."""
        metadata = {METADATA, METADATA + unquote(urlsplit(self._issuer).path)}
        return [
            Route(INTROSPECTION, {"POST": self.introspect}, middleware),
            Route("/oauth/token", {"POST": self.token}, middleware),
            Route("/oauth/revoke", {"POST": self.revoke}, middleware),
            *(Route(path, {"GET": self.metadata}, middleware) for path in sorted(metadata)),
        ]

    async def token(self, request: Request) -> Response:
        form = await request.form_body()
        grant_type = _field(form, "grant_type")
        user = await self._client(request, form)
        if grant_type != "client_credentials":
            raise UnsupportedGrantType
        scopes = tuple(dict.fromkeys(filter(None, form.get("scope", "").split(" "))))
        lacking = [scope for scope in scopes if scope not in user.scopes]
        if lacking:
            raise InvalidScope(self._tokens.describe_scopes(lacking), " ".join(user.scopes))
        issued = await self._tokens.grant(
            user, request.client_address, request.user_agent, request.disconnect_check, scopes or None
        )
        lifetime = issued.token.expires_at - int(issued.token.issued_at)
        granted = GrantAnswer(issued.value, lifetime, " ".join(self._tokens.owner(issued.token).scopes))
        return JSONResponse(granted, headers=[(b"pragma", b"no-cache")])

    async def introspect(self, request: Request) -> Response:
        form = await request.form_body()
        caller = await self._caller(request, form)
        request.scope["user"] = caller  # the log names the user if the scope is missing
        caller.require_scope(INTROSPECT)
        login = await self._introspected.identify(_field(form, "token").encode(), request.counts_as_use())
        if login is None:
            return JSONResponse(InactiveAnswer())
        user, token = login
        name, scopes = user.username, " ".join(user.scopes)
        return JSONResponse(ActiveAnswer(name, name, name, scopes, int(token.issued_at), token.expires_at, token.id))

    async def revoke(self, request: Request) -> Response:
        form = await request.form_body()
        request.scope["user"] = (await self._client(request, form)).identity  # for the audit log
        await self._tokens.revoke(_field(form, "token").encode())
        return NoStoreResponse()

    async def metadata(self, request: Request) -> Response:
        url = self._issuer
        if not url:
            raise NotFound("The metadata needs the public URL of this service: set oauth.issuer.")
        return JSONResponse(MetadataAnswer(url, f"{url}/oauth/token", f"{url}/oauth/introspect", f"{url}/oauth/revoke"))

    async def _caller(self, request: Request, form: Form) -> Identity:
        """Return the user whose token was sent, or else the client that authenticates."""
        value = request.bearer()
        if value is None:
            return (await self._client(request, form)).identity
        if "client_secret" in form or request.basic() is not None:
            raise InvalidRequest("Authenticate in one way: by HTTP Basic, in the form, or with a token.")
        login = await self._tokens.identify(value)
        if login is None:
            raise InvalidToken
        return login.user

    async def _client(self, request: Request, form: Form) -> User:
        """Return the client that authenticates. Raises InvalidClient, InvalidRequest or a RetryLater."""
        try:
            return await self._credentials.verify_cached(
                _claimed(request, form), request.client_address, request.disconnect_check
            )
        except InvalidCredentials:
            raise InvalidClient from None


def _claimed(request: Request, form: Form) -> Sequence[Candidate]:
    """Read the name and secret that a client sends (RFC 6749 section 2.3.1). Raises InvalidClient or InvalidRequest.

    In HTTP Basic both should be percent-encoded, and many clients do not encode them. So both decodings are candidates.
    """
    sent = request.basic()
    if sent is None:
        if "client_id" not in form or "client_secret" not in form:
            raise InvalidClient
        return [Candidate(form["client_id"], form["client_secret"])]
    if "client_secret" in form:
        raise InvalidRequest("Authenticate in one way: by HTTP Basic, or in the form.")
    name, _, secret = _decode(sent).partition(":")
    candidates = [Candidate(name, secret)]
    if urlencoding.PERCENT in sent or urlencoding.PLUS in sent:
        candidates = list(dict.fromkeys((Candidate(_unescaped(name), _unescaped(secret)), *candidates)))
    if "client_id" in form and all(form["client_id"] != candidate.username for candidate in candidates):
        raise InvalidRequest("client_id: is not the one of Authorization: Basic.")
    return candidates


def _decode(sent: bytes) -> str:
    try:
        return sent.decode()
    except UnicodeDecodeError:
        return sent.decode("latin-1")  # as some clients send it


def _unescaped(text: str) -> str:
    return urlencoding.unquote_plus(text.encode()).decode(errors="replace")


def _field(form: Form, name: str) -> str:
    if name not in form:
        raise InvalidRequest(f'Missing field "{name}".')
    return form[name]
