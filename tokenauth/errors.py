"""Why a request is refused: one exception for each reason. Nothing here depends on HTTP."""


class ConfigError(Exception):
    """The configuration cannot be used. The text names the key path and says what to do."""


class StartError(Exception):
    """The service cannot start. The text says why and what to do."""


class CopyError(Exception):
    """A database cannot be copied to another. The text says why and what to do."""


class MustWait(Exception):
    """What was asked for cannot be found out without waiting."""


class Refusal(Exception):
    """A request that is refused. `code` is for programs, the text for people.

    Neither ever contains a token, a password or any other secret of the client.
    """

    code = "refused"
    description = "The request was refused."

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description or self.description)


class InvalidRequest(Refusal):
    """The request is malformed."""

    code = "invalid_request"


class InvalidCredentials(Refusal):
    """The username or the password is wrong. It does not say which."""

    code = "invalid_credentials"
    description = "invalid credentials"


class TokenRequired(Refusal):
    """No token was sent where one is required."""

    code = "token_required"
    description = "No token was sent, and this needs one."


class InvalidToken(Refusal):
    """The token is not valid. It does not say why."""

    code = "invalid_token"
    description = "The token is not valid: it is unknown, expired or revoked. Log in again."


class Forbidden(Refusal):
    """The user may not do this; the text says why."""

    code = "forbidden"


class InsufficientScope(Refusal):
    """The token is valid, and its user lacks a scope. Without `scopes`, the error does not say which."""

    code = "insufficient_scope"

    def __init__(self, *scopes: str, description: str | None = None, logged: str | None = None) -> None:
        needed = f"This needs {'the scope' if len(scopes) == 1 else 'all scopes of'} {' '.join(scopes)!r}."
        super().__init__(description or needed)
        self.scope = " ".join(scopes)
        self.logged_scope = self.scope if logged is None else logged


class UnknownPool(Refusal):
    """The configuration has no pool of this name."""

    code = "unknown_pool"
    description = "There is no pool of this name."


class UnknownToken(Refusal):
    """The token does not exist: it never did, it was deleted, or it has expired."""

    code = "not_found"
    description = "The pool has no such token."


class UnknownMember(Refusal):
    """The pool has no member of this name."""

    code = "unknown_member"
    description = "The pool has no member of this name."


class LoginNeeded(Forbidden):
    """A named token, or one that is limited to some scopes, asks for a new token."""

    description = "A named token, or one with only some of your scopes, cannot create tokens. Log in first."


class NameTaken(Refusal):
    """The user has a live named token of this name."""

    code = "name_taken"
    description = "You have a token of this name. Choose another name, or rotate that token."


class TooManyTokens(Refusal):
    """The user has as many named tokens as they may have. None was ended."""

    code = "too_many_tokens"
    description = "You have too many named tokens. End one that you no longer need."


class AlreadyRotated(Refusal):
    """The token was rotated before."""

    code = "already_rotated"
    description = "The token was rotated already. Rotate the newest token of its name, or end it and make a new one."


class NotRenewable(Refusal):
    """The lifetime of the token is fixed."""

    code = "not_renewable"
    description = "The lifetime of this token is fixed: use does not extend it."


class PoolFull(Refusal):
    """The new tokens would exceed the capacity of the pool. None was generated."""

    code = "pool_full"
    description = "The pool has no capacity for that many tokens. None was generated."


class NoFreeToken(Refusal):
    """All tokens are leased, or there are none. `retry_after` is when the next lease ends, in whole seconds."""

    code = "no_free_token"
    description = "The pool has no free token."
    of_members = "The pool has no free member that you may lease now."

    def __init__(self, retry_after: int | None = None, description: str | None = None) -> None:
        super().__init__(description)
        self.retry_after = retry_after


class NotYourLease(Forbidden):
    """The lease belongs to another user, who alone keeps it alive or releases it."""

    description = "The lease belongs to another user."


class TooManyLeases(Refusal):
    """The user has leased as many tokens of the pool as one user may."""

    code = "too_many_leases"
    description = "You have leased as many tokens of this pool as one user may. Release one first."


class AlreadyReserved(Refusal):
    """Another manager has reserved the member. That reservation, by whom and until when, is as it was."""

    code = "already_reserved"
    description = "Another user has reserved this member. Send ?force=true to replace the reservation."

    def __init__(self, by: str = "", until: float = 0) -> None:
        super().__init__()
        self.by = by
        self.until = until


class LeaseLost(Refusal):
    """The lease has ended, or the token is leased to another holder or under a later fence."""

    code = "lease_lost"
    description = "The token is no longer leased to you: stop using what it guards."


class RequestDiffers(Refusal):
    """The user has a request of this id for the pool, with other terms."""

    code = "request_differs"
    description = "You sent a request with this id and other values before. Choose another id."


class TooManyPlaces(Refusal):
    """The user has as many places in the pool's waiting line as one user may have."""

    code = "too_many_places"
    description = "You have too many requests in the line of this pool."


class PlaceLost(Refusal):
    """The request is not in the waiting line any more."""

    code = "place_lost"
    description = "The request is not in the waiting line any more: it was taken out, or its time was over."


class UnknownRequest(Refusal):
    """The user has no such request in the pool's waiting line."""

    code = "not_found"
    description = "The waiting line has no such request."


class RetryLater(Refusal):
    """The request may succeed after `retry_after` whole seconds."""

    def __init__(self, description: str | None = None, retry_after: int = 1) -> None:
        super().__init__(description)
        self.retry_after = retry_after


class TooManyAttempts(RetryLater):
    """Too many logins failed for this name, or from this network."""

    code = "too_many_attempts"

    def __init__(self, description: str | None = None, retry_after: int = 1) -> None:
        seconds = f"{retry_after} second{'s' * (retry_after != 1)}"
        super().__init__(description or f"Too many failed logins. Try again in {seconds}.", retry_after)


class Overloaded(RetryLater):
    """The server has more work waiting than it accepts."""

    code = "overloaded"
    description = "The server is overloaded. Try again shortly."


class Stopping(Overloaded):
    """The server stops, and the time for answers is over."""

    description = "The server is stopping. Try again shortly."


class ClientGone(RetryLater):
    """The client disconnected before the request was answered. Nothing was changed."""

    code = "client_gone"
    description = "The connection was closed before the request was answered. Nothing was changed."


class IssuerUnavailable(RetryLater):
    """The tokenauth server cannot be reached, or does not answer as tokenauth does."""

    code = "issuer_unavailable"
    description = "tokenauth is unreachable; the token was not checked."
    distrust = ""
    """Why this client does not trust the certificate of the server, if that is the reason."""


class StoreUnavailable(RetryLater):
    """The store cannot be read or written, so nothing is known about any token."""

    code = "store_unavailable"
    description = "The database is unavailable, so no token can be checked or changed. Try again shortly."
    of_writes = (
        "The database cannot be written, so nothing can be made or changed now; valid tokens stay valid."
        " Try again shortly."
    )
    """The description where only writing is known to fail."""
