"""What /auth does for browsers: reads their cookie, refuses foreign pages, and says where to log in."""

from collections.abc import Mapping
from string import punctuation
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Scope

from tokenauth.addresses import network
from tokenauth.errors import InvalidToken, Refusal
from tokenauth.logs import log
from tokenauth.settings.model import BrowserSettings
from tokenauth.web.asgi_extensions import logged_once
from tokenauth.web.cookies import Cookies
from tokenauth.web.csrf import SAFE_METHODS
from tokenauth.web.exceptions import ForeignPage
from tokenauth.web.proxy_headers import is_from_trusted_proxy
from tokenauth.web.requests import header_token
from tokenauth.web.responses import NoStoreResponse, refusal_response
from tokenauth.web.return_to import ReturnTo

MAX_TARGET = 2000
"""Maximum bytes of `rd` in the login page's address: proxies read the headers of an answer into a small buffer."""

TWO_COOKIES = "note=cookies"
"""What the query of the login page has if a browser was sent there because of two different login cookies."""

_FORWARDED = frozenset({b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-uri"})
_SAFE_METHODS = frozenset(method.encode() for method in SAFE_METHODS)
_OWN_SITE = frozenset({b"same-origin", b"same-site"})

Headers = Mapping[bytes, bytes]
"""Headers by name; of several of one name, the last."""

_IGNORED = "forwarded_page_ignored"


class BrowserAuth:
    """The rules for requests that a reverse proxy asks about with `?cookie`."""

    def __init__(self, settings: BrowserSettings, cookies: Cookies, return_to: ReturnTo) -> None:
        self._cookies = cookies
        self._return_to = return_to
        self._login_page = f"{settings.origin}/login"

    def find_token(self, scope: Scope, x_token_only: bool) -> tuple[bytes | None, Headers | None]:
        """Return the token of a header, or else of the cookie; and for a cookie the headers, for `check_page`.

        Raises InvalidRequest for two different tokens in headers, and InvalidToken for two cookies: another host may
        have set one of them.
        """
        headers: Headers = dict(scope["headers"])
        if b"x-token" in headers or b"authorization" in headers:
            value = header_token(scope, x_token_only)
            if value is not None:
                return value, None
        if len(headers) == len(scope["headers"]):  # none is there twice, as in nearly all requests
            values = self._cookies.values_in(headers.get(b"cookie", b""))
        else:
            values = self._cookies.login_values(scope)
        if len(values) > 1:
            raise InvalidToken  # `log_in_response` logs it
        return values[0] if values else None, headers

    def check_page(self, scope: Scope, headers: Headers) -> None:
        """Raise ForeignPage for a request that changes something and comes from a page of another site.

        The cookie is SameSite=Lax, so browsers do not send it with such a request. This is a second line of defence,
        also for WebSockets, which are a GET.
        """
        if _is_safe(scope, headers):
            return
        if headers.get(b"sec-fetch-site") in _OWN_SITE:
            return
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self._return_to.allows_origin(origin):
            return
        text = "A page of another site sent this request with the login cookie"
        hint = "list its origin in browser.return_to, or send the token in a header"
        raise ForeignPage(f"{text}, from {origin[:200]!r}: {hint}.")

    def log_in_response(self, refusal: Refusal, scope: Scope, redirect: bool, cookie_read: bool) -> Response:
        """Return the response to a request without a valid token, with the address of the login page.

        redirect: send browsers there that open a page. Fetches, images and the like get the status of the refusal.
        cookie_read: the cookie was not valid, so it is deleted. If a header had a token, it may be valid.
        """
        address = self._login_address(scope)
        values = self._cookies.login_values(scope) if cookie_read else ()
        if len(values) > 1:
            log.warning("cookie_twice", route="/auth")
            # They are deleted here, or the proxy drops that: the page cannot see it.
            address += f"{'&' if '?' in address else '?'}{TWO_COOKIES}"
        if redirect and _is_navigation(scope):
            response: Response = NoStoreResponse(status_code=302, headers={"Location": address})
        else:
            response = refusal_response(refusal)
        more = self._cookies.log_out() if values else ()
        response.raw_headers = [*response.raw_headers, (b"x-auth-login", address.encode()), *more]
        return response

    def _login_address(self, scope: Scope) -> str:
        """Return the URL of the login page, with that of the page that was asked for. The login page checks it."""
        sent = _forwarded(scope)
        scheme, host = sent.get(b"x-forwarded-proto"), sent.get(b"x-forwarded-host")
        path = sent.get(b"x-forwarded-uri", b"/")
        if scheme is None or host is None or not path.startswith(b"/"):
            return self._login_page
        path = quote(path, safe=punctuation).encode()  # what is not ASCII, as browsers do
        target = quote(b"%b://%b%b" % (scheme, host, path), safe="")
        if len(target) > MAX_TARGET:
            target = quote(b"%b://%b/" % (scheme, host), safe="")[:MAX_TARGET]
        return f"{self._login_page}?rd={target}"


def _is_safe(scope: Scope, headers: Headers) -> bool:
    """Return whether a request changes nothing. It does not, if both its method and X-Forwarded-Method say so.

    No trusted proxy is needed for that: a second method only makes this stricter. A GET with an Origin may be a POST,
    if there is no X-Forwarded-Method (proxies may ask with GET about any request), and a WebSocket, if there is no
    Sec-Fetch-Mode (not all browsers send it with one).
    """
    mode, method = headers.get(b"sec-fetch-mode"), headers.get(b"x-forwarded-method")
    if scope["method"] not in SAFE_METHODS or mode == b"websocket":
        return False
    if b"origin" in headers and (method is None or mode is None):
        return False
    if method is None:
        return True
    if len(headers) == len(scope["headers"]):
        return method in _SAFE_METHODS
    return all(value in _SAFE_METHODS for name, value in scope["headers"] if name == b"x-forwarded-method")


def _forwarded(scope: Scope) -> dict[bytes, bytes]:
    """Return what a trusted proxy says about the request it asks about, without what it says twice."""
    pairs = [(name, value) for name, value in scope["headers"] if name in _FORWARDED]
    if not is_from_trusted_proxy(scope):
        if pairs and _IGNORED not in (logged := logged_once(scope)):
            logged.add(_IGNORED)
            _warn(scope)
        return {}
    names = [name for name, _ in pairs]
    return {name: value for name, value in pairs if names.count(name) == 1}


def _warn(scope: Scope) -> None:
    """Log that a peer may be a proxy that is not trusted: browsers would not get back to the page they opened."""
    peer = network(str((scope.get("client") or ("",))[0])[:64])
    log.warning(
        "forwarded_page_ignored",
        peer=peer,
        action="if this is your proxy, list it in server.trusted_proxies: without it, logins do not lead back",
    )


def _is_navigation(scope: Scope) -> bool:
    """Return whether a browser opens a page, as opposed to a part of one."""
    headers: Headers = dict(scope["headers"])
    mode = headers.get(b"sec-fetch-mode")
    if mode is not None:
        return mode == b"navigate"
    method = headers.get(b"x-forwarded-method", scope["method"].encode())
    return method == b"GET" and b"text/html" in headers.get(b"accept", b"")
