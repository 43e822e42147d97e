"""Changes to named tokens. They are made one after the other: each looks at the names that its user has."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Self

from sqlalchemy import BigInteger, Float, LargeBinary, bindparam, case, select, update

from tokenauth.errors import AlreadyRotated, InvalidToken, NameTaken, Refusal, TooManyTokens, UnknownToken
from tokenauth.models import Instant, Token
from tokenauth.stores.changes.tokens import REVOCATION_LOCK, insert_tokens, log_revoked, revoke, user_lock
from tokenauth.stores.engine import Change, Transaction
from tokenauth.stores.tables import tokens

MAX_OF_NAME = 5
"""Maximum number of live tokens of one name. All but the newest were rotated and are about to end."""

_NAMED = (
    select(tokens.c.digest, tokens.c.name, tokens.c.credential, tokens.c.max_expires_at)
    .where(
        tokens.c.username == bindparam("username"),
        tokens.c.name.is_not(None),
        tokens.c.expires_at > bindparam("now", type_=Float()),
    )
    .order_by(tokens.c.number)
)
_EXISTS = select(tokens.c.digest).where(tokens.c.digest == bindparam("digest", type_=LargeBinary()))
_end = bindparam("end", type_=BigInteger())
_last = case((tokens.c.expires_at > _end, _end), else_=tokens.c.expires_at)
_SHORTEN = (
    update(tokens)
    .where(tokens.c.digest == bindparam("of", type_=LargeBinary()))
    .values(expires_at=_last, max_expires_at=_last)  # that they are the same marks what was rotated
)


class _Named(NamedTuple):
    digest: bytes
    name: str
    credential: str
    max_expires_at: int | None

    @property
    def rotated(self) -> bool:
        return self.max_expires_at is not None


class IssueNamed(Change[Refusal | None]):
    """Add a named token; the answer is why it was not added: InvalidToken, NameTaken or TooManyTokens.

    credentials: those of the user's valid tokens. The name of any other is free again.
    limit: maximum number of names that the user may have.
    by: digest of the login that asks for it, which must not be revoked; None for an operator.
    """

    token: Token
    credentials: Collection[str]
    limit: int
    by: bytes | None = None

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[Refusal | None]:
        """Add the tokens whose names are free."""
        _lock(db, [change.token for change in changes])
        return [change._make(db) for change in changes]

    def _make(self, db: Transaction) -> Refusal | None:
        if _is_revoked(db, self.by):
            return InvalidToken()
        names = {row.name for row in _live(db, self.token.username, self.credentials, self.now)}
        if self.token.name in names:
            return NameTaken()
        if len(names) >= self.limit:
            return TooManyTokens()
        insert_tokens(db, [self.token])
        return None


class Rotate(Change[Refusal | None]):
    """Add the successor of a named token, and end that token at `ends_at` at the latest.

    The answer is why nothing was changed: InvalidToken, UnknownToken, AlreadyRotated or TooManyTokens. The token is
    never extended, and rotated once: its lifetime is no longer the one with which it was issued.

    by: digest of the login that asks for it, which must not be revoked; None for an operator.
    """

    digest: bytes
    successor: Token
    credentials: Collection[str]
    ends_at: int
    by: bytes | None = None

    @classmethod
    def make(cls, db: Transaction, changes: Sequence[Self]) -> Sequence[Refusal | None]:
        """Rotate the tokens that are the newest of their names and were not rotated before."""
        _lock(db, [change.successor for change in changes])
        return [change._make(db) for change in changes]

    def _make(self, db: Transaction) -> Refusal | None:
        if _is_revoked(db, self.by):
            return InvalidToken()
        name = self.successor.name
        live = _live(db, self.successor.username, self.credentials, self.now)
        of_name = [row for row in live if row.name == name]
        old = next((row for row in of_name if row.digest == self.digest), None)
        if old is None:
            return UnknownToken()
        if old.rotated or old is not of_name[-1]:
            return AlreadyRotated()
        if self.ends_at <= self.now:
            revoke(db, [self.digest], self.now)
        elif len(of_name) < MAX_OF_NAME:
            db.execute(_SHORTEN, {"of": self.digest, "end": self.ends_at})
            log_revoked(db, [self.digest], self.now)
        else:
            return TooManyTokens("Too many rotated tokens of this name are still valid. Rotate it without an overlap.")
        insert_tokens(db, [self.successor])
        return None


def _lock(db: Transaction, added: Sequence[Token]) -> None:
    """Wait for others who change the names of these users, and for revocations.

    A login that is revoked at the same time, or that this process does not know to be revoked, leaves no token behind.
    """
    db.lock(*{user_lock(token.username) for token in added})
    db.lock(REVOCATION_LOCK)


def _is_revoked(db: Transaction, login: bytes | None) -> bool:
    return login is not None and not db.rows(_EXISTS, {"digest": login})


def _live(db: Transaction, username: str, credentials: Collection[str], now: Instant) -> list[_Named]:
    """Return the live named tokens of a user, the oldest first."""
    rows: Sequence[Any] = db.rows(_NAMED, {"username": username, "now": now})
    return [named for named in map(_Named._make, rows) if named.credential in credentials]
