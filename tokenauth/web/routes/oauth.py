"""OAuth 2.0: tokens for clients, introspection, revocation, metadata (RFC 6749 section 4.4, 7662, 7009, 8414).

The clients are the users of the configuration; so `client_id` is a user name, and `client_secret` a password.
"""

from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.credentials import Candidate, Credentials
from tokenauth.errors import (
    BodyTooLarge,
    InsufficientScope,
    InvalidClient,
    InvalidCredentials,
    InvalidRequest,
    InvalidScope,
    InvalidToken,
    NotFound,
    Overloaded,
    StoreUnavailable,
    TooManyAttempts,
    UnsupportedGrantType,
)
from tokenauth.models import Identity, User
from tokenauth.passwords import MAX_LENGTH
from tokenauth.settings.model import MAX_NAME
from tokenauth.tokens import Tokens
from tokenauth.web import percent, requests
from tokenauth.web.operations import NO_NUL, Answer, Refusals, operation, said
from tokenauth.web.responses import JSON, answer, answer_json
from tokenauth.web.routing import Handlers

INTROSPECT = "introspect"
"""The scope that may ask about the tokens of others."""

METADATA = "/.well-known/oauth-authorization-server"

_INACTIVE = b'{"active":false}'
_BEARER = "Bearer"
_METHODS = ("client_secret_basic", "client_secret_post")

Form = dict[str, str]


class Granted(msgspec.Struct):
    """A token for a client (RFC 6749 section 5.1); `scope` is what it may do, which may be more than it asked for."""

    access_token: str
    expires_in: int
    scope: str
    token_type: str = _BEARER


class Introspection(msgspec.Struct):
    """A token that is valid (RFC 7662 section 2.2); of any other, nothing but `"active": false` is said."""

    sub: str
    username: str
    client_id: str
    scope: str
    iat: int
    exp: int
    jti: str
    active: Literal[True] = True
    token_type: str = _BEARER


class Inactive(msgspec.Struct):
    """All that is said of a token that is not valid, whatever is wrong with it."""

    active: Literal[False] = False


class ClientForm(msgspec.Struct):
    """Who the client is, unless it says so by HTTP Basic."""

    client_id: Annotated[str, said(maxLength=MAX_NAME, pattern=NO_NUL)] | msgspec.UnsetType = msgspec.UNSET
    client_secret: Annotated[str, said(maxLength=MAX_LENGTH, pattern=NO_NUL)] | msgspec.UnsetType = msgspec.UNSET


class TokenForm(ClientForm, kw_only=True):
    """What sort of token the client wants, and for which scopes."""

    grant_type: Literal["client_credentials"]
    scope: str | msgspec.UnsetType = msgspec.UNSET


class AboutForm(ClientForm, kw_only=True):
    """Which token is meant; what sort it is need not be said."""

    token: Annotated[str, said(minLength=1)]
    token_type_hint: str | msgspec.UnsetType = msgspec.UNSET


_FORM: Refusals = (InvalidRequest, BodyTooLarge)
_CLIENT: Refusals = (*_FORM, InvalidClient, TooManyAttempts, Overloaded, StoreUnavailable)
_BY_FORM = ("", "Basic")


class Metadata(msgspec.Struct):
    """Where what is, and how (RFC 8414 section 2)."""

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
    """The handlers, and the addresses that they answer at."""

    def __init__(self, tokens: Tokens, credentials: Credentials, issuer: str) -> None:
        self._tokens = tokens
        self._credentials = credentials
        self._issuer = issuer

    def routes(self) -> dict[str, Handlers]:
        """List the addresses; the metadata of an issuer with a path stand at two (RFC 8414 section 3.1)."""
        metadata = {"GET": self.metadata}
        return {
            "/oauth/token": {"POST": self.token},
            "/oauth/introspect": {"POST": self.introspect},
            "/oauth/revoke": {"POST": self.revoke},
            METADATA: metadata,
            METADATA + unquote(urlsplit(self._issuer).path): metadata,
        }

    @operation(
        Answer(200, Granted), form=TokenForm, refuses=(*_CLIENT, InvalidScope, UnsupportedGrantType), schemes=_BY_FORM
    )
    async def token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Issue a token to a client."""
        form = await requests.form_body(scope, receive)
        wanted = _field(form, "grant_type")
        user = await self._client(scope, form)
        if wanted != "client_credentials":
            raise UnsupportedGrantType
        if not set(form.get("scope", "").split(" ")) <= {*user.scopes, ""}:
            raise InvalidScope
        address, agent = requests.client_address(scope), requests.user_agent(scope)
        issued = await self._tokens.grant(user, address, agent, requests.gone(scope))
        lifetime = issued.token.expires_at - int(issued.token.issued_at)
        granted = Granted(issued.value, lifetime, " ".join(user.scopes))
        await answer(send, 200, msgspec.json.encode(granted), JSON, (b"pragma", b"no-cache"))

    @operation(
        Answer(200, (Introspection, Inactive), "What is to be said of the token."),
        form=AboutForm,
        refuses=(*_CLIENT, InvalidToken, InsufficientScope),
        schemes=(*_BY_FORM, "X-Token", "Bearer"),
    )
    async def introspect(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say whether a token is valid, and whose it is."""
        form = await requests.form_body(scope, receive)
        caller = await self._caller(scope, form)
        scope["user"] = caller  # who is named in the log if it is refused
        if INTROSPECT not in caller.scopes:
            raise InsufficientScope(INTROSPECT)
        login = await self._tokens.identify(_field(form, "token").encode())
        if login is None:
            await answer(send, 200, _INACTIVE, JSON)
            return
        user, token = login
        name, scopes = user.username, " ".join(user.scopes)
        found = Introspection(name, name, name, scopes, int(token.issued_at), token.expires_at, token.id)
        await answer_json(send, found)

    @operation(Answer(200), form=AboutForm, refuses=_CLIENT, schemes=_BY_FORM)
    async def revoke(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End a token; the answer is the same for one that is not valid (RFC 7009 section 2.2)."""
        form = await requests.form_body(scope, receive)
        await self._client(scope, form)
        await self._tokens.revoke(_field(form, "token").encode())
        await answer(send, 200, b"")

    @operation(Answer(200, Metadata), refuses=(NotFound,))
    async def metadata(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return the authorization server metadata (RFC 8414)."""
        at = self._issuer
        if not at:
            raise NotFound("The metadata need to know the public URL of this service: set oauth.issuer.")
        found = Metadata(at, f"{at}/oauth/token", f"{at}/oauth/introspect", f"{at}/oauth/revoke")
        await answer_json(send, found)

    async def _caller(self, scope: Scope, form: Form) -> Identity:
        """Return who asks: whose token was sent, or else which client."""
        value = requests.bearer(scope)
        if value is None:
            return (await self._client(scope, form)).identity
        if "client_secret" in form or requests.basic(scope) is not None:
            raise InvalidRequest("Authenticate in one way: by HTTP Basic, in the form, or with a token.")
        login = await self._tokens.identify(value)
        if login is None:
            raise InvalidToken
        return login.user

    async def _client(self, scope: Scope, form: Form) -> User:
        """Return the client that has authenticated. Raises InvalidClient, InvalidRequest or a RetryLater."""
        try:
            address, gone = requests.client_address(scope), requests.gone(scope)
            return await self._credentials.verify_cached(_claimed(scope, form), address, gone)
        except InvalidCredentials:
            raise InvalidClient from None


def _claimed(scope: Scope, form: Form) -> Sequence[Candidate]:
    """Read who a client says it is (RFC 6749 section 2.3.1). Raises InvalidClient or InvalidRequest.

    In HTTP Basic both parts should be percent-encoded, which many clients do not do: so there are two readings.
    """
    sent = requests.basic(scope)
    if sent is None:
        if "client_id" not in form or "client_secret" not in form:
            raise InvalidClient
        return [Candidate(form["client_id"], form["client_secret"])]
    if "client_secret" in form:
        raise InvalidRequest("Authenticate in one way: by HTTP Basic, or in the form.")
    name, _, secret = _decode(sent).partition(":")
    readings = list(dict.fromkeys((Candidate(_unescaped(name), _unescaped(secret)), Candidate(name, secret))))
    if "client_id" in form and all(form["client_id"] != reading.username for reading in readings):
        raise InvalidRequest("client_id: is not the one of Authorization: Basic.")
    return readings


def _decode(sent: bytes) -> str:
    try:
        return sent.decode()
    except UnicodeDecodeError:
        return sent.decode("latin-1")  # as some clients write it


def _unescaped(text: str) -> str:
    return percent.decode_form(text.encode()).decode(errors="replace")


def _field(form: Form, name: str) -> str:
    if name not in form:
        raise InvalidRequest(f"{name}: is missing.")
    return form[name]
