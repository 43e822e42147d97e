"""Named tokens: a user makes them for programs, each with its own scopes and lifetime, and rotates them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from unicodedata import normalize

from tokenauth import values
from tokenauth.addresses import network
from tokenauth.background import Background, finished
from tokenauth.clock import Clock
from tokenauth.errors import InsufficientScope, InvalidRequest, InvalidToken, UnknownToken
from tokenauth.login_queue import DisconnectCheck, never_disconnected
from tokenauth.logs import log
from tokenauth.models import IssuedToken, Token, User, is_scope, is_visible
from tokenauth.settings import durations
from tokenauth.settings.durations import Duration
from tokenauth.settings.fields import TEN_YEARS
from tokenauth.settings.model import TokenSettings
from tokenauth.stores.store import Store
from tokenauth.tokens import Tokens

MAX_TOKEN_NAME = 64
"""Characters in the name of a token."""


class Requester(NamedTuple):
    """Who asks for a token.

    login: digest of the login with which they ask; None for an operator.
    """

    address: str = ""
    user_agent: str = ""
    disconnected: DisconnectCheck = never_disconnected
    login: bytes | None = None


class NamedTokens:
    """The named tokens of the users in the configuration."""

    def __init__(
        self, settings: TokenSettings, users: Mapping[str, User], store: Store, tokens: Tokens, clock: Clock
    ) -> None:
        self._settings = settings
        self._users = users
        self._store = store
        self._tokens = tokens
        self._clock = clock
        self.background = Background()

    @finished
    async def issue(
        self, username: str, name: str, scopes: Sequence[str] | None, ttl: Duration | None, requester: Requester
    ) -> IssuedToken:
        """Return a new token of a user. `scopes` None: all that the user has at each use. `ttl` None: `named_ttl`.

        Raises InvalidRequest, InsufficientScope, NameTaken, TooManyTokens, InvalidToken if the user was removed or the
        login of the requester was revoked, ClientGone or StoreUnavailable.
        """
        user = self._user(username)
        name = normalize("NFC", name)
        _check_name(name)
        limit = None if scopes is None else self._checked_scopes(scopes, user)
        longest = self._settings.max_named_ttl
        seconds = self._settings.named_ttl if ttl is None else durations.checked("ttl", ttl, 1, longest)
        issued = self._new(user, name, limit, seconds, requester)
        refusal = await self._store.tokens.issue_named(
            issued.token, user.credentials, self._settings.named_per_user, issued.token.issued_at, requester.login
        )
        if refusal is not None:
            raise refusal
        log.info(
            "named_token_issued",
            user=user.username,
            id=issued.token.id,
            name=name,
            scopes=limit,
            expires_at=issued.token.expires_at,
            network=network(requester.address),
        )
        return issued

    @finished
    async def rotate(self, id: str, username: str | None, overlap: Duration, requester: Requester) -> IssuedToken:
        """Return a successor of the token with this public id, with the same name, scopes and lifetime.

        The token itself ends after `overlap`; 0 is at once. It cannot be rotated again. `username` None: it may be any
        user's.
        Raises InvalidRequest, UnknownToken, AlreadyRotated, TooManyTokens, InvalidToken as `issue` does, ClientGone or
        StoreUnavailable.
        """
        seconds = durations.checked("overlap", overlap, 0, TEN_YEARS)
        token = await self._store.tokens.find(id)
        if token is None or token.name is None or username not in {None, token.username} or not self._is_live(token):
            raise UnknownToken("There is no named token with this id.")
        user = self._user(token.username)
        length = token.expires_at - int(token.issued_at)
        issued = self._new(user, token.name, token.scopes, length, requester)
        now = issued.token.issued_at
        refusal = await self._store.tokens.rotate(
            token.digest, issued.token, user.credentials, int(now) + int(seconds), now, requester.login
        )
        if refusal is not None:
            raise refusal
        log.info(
            "named_token_rotated",
            user=user.username,
            id=token.id,
            new_id=issued.token.id,
            name=token.name,
            scopes=token.scopes,
            expires_at=issued.token.expires_at,
            overlap=int(seconds),
            network=network(requester.address),
        )
        return issued

    def _user(self, username: str) -> User:
        user = self._users.get(username)
        if user is None:
            raise InvalidToken
        return user

    def _checked_scopes(self, scopes: Sequence[str], user: User) -> tuple[str, ...]:
        """Return the scopes, each once. Raises InvalidRequest or InsufficientScope."""
        if not all(map(is_scope, scopes)):
            raise InvalidRequest("scopes: each must be a word of printable ASCII without quotes or backslashes.")
        lacking = [scope for scope in scopes if scope not in user.scopes]
        if lacking:
            shown = self._tokens.describe_scopes(lacking)
            noun, yours = "scopes" if " " in shown else "scope", " ".join(user.scopes) or "none"
            raise InsufficientScope(
                description=f"You do not have the {noun} {shown}. Yours are: {yours}.",
                logged=self._tokens.known_scopes(lacking),
            )
        return tuple(dict.fromkeys(scopes))

    def _new(
        self, user: User, name: str, scopes: tuple[str, ...] | None, ttl: float, requester: Requester
    ) -> IssuedToken:
        """Make a token. No way of making one exceeds `max_named_ttl`."""
        self._tokens.check_can_issue(requester.disconnected)
        now = self._clock()
        value = values.new_named_value()
        digest = values.digest(value.encode())
        assert digest is not None
        expires_at = int(now) + int(min(ttl, self._settings.max_named_ttl))
        return IssuedToken(
            value,
            Token.new(
                digest,
                user.username,
                user.named_credential,
                now,
                expires_at,
                requester.address,
                requester.user_agent,
                name=name,
                scopes=scopes,
            ),
        )

    def _is_live(self, token: Token) -> bool:
        return self._clock() < token.expires_at and self._tokens.accepts(token)


def _check_name(name: str) -> None:
    """Raise InvalidRequest unless this can be the name of a token."""
    if not 1 <= len(name) <= MAX_TOKEN_NAME or not is_visible(name) or name != name.strip():
        raise InvalidRequest(f"name: must have 1 to {MAX_TOKEN_NAME} visible characters, with no blank at either end.")
    values.refuse_value(name, "name")
