"""Refusals that only exist over HTTP. Those of the service are in tokenauth.errors."""

from tokenauth.errors import InvalidRequest, Refusal, RetryLater


class NotFound(Refusal):
    """No route matches the path, or there is nothing at it."""

    code = "not_found"
    description = "There is nothing at this address."
    of_slash = "There is nothing at this address. Remove the slash at the end."


class MethodNotAllowed(Refusal):
    """The path does not support the method; `allowed` are those that it does."""

    code = "method_not_allowed"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__(f"This address supports {', '.join(allowed)}.")
        self.allowed = allowed


class BodyTooLarge(InvalidRequest):
    """The body is longer than the service reads."""

    description = "The body is larger than 16 KiB."


class UnsupportedMediaType(InvalidRequest):
    """The body has a Content-Type or Content-Encoding that the service does not read."""

    description = "The Content-Type is not JSON in UTF-8. Send Content-Type: application/json."


class ForeignOrigin(Refusal):
    """A web page of another origin made the browser send the request."""

    code = "foreign_origin"

    def __init__(self, origin: str) -> None:
        super().__init__(f"Pages of {origin[:200]!r} may not call this: list their origin in server.cors_origins.")


class ForeignHost(ForeignOrigin):
    """A web page called the service under a name that is not its own: its host may resolve to this machine."""

    def __init__(self, host: str) -> None:
        Refusal.__init__(
            self,
            f"Pages may not call this at the host {host[:200]!r}: set oauth.issuer to the URL of this service, or list"
            " the origin of the page in server.cors_origins.",
        )


class ForeignPage(ForeignOrigin):
    """A page that may not use the login of its visitor's browser made it send the request."""

    def __init__(self, problem: str) -> None:
        Refusal.__init__(self, problem)


class InvalidClient(Refusal):
    """An OAuth client did not authenticate (RFC 6749 section 5.2)."""

    code = "invalid_client"
    description = "The client's name or secret is missing or wrong: send them by HTTP Basic or in the form."


class InvalidScope(Refusal):
    """An OAuth client asked for a scope that it lacks (RFC 6749 section 5.2)."""

    code = "invalid_scope"

    def __init__(self, lacking: str, available: str) -> None:
        noun = "scopes" if " " in lacking else "scope"
        super().__init__(f"The client does not have the {noun} {lacking}. It has: {available or 'none'}.")


class UnsupportedGrantType(Refusal):
    """The grant type is not supported (RFC 6749 section 5.2)."""

    code = "unsupported_grant_type"
    description = "The only supported grant type is client_credentials."


class InternalError(Refusal):
    """An unexpected exception."""

    code = "internal_error"
    description = "Something went wrong on the server. Its log says where."


class RetryableInternalError(RetryLater):
    """InternalError with status 503, where a 500 would be misread, such as by a reverse proxy."""

    code = InternalError.code
    description = InternalError.description
