"""Tokens: issue, validate, revoke, and list them."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress

from tokenauth import config, opaque
from tokenauth.credentials import Claimed, Credentials
from tokenauth.errors import NotFound, RetryLater
from tokenauth.logs import log
from tokenauth.models import Clock, Identity, Issued, Login, Token, User, public_id
from tokenauth.stores.base import Store
from tokenauth.throttle import network

LIST_LIMIT = 1000
"""Tokens that one listing shows at the most."""

_RETRY = 1.0
"""Seconds between two tries to write the revocations that the store would not take."""

_TOGETHER = 1000
"""Of these, how many are written at a time."""

_LAST_CHANCE = 5.0
"""Seconds in which they are still written when the worker stops."""

_MAX_WITHHELD = 100_000
"""Revocations that are held in memory at the most."""


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
        self._withheld: set[bytes] = set()
        self._settling: asyncio.Task[None] | None = None

    async def issue(self, username: str, password: str, address: str, user_agent: str) -> Issued:
        """Log in: exchange a name and a password for a new token.

        Raises InvalidRequest, InvalidCredentials, TooManyAttempts, Overloaded or StoreUnavailable.
        """
        user = await self._credentials.verify(Claimed(username, password), address)
        return await self.grant(user, address, user_agent)

    async def grant(self, user: User, address: str, user_agent: str) -> Issued:
        """Issue a token to a user who has shown that he is it. Raises StoreUnavailable."""
        now = self._clock()
        value = opaque.new_value()
        digest = opaque.digest(value.encode())
        assert digest is not None
        expires_at = int(now) + int(self._terms.ttl)
        token = Token(digest, user.username, user.credential, now, expires_at, address, user_agent)
        await self._store.tokens.add(token, self._terms.per_user, now)
        log.info("token_issued", user=user.username, id=token.id, network=network(address))
        return Issued(value, token)

    async def validate(self, value: bytes) -> Token | None:
        """Return the token of this value if it is valid now. Raises StoreUnavailable when that cannot be known."""
        digest = opaque.digest(value)
        if digest is None:
            return None
        token = await self._store.tokens.get(digest)
        if token is None or self._clock() >= token.expires_at or digest in self._withheld:
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

    async def revoke(self, value: bytes) -> None:
        """End a token, whatever it is. When this has returned, no worker takes it any more.

        Raises StoreUnavailable when it could not be written.
        """
        digest = opaque.digest(value)
        if digest is None:
            return
        token = await self._store.tokens.get(digest)
        if token is not None and await self._store.tokens.remove(digest, self._clock()):
            log.info("token_revoked", user=token.username, id=token.id)

    async def withhold(self, value: bytes) -> None:
        """End a token even while the store cannot be written: it is refused here until it is ended there.

        Raises StoreUnavailable only when too many tokens wait for that already.
        """
        digest = opaque.digest(value)
        if digest is None or digest in self._withheld:
            return
        try:
            await self.revoke(value)
        except RetryLater:
            if len(self._withheld) >= _MAX_WITHHELD:
                raise
            self._withheld.add(digest)
            log.error("revocation_held_in_memory", id=public_id(digest), held=len(self._withheld))
            if self._settling is None:
                self._settling = asyncio.create_task(self._settle())

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
        return [token for token in listed if credentials.get(token.username) == token.credential]

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
        """Try a last time to write what is held in memory."""
        if self._settling is not None:
            self._settling.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_CHANCE):
                await self._write_withheld()
        for digest in self._withheld:
            log.error("revocation_lost", id=public_id(digest), action="revoke it by id once the store is back")

    async def _settle(self) -> None:
        try:
            while self._withheld:
                await asyncio.sleep(_RETRY)
                await self._write_withheld()
        finally:
            self._settling = None

    async def _write_withheld(self) -> None:
        """Write what is held: many at a time, which share a commit, until something cannot be written."""
        held = list(self._withheld)
        for start in range(0, len(held), _TOGETHER):
            written = await asyncio.gather(*map(self._write_one, held[start : start + _TOGETHER]))
            if not all(written):
                return

    async def _write_one(self, digest: bytes) -> bool:
        try:
            await self._store.tokens.remove(digest, self._clock())
        except RetryLater:
            return False
        self._withheld.discard(digest)
        log.info("token_revoked", id=public_id(digest), late=True)
        return True
