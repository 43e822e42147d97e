"""Tokens: issue, validate, revoke, and list them."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from tokenauth import revocation_queue, values
from tokenauth.clock import Clock
from tokenauth.credentials import Claimed, Credentials
from tokenauth.errors import ClientGone, NotFound, RetryLater, StoreUnavailable
from tokenauth.login_queue import Gone, here
from tokenauth.logs import log, whereabouts
from tokenauth.models import Identity, IssuedToken, Login, Token, User
from tokenauth.revocation_queue import RevocationQueue
from tokenauth.settings import model as config
from tokenauth.stores.store import Store
from tokenauth.throttle import network

LIST_LIMIT = 1000
"""Tokens that one listing shows at the most."""

_TOGETHER = 32
"""Tokens of one log-out that are ended at the same time. More of them would hold up others."""


class Tokens:
    """The logins of the users that stand in the configuration."""

    def __init__(
        self,
        terms: config.Tokens,
        users: Mapping[str, User],
        store: Store,
        credentials: Credentials,
        clock: Clock,
    ) -> None:
        self._terms = terms
        self._users = users
        self._store = store
        self._credentials = credentials
        self._clock = clock
        self.queue = RevocationQueue(store, clock)

    async def issue(
        self, username: str, password: str, address: str, user_agent: str, gone: Gone = here
    ) -> IssuedToken:
        """Log in: exchange a name and a password for a new token.

        Raises InvalidRequest, InvalidCredentials, TooManyAttempts, Overloaded, ClientGone or StoreUnavailable.
        """
        user = await self._credentials.verify(Claimed(username, password), address, gone)
        return await self.grant(user, address, user_agent, gone)

    async def grant(self, user: User, address: str, user_agent: str, gone: Gone = here) -> IssuedToken:
        """Issue a token to a user who has authenticated. Raises ClientGone or StoreUnavailable."""
        try:
            return await self._grant(user, address, user_agent, gone)
        except RetryLater as refusal:
            log.warning("login_refused", user=user.username, network=network(address), reason=refusal.code)
            raise

    async def _grant(self, user: User, address: str, user_agent: str, gone: Gone) -> IssuedToken:
        if self.queue.problem is not None:  # a new token would end with all others
            raise StoreUnavailable
        if gone():
            raise ClientGone
        now = self._clock()
        value = values.new_value()
        digest = values.digest(value.encode())
        assert digest is not None
        expires_at = int(now) + int(self._terms.ttl)
        token = Token(digest, user.username, user.credential, now, expires_at, address, user_agent)
        await self._store.tokens.add(token, self._terms.per_user, now)
        log.info("token_issued", user=user.username, id=token.id, network=network(address))
        return IssuedToken(value, token)

    async def validate(self, value: bytes) -> Token | None:
        """Return the token of this value if it is valid now. Raises StoreUnavailable when that cannot be known."""
        digest = values.digest(value)
        if digest is None:
            return None
        token = await self._store.tokens.get(digest)
        if token is None or self._clock() >= token.expires_at:
            return None
        if self.queue.active and self.queue.refuses(digest):
            return None
        user = self._users.get(token.username)
        return token if user is not None and user.credential == token.credential else None

    async def identify(self, value: bytes) -> Login | None:
        """Return whose token this is if it is valid now. Raises StoreUnavailable when that cannot be known."""
        token = await self.validate(value)
        return None if token is None else Login(self.owner(token), token)

    def owner(self, token: Token) -> Identity:
        """Return whose a valid token is: the scopes are as the configuration has them."""
        return self._users[token.username].identity

    def knows_scope(self, scope: str) -> bool:
        """Return whether any user has this scope."""
        return any(scope in user.scopes for user in self._users.values())

    async def revoke(self, value: bytes) -> None:
        """End a token, whatever it is. When this has returned, no worker takes it any more.

        Raises StoreUnavailable when it could not be written.
        """
        digest = values.digest(value)
        if digest is not None:
            await self._revoke(digest)

    async def log_out(self, named: Iterable[bytes], address: str, gone: Gone = here) -> None:
        """End tokens, whatever happens: what the store cannot take is refused by this machine until it is written.

        When no more can be held, no token is accepted at all. What one network may have held is bounded: its further
        log-outs wait for the store. Raises ClientGone if the client does not wait with them.
        """
        digests = list({digest: None for value in named if (digest := values.digest(value)) is not None})
        for start in range(0, len(digests), _TOGETHER):
            some = digests[start : start + _TOGETHER]
            await asyncio.gather(*(self._log_out(digest, network(address), gone) for digest in some))

    async def _log_out(self, digest: bytes, source: str, gone: Gone) -> None:
        while digest not in self.queue.held:
            if await self._revoked(digest):
                return
            if self.queue.add(digest, source):
                await asyncio.sleep(0)  # the main process is told before the client is
                return
            await asyncio.sleep(revocation_queue.RETRY)
            if gone():
                raise ClientGone

    async def _revoked(self, digest: bytes) -> bool:
        """Revoke a token if the store can take that; return whether it could."""
        try:
            await self._revoke(digest)
        except Exception as error:
            if not isinstance(error, RetryLater):
                log.error("unexpected", at=whereabouts(error))
            return False
        return True

    async def _revoke(self, digest: bytes) -> None:
        token = await self._store.tokens.get(digest)
        if token is not None and await self._store.tokens.remove(digest, self._clock()):
            log.info("token_revoked", user=token.username, id=token.id)

    async def revoke_id(self, id: str, username: str | None) -> None:
        """End the token with this public id, of this user or of anybody. Raises NotFound."""
        token = await self._store.tokens.find(id)
        if token is None or username not in {None, token.username}:
            raise NotFound("There is no token with this id.")
        if await self._store.tokens.remove(token.digest, self._clock()):
            log.info("token_revoked", user=token.username, id=token.id)

    async def revoke_all(self, username: str | None, keep: Token | None = None) -> int:
        """End all tokens of a user, or of everybody, but one; say how many."""
        count = await self._store.tokens.remove_all(username, self._clock(), keep.digest if keep else None)
        whose = "(all)" if username is None else username if username in self._users else "(unknown)"
        log.info("tokens_revoked", user=whose, count=count)
        return count

    async def live(self, username: str | None) -> Sequence[Token]:
        """List the live tokens of a user, or of everybody, newest first, at most LIST_LIMIT."""
        listed = await self._store.tokens.list(username, self._clock(), LIST_LIMIT)
        credentials = {user.username: user.credential for user in self._users.values()}
        return [
            token
            for token in listed
            if credentials.get(token.username) == token.credential
            and not (self.queue.active and self.queue.refuses(token.digest))
        ]

    async def ready(self) -> str | None:
        """Say why no token can be accepted, if none can."""
        return self.queue.problem

    async def unexpired(self, username: str | None) -> Sequence[tuple[Token, str]]:
        """List the tokens of a user, or of everybody, that the store has, newest first, at most LIST_LIMIT.

        Each comes with "valid", or why this configuration refuses it: "user_removed" or "password_changed". A server
        that still runs with an older configuration may accept it.
        """
        listed = await self._store.tokens.list(username, self._clock(), LIST_LIMIT)
        return [(token, self._status(token)) for token in listed]

    def _status(self, token: Token) -> str:
        user = self._users.get(token.username)
        if user is None:
            return "user_removed"
        return "valid" if user.credential == token.credential else "password_changed"

    async def close(self) -> None:
        """Write what is held in memory, if that can be done soon."""
        await self.queue.close()
