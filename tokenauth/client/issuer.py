"""What the clients share about the server: the form of its URL, and the bodies of its responses."""

import re
import ssl
from contextlib import suppress
from typing import Annotated, Any, TypeVar, cast

import httpx
import msgspec

from tokenauth import values
from tokenauth.errors import IssuerUnavailable
from tokenauth.models import Identity, Login, Token, public_id

Body = TypeVar("Body")

_SENDABLE = re.compile(rb"([!-~]([ -~]*[!-~])?)?")

_Name = Annotated[str, msgspec.Meta(min_length=1)]


class LoginBody(msgspec.Struct):
    """The response to POST /api/token."""

    token: str
    expiry_time: int

    def __post_init__(self) -> None:
        if values.digest(self.token.encode()) is None:  # it might not be a legal header value
            raise ValueError("this is not a token")

    def __repr__(self) -> str:
        return f"LoginBody(expiry_time={self.expiry_time!r})"


class MeBody(msgspec.Struct):
    """The response to GET /api/me."""

    username: _Name
    scopes: tuple[str, ...]
    id: str
    issued_at: int
    expiry_time: int
    name: str | None = None

    def login(self, digest: bytes) -> Login:
        """Return the login of the token with this digest. Raises ValueError if the response is about another token."""
        if self.id != public_id(digest):
            raise ValueError("this is about another token")
        token = Token.new(digest, self.username, "", self.issued_at, self.expiry_time, name=self.name)
        return Login(Identity(self.username, self.scopes), token)


class ErrorBody(msgspec.Struct):
    """The response to a refused request."""

    error: str


def base_url(url: str) -> str:
    """Return the URL of a server without a slash at the end. Raises ValueError, which does not quote it."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    unknown = parsed.scheme not in {"http", "https"} or not parsed.host or not 0 < (parsed.port or 80) < 2**16
    if unknown or parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError("url: must be http:// or https:// and a host, perhaps with a port and a path, and no more")
    return str(parsed).rstrip("/")


def read(response: httpx.Response, body: type[Body]) -> Body:
    """Read the body of a response. Raises ValueError, which does not quote it, if it has another form."""
    try:
        return msgspec.json.decode(response.content, type=body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise ValueError("this is not a response of tokenauth") from None


def checked_headers(headers: Any) -> httpx.Headers:
    """Return headers for httpx. Raises ValueError, which does not quote them, for a value that cannot be sent.

    The errors of httpx and h11 quote the value, which may be a token.
    """
    with suppress(UnicodeError):
        checked = httpx.Headers(headers)
        if all(_SENDABLE.fullmatch(value) for _, value in checked.raw):
            return checked
    raise ValueError("headers: a value has a character that cannot be sent. Does a token end with a line break?")


def create_ssl_context() -> ssl.SSLContext:
    """Trust the issuers of certifi, or of SSL_CERT_FILE or SSL_CERT_DIR, as httpx does. Raises OSError."""
    return httpx.create_ssl_context()


_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})
"""What OpenSSL says of a certificate that no trusted one has signed: X509_V_ERR_..._SELF_SIGNED_..., ..._ISSUER_...."""


def unavailable(error: Exception) -> IssuerUnavailable:
    """Return the refusal for a request that was not answered."""
    distrust = find_distrust(error)
    refusal = IssuerUnavailable(f"The certificate of tokenauth is not trusted: {distrust}." if distrust else None)
    refusal.distrust = distrust
    return refusal


def find_distrust(error: Exception) -> str:
    """Return why the certificate of the server is not trusted, if that is the cause of an error; otherwise ""."""
    distrust, cause = "", cast("BaseException | None", error)
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        distrust = distrust or getattr(cause, "distrust", "")
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return distrust
    unknown = cause.verify_code in _UNKNOWN_ISSUER
    fix = ": name the file of its issuer's certificate in SSL_CERT_FILE" if unknown else ""
    return f"{cause.verify_message.rstrip('.')}{fix}"


def retry_after(response: httpx.Response) -> int | None:
    """Return the seconds that the header Retry-After asks to wait."""
    seconds = response.headers.get("retry-after", "")
    return int(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else None
