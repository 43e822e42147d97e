"""What tokenauth refuses, and why: one class a reason, one sentence each."""


class ConfigError(Exception):
    """The configuration cannot be used. The text names the key path and says what to do."""


class StartError(Exception):
    """The service cannot start. The text says why and what to do."""


class Refusal(Exception):
    """A request that is not granted. `code` is for programs, the text for people.

    Neither ever holds a token, a password or anything else that the client sent in confidence.
    """

    code = "refused"
    description = "The request was refused."

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description or self.description)


class InvalidRequest(Refusal):
    """The request cannot be understood."""

    code = "invalid_request"


class BodyTooLarge(InvalidRequest):
    """The body is longer than the service reads."""

    description = "The body is larger than 16 KiB."


class UnsupportedMediaType(InvalidRequest):
    """The body is in a form that the service does not read."""

    description = "The body must be JSON in UTF-8: send Content-Type: application/json and no Content-Encoding."


class InvalidCredentials(Refusal):
    """The name or the password is wrong; which one is not said."""

    code = "invalid_credentials"
    description = "invalid credentials"


class TokenRequired(Refusal):
    """The route is guarded and no token was sent."""

    code = "token_required"
    description = "Send a token in the X-Token or the Authorization: Bearer header."


class InvalidToken(Refusal):
    """A token was sent and it is not valid; why is not said."""

    code = "invalid_token"
    description = "The token is not valid: it is unknown, expired or revoked. Log in again."


class InsufficientScope(Refusal):
    """The token is valid, and its user may not do this."""

    code = "insufficient_scope"

    def __init__(self, *scopes: str) -> None:
        super().__init__(f"This needs {'the scope' if len(scopes) == 1 else 'all scopes of'} {' '.join(scopes)!r}.")
        self.scope = " ".join(scopes)


class Forbidden(Refusal):
    """The request is understood and refused, whoever sends it; the message says why."""

    code = "forbidden"


class ForeignPage(Refusal):
    """A web page of an origin that is not listed made the browser send this."""

    code = "foreign_origin"

    def __init__(self, origin: str, host: str | None = None) -> None:
        if host is None:
            super().__init__(f"Pages of {origin[:200]!r} may not call this: list their origin in server.cors_origins.")
        else:
            super().__init__(
                f"Pages may not call this at the host {host[:200]!r}: set oauth.issuer to the URL of this service, or"
                " list the origin of the page in server.cors_origins."
            )


class InvalidClient(Refusal):
    """A client of OAuth did not authenticate, or not rightly (RFC 6749 section 5.2)."""

    code = "invalid_client"
    description = "Name and secret of the client are missing or wrong: send them by HTTP Basic or in the form."


class InvalidScope(Refusal):
    """The client asks for a scope that it does not have (RFC 6749 section 5.2)."""

    code = "invalid_scope"
    description = "The client does not have every scope that it asks for."


class UnsupportedGrantType(Refusal):
    """The client asks for a token in a way that is not offered (RFC 6749 section 5.2)."""

    code = "unsupported_grant_type"
    description = "Only the grant type client_credentials is offered here."


class NotFound(Refusal):
    """There is nothing at this address."""

    code = "not_found"
    description = "There is nothing at this address."


class UnknownPool(NotFound):
    """The configuration has no pool of this name."""

    code = "unknown_pool"
    description = "There is no pool of this name."


class UnknownToken(NotFound):
    """The pool has no token of this value: it never had, it was deleted, or it has expired."""

    description = "The pool has no such token."


class PoolFull(Refusal):
    """More tokens were asked for than the pool has room for; none was made."""

    code = "pool_full"
    description = "The pool has no room for so many tokens. None was made."


class NoFreeToken(Refusal):
    """All tokens are lent, or there are none; `retry_after` is when the next lease ends, in whole seconds."""

    code = "no_free_token"
    description = "The pool has no free token."

    def __init__(self, retry_after: int | None = None) -> None:
        super().__init__()
        self.retry_after = retry_after


class NotYourLease(Forbidden):
    """The lease belongs to another user; only that user keeps it alive or releases it."""

    description = "The lease belongs to another user."


class LeaseLost(Refusal):
    """The lease is over, or it is another holder's or a later one by now."""

    code = "lease_lost"
    description = "The token is not lent to you any more: stop using what it guards."


class MethodNotAllowed(Refusal):
    """The address does not take this method."""

    code = "method_not_allowed"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__(f"This address takes {', '.join(allowed)}.")
        self.allowed = allowed


class InternalError(Refusal):
    """Something broke that nobody has thought of."""

    code = "internal_error"
    description = "Something went wrong here. The log says where."


class RetryLater(Refusal):
    """The request may be granted after `retry_after` whole seconds."""

    def __init__(self, description: str | None = None, retry_after: int = 1) -> None:
        super().__init__(description)
        self.retry_after = retry_after


class TooManyAttempts(RetryLater):
    """Too many logins failed for this name, or from this network."""

    code = "too_many_attempts"
    description = "Too many failed logins. Wait as long as Retry-After says."


class Overloaded(RetryLater):
    """More work waits than the service takes on."""

    code = "overloaded"
    description = "The server has more work than it can take on. Try again shortly."


class ClientGone(RetryLater):
    """The client closed its connection before it could be answered, so nothing was done for it."""

    code = "client_gone"
    description = "The connection was closed before the request could be answered. Nothing was done."


class IssuerUnavailable(RetryLater):
    """Whoever issues the tokens cannot be reached, or does not answer as tokenauth does."""

    code = "issuer_unavailable"
    description = "The issuer of tokens cannot be asked at the moment. Nothing is said about any token."


class Unsure(RetryLater):
    """Something broke that nobody has thought of, where nothing but "not now" may be said of that."""

    code = "internal_error"
    description = InternalError.description


class StoreUnavailable(RetryLater):
    """The store cannot be read or written: nothing is known about any token at this moment."""

    code = "store_unavailable"
    description = "The database cannot be used at the moment, so no token can be judged or changed. Try again."
