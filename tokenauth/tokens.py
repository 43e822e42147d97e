"""Tokens: issue, validate, list and revoke them."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256

from tokenauth import revocation_queue, values
from tokenauth.addresses import network
from tokenauth.background import Background
from tokenauth.clock import Clock
from tokenauth.credentials import Candidate, Credentials
from tokenauth.errors import ClientGone, MustWait, RetryLater, StoreUnavailable, UnknownToken
from tokenauth.login_queue import DisconnectCheck, never_disconnected
from tokenauth.logs import log, safe_traceback
from tokenauth.models import (
    Identity,
    Instant,
    IssuedToken,
    Login,
    Token,
    TokenCursor,
    TokenKind,
    User,
    is_plain_scope,
    public_id,
)
from tokenauth.revocation_queue import RevocationQueue, logged_revocation
from tokenauth.settings.model import TokenSettings
from tokenauth.stores.store import Store
from tokenauth.token_uses import Uses

LIST_LIMIT = 1000
"""Maximum number of tokens in one listing."""

MAX_SEARCHED = 10_000
"""Tokens that a search looks at before it answers."""

_SEARCH_STEP = 1000

_LOOKUP_BATCH = 1000
"""Number of tokens that are looked up at the same time while a text is searched."""

_READ_AT_ONCE = 4
"""Number of tokens that are read whole at the same time. Each takes a connection, and none may wait long for one."""

_LOG_OUT_BATCH = 32
"""Number of tokens of one log-out that are revoked at the same time. More would delay other clients."""


class Tokens:
    """The tokens of the users in the configuration. Where a method takes a username, None means all users."""

    def __init__(
        self,
        settings: TokenSettings,
        users: Mapping[str, User],
        store: Store,
        credentials: Credentials,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._users = users
        self._store = store
        self._credentials = credentials
        self._clock = clock
        self.revocations = RevocationQueue(store, clock)
        self.uses = Uses(store.tokens, clock, int(settings.idle) or None)
        self._use_period = self.uses.period
        self.background = Background()

    async def issue(
        self,
        username: str,
        password: str,
        address: str,
        user_agent: str,
        disconnected: DisconnectCheck = never_disconnected,
        ttl: float | None = None,
    ) -> IssuedToken:
        """Log in: return a new token if the password matches.

        `ttl` replaces that of the settings, and such a login does not end early when it is idle.
        Raises InvalidRequest, InvalidCredentials, TooManyAttempts, Overloaded, ClientGone or StoreUnavailable.
        """
        user = await self._credentials.verify(Candidate(username, password), address, disconnected)
        return await self.grant(user, address, user_agent, disconnected, ttl=ttl, slides=ttl is None)

    async def grant(
        self,
        user: User,
        address: str,
        user_agent: str,
        disconnected: DisconnectCheck,
        scopes: tuple[str, ...] | None = None,
        ttl: float | None = None,
        slides: bool = False,
    ) -> IssuedToken:
        """Issue a token, limited to `scopes`, to a user who is already authenticated.

        slides: whether it ends early when it is idle, if the settings say so.
        Raises ClientGone or StoreUnavailable.
        """
        try:
            self.check_can_issue(disconnected)
            now = self._clock()
            value = values.new_value()
            digest = values.digest(value.encode())
            assert digest is not None
            expires_at, latest = int(now) + int(self._settings.ttl if ttl is None else ttl), None
            if slides and self._settings.idle:
                expires_at, latest = self.uses.first_end(now, expires_at), expires_at
            token = Token.new(
                digest,
                user.username,
                user.credential,
                now,
                expires_at,
                address,
                user_agent,
                max_expires_at=latest,
                scopes=scopes,
            )
            on_commit = partial(self._log_issued, token, network(address))
            await self._store.tokens.issue(token, self._settings.per_user, now, on_commit)
        except RetryLater as refusal:
            self._credentials.count(refusal)
            log.warning("login_refused", user=user.username, network=network(address), reason=refusal.code)
            raise
        return IssuedToken(value, token)

    def _log_issued(self, token: Token, network: str, ended: Sequence[bytes]) -> None:
        self._credentials.count()
        log.info("token_issued", user=token.username, id=token.id, network=network)
        for each in map(public_id, ended):
            log.info("token_revoked", user=token.username, id=each, reason="per_user", by=token.username)

    def check_can_issue(self, disconnected: DisconnectCheck) -> None:
        """Raise ClientGone, or StoreUnavailable while all tokens are about to be revoked: a new one would be, too."""
        if self.revocations.problem is not None:
            raise StoreUnavailable
        if disconnected():
            raise ClientGone

    async def validate(self, value: bytes, touch: bool = True, digest: bytes | None = None) -> Token | None:
        """Return the token if it is valid. Unless `touch` is False, this is a use of it. Pass its digest if known.

        Raises StoreUnavailable if it cannot be checked now.
        """
        digest = digest or values.digest(value)
        if digest is None:
            return None
        stored = self._store.tokens
        token = stored.cached(digest) or await stored.look_up(digest)  # as `get` does, without its coroutine
        if token is None:
            return None
        now = self._clock()
        if now >= token.expires_at:
            token = await self._extended(token, now)
            if token is None:
                return None
        return self._checked(token, now, touch)

    def can_validate_now(self, digest: bytes) -> bool:
        """Return whether `validate_now` will answer, most likely."""
        return self._store.tokens.has_now(digest)

    def validate_now(self, digest: bytes) -> Token | None:
        """Do what `validate` does, without waiting: with SQLite for any token, else for one that is cached.

        Raises MustWait if that is impossible, or StoreUnavailable.
        """
        stored = self._store.tokens
        token, now = stored.cached(digest) or stored.look_up_now(digest), self._clock()
        if token is None:
            return None
        if now >= token.expires_at:
            if token.is_extendable:
                raise MustWait
            return None
        return self._checked(token, now, True)

    def _checked(self, token: Token, now: Instant, touch: bool) -> Token | None:
        """Return a token that has not expired if it is not being revoked, and its user still has its credential."""
        if self.revocations.active and self.revocations.refuses(token.digest):
            return None
        user = self._users.get(token.username)
        if user is not None and token.credential in user.credentials:
            if now - token.used_at >= self._use_period and touch:
                self.uses.note(token, now)
            return token
        return None

    async def _extended(self, token: Token, now: Instant) -> Token | None:
        """Return an expired token with its later end, if use has extended it."""
        if not token.is_extendable:
            return None
        extended = self.uses.extended(token, now)
        if extended is None:
            extended = await self._store.tokens.get_current(token.digest)  # another process may have written a use
        return extended if extended is not None and now < extended.expires_at else None

    async def identify(self, value: bytes, touch: bool = True) -> Login | None:
        """Return the user and the token if it is valid. Unless `touch` is False, this is a use of it.

        Raises StoreUnavailable if it cannot be checked now.
        """
        token = await self.validate(value, touch)
        return None if token is None else Login(self.owner(token), token)

    async def identify_again(self, token: Token) -> Identity | None:
        """Return the user of a token that was valid before, if it still is. This does not count as a use.

        Raises StoreUnavailable if it cannot be checked now.
        """
        found = await self._store.tokens.get(token.digest)
        now = self._clock()
        if found is not None and now >= found.expires_at:
            found = await self._extended(found, now)
        return None if found is None or not self.accepts(found) else self.owner(found)

    def owner(self, token: Token) -> Identity:
        """Return the user of a valid token, with what it may do: the user's scopes now that are also the token's."""
        user = self._users[token.username].identity
        return user if token.scopes is None else user.limited_to(token.scopes)

    def known_scopes(self, scopes: Iterable[str]) -> str:
        """Return scopes that a client has sent, as they may be logged, each once.

        One that no user has is replaced by `(unknown)`: it may be a secret that was sent by mistake.
        """
        return " ".join({scope if self._scope_exists(scope) else "(unknown)": None for scope in scopes})

    def describe_scopes(self, scopes: Iterable[str]) -> str:
        """Return scopes that a client has sent, as its answer shows them: also plain ones that no user has."""
        shown = (scope if is_plain_scope(scope) or self._scope_exists(scope) else "(unknown)" for scope in scopes)
        return " ".join(dict.fromkeys(shown))

    def _scope_exists(self, scope: str) -> bool:
        return any(scope in user.scopes for user in self._users.values())

    async def revoke(self, value: bytes) -> None:
        """Revoke a token; an unknown value is ignored. Once this returns, every worker refuses it.

        Raises StoreUnavailable if it could not be written.
        """
        digest = values.digest(value)
        if digest is not None:
            await self._revoke(digest)

    async def log_out(
        self, candidates: Iterable[bytes], address: str, disconnected: DisconnectCheck = never_disconnected
    ) -> None:
        """Revoke tokens, even while the store cannot be written: until it can, this machine holds and refuses them.

        If too many revocations wait to be written, no token is accepted. Each network has a limited share of the queue:
        beyond it, its log-outs wait for the store. Raises ClientGone if the client disconnects while it waits.
        """
        digests = list({digest: None for value in candidates if (digest := values.digest(value)) is not None})
        if len(digests) == 1:  # the usual case needs no task
            await self._log_out(digests[0], network(address), disconnected)
            return
        for start in range(0, len(digests), _LOG_OUT_BATCH):
            batch = digests[start : start + _LOG_OUT_BATCH]
            await asyncio.gather(*(self._log_out(digest, network(address), disconnected) for digest in batch))

    async def take_back(self, issued: IssuedToken, address: str) -> None:
        """Revoke a token whose user will not get it. This does not wait for a store that cannot be written."""
        with suppress(ClientGone):
            await self.log_out([issued.value.encode()], address, lambda: True)

    async def _log_out(self, digest: bytes, source: str, disconnected: DisconnectCheck) -> None:
        while digest not in self.revocations.held:
            if await self._try_revoke(digest):
                return
            if self.revocations.add(digest, source):
                break
            await asyncio.sleep(revocation_queue.RETRY)
            if disconnected():
                raise ClientGone
        await self.revocations.applied()

    async def _try_revoke(self, digest: bytes) -> bool:
        """Return whether the store could be written."""
        try:
            await self._revoke(digest)
        except Exception as error:
            if not isinstance(error, RetryLater):
                log.error("unexpected_error", at=safe_traceback(error))
            return False
        return True

    async def _revoke(self, digest: bytes) -> None:
        token = await self._store.tokens.get(digest)
        if token is None:
            await self._store.tokens.share_missing(digest)
        else:
            await self._end(token)

    async def _end(self, token: Token) -> None:
        def on_commit(existed: bool) -> None:
            if existed:
                log.info("token_revoked", user=token.username, id=token.id)

        await self._store.tokens.revoke(token.digest, self._clock(), on_commit)

    async def revoke_id(self, id: str, username: str | None) -> Token:
        """Revoke the token of a user with this public id, and return it. Raises UnknownToken."""
        token = await self._store.tokens.find(id)
        if token is None or username not in {None, token.username}:
            raise UnknownToken("There is no token with this id.")
        await self._end(token)
        return token

    async def revoke_all(
        self,
        username: str | None,
        keep: Token | None = None,
        kind: TokenKind | None = None,
    ) -> int:
        """Revoke all tokens of a user, or those of one kind, except `keep`. Return their number."""
        whose = "(all)" if username is None else username if username in self._users else "(unknown)"
        kept = keep.digest if keep else None
        with logged_revocation(log.info, user=whose, kind=kind or "all") as note:
            return await self._store.tokens.revoke_all(username, self._clock(), kept, kind, note)

    async def list_live(self, username: str | None, kind: TokenKind | None = None) -> Sequence[Token]:
        """List the valid tokens of a user, or those of one kind, newest first, at most LIST_LIMIT."""
        listed = await self._store.tokens.list(username, self._clock(), LIST_LIMIT, kind)
        return [token for token in listed if self.accepts(token)]

    async def search(
        self, text: str, kind: TokenKind | None, after: TokenCursor, limit: int
    ) -> tuple[Sequence[Token], TokenCursor | None]:
        """List valid tokens of all users, the latest end first, from a cursor on, and where the next page begins.

        Found is `text`, whatever the case, in the name of the user or the token, in the address or the client, and at
        the start of an id. It looks at MAX_SEARCHED tokens at most: a page may have fewer than `limit`, or none, and
        yet a next one.
        """
        wanted, found = text.casefold(), list[Token]()
        looked, now = 0, self._clock()
        while looked < MAX_SEARCHED:
            page = await self._store.tokens.list_by_end(after, now, _SEARCH_STEP)
            for token in page:
                looked += 1
                after = token.expires_at, bytes.fromhex(token.id)
                if (kind is None or token.kind == kind) and _matches(token, wanted) and self.accepts(token):
                    found.append(token)
                    if len(found) == limit:
                        return found, after
            if len(page) < _SEARCH_STEP:
                return found, None
        return found, after

    def accepts(self, token: Token) -> bool:
        """Return whether a token of the store that has not expired is valid."""
        revoked = self.revocations.active and self.revocations.refuses(token.digest)
        return self.status(token) == "valid" and not revoked

    async def ready(self) -> str | None:
        """Return why no token can be accepted, or None."""
        return self.revocations.problem

    async def list_unexpired(self, username: str | None, kind: TokenKind | None = None) -> Sequence[tuple[Token, str]]:
        """List the unexpired tokens of a user in the store, or those of one kind, newest first, at most LIST_LIMIT.

        Each comes with "valid" or with why this configuration refuses it: "user_removed" or "password_changed". A
        server that has not reloaded the configuration may still accept it.
        """
        listed = await self._store.tokens.list(username, self._clock(), LIST_LIMIT, kind)
        return [(token, self.status(token)) for token in listed]

    async def find_in(self, text: bytes) -> Sequence[tuple[Token, str]]:
        """Return the unexpired tokens of the store whose values are in a text, each with its status.

        They are found in the usual encodings (`values.find_values`). This does not count as a use.
        """
        digests = [sha256(value).digest() for value in values.find_values(text)]
        found = []
        for start in range(0, len(digests), _LOOKUP_BATCH):
            batch = digests[start : start + _LOOKUP_BATCH]
            known = [token.id for token in await asyncio.gather(*map(self._store.tokens.get, batch)) if token]
            for first in range(0, len(known), _READ_AT_ONCE):  # `find` also returns who asked for them
                found += await asyncio.gather(*map(self._store.tokens.find, known[first : first + _READ_AT_ONCE]))
        now = self._clock()
        return [(token, self.status(token)) for token in found if token is not None and now < token.expires_at]

    def status(self, token: Token) -> str:
        """Return "valid", or why this configuration refuses a token: "user_removed" or "password_changed"."""
        user = self._users.get(token.username)
        if user is None:
            return "user_removed"
        return "valid" if token.credential in user.credentials else "password_changed"

    async def close(self) -> None:
        """Write the revocations and uses held in memory, if that is possible soon."""
        await self.background.close()
        await self.revocations.close()
        await self.uses.close()


def _matches(token: Token, wanted: str) -> bool:
    """Return whether a text that is casefolded is in what people know of a token."""
    if not wanted or token.id.startswith(wanted):
        return True
    known = token.username, token.name or "", token.address, token.user_agent
    return any(wanted in text.casefold() for text in known)
