"""Who may use the API: programs with a token in a header, and the pages of /console with the login page's cookie."""

from collections.abc import Awaitable

from starlette.types import ASGIApp, Scope

from tokenauth.errors import InvalidToken, TokenRequired
from tokenauth.logs import log
from tokenauth.models import Login
from tokenauth.settings.model import BrowserSettings
from tokenauth.tokens import Tokens
from tokenauth.web.cookies import Cookies
from tokenauth.web.middleware import TokenMiddleware
from tokenauth.web.requests import bearer
from tokenauth.web.routing import route_path
from tokenauth.web.validation_counting import CountingValidator

HEADER = (b"x-tokenauth-console", b"1")
"""The header of each request of the console.

No page of another origin can send it: browsers first ask whether it may (a CORS preflight), and no answer allows it.
"""

_SAFE_METHODS = frozenset({"GET", "HEAD"})


class ConsoleGuard(TokenMiddleware):
    """Requires a valid token as TokenMiddleware does, and also takes that of the cookie, from the console only.

    What the console only reads does not count as a use of the token: otherwise an open console would keep a login alive
    while nobody is there.
    """

    def __init__(self, app: ASGIApp, tokens: CountingValidator | Tokens, browser: BrowserSettings) -> None:
        """`browser`: the settings of the login page; without its URL there is no cookie."""
        super().__init__(app, tokens)
        self._validator = tokens
        self._cookies = Cookies(browser) if browser.url else None
        self._origin = str(browser.origin).encode() if browser.url else b""

    def _identify(self, scope: Scope) -> Awaitable[Login | None]:
        value = bearer(scope)
        if HEADER not in scope["headers"]:
            if value is None:
                raise TokenRequired
            return self._validator.identify(value)
        if value is None:
            value = self._cookie(scope)
        return self._validator.identify(value, touch=scope["method"] not in _SAFE_METHODS)

    def _cookie(self, scope: Scope) -> bytes:
        """Return the token of the cookie. Raises TokenRequired if there is none, or another page may have sent it."""
        if self._cookies is None or not self._is_own_page(scope):
            raise TokenRequired
        values = self._cookies.login_values(scope)
        if len(values) > 1:  # another host may have set one of them
            log.warning("cookie_twice", route=route_path(scope))
            raise InvalidToken
        if not values:
            raise TokenRequired
        return values[0]

    def _is_own_page(self, scope: Scope) -> bool:
        """Return whether a page of this service has sent a request.

        A browser without Sec-Fetch-Site sends Origin with each POST, PUT and DELETE. With a GET of a page of another
        origin it does so as well, because of HEADER.
        """
        sites = {value for name, value in scope["headers"] if name == b"sec-fetch-site"}
        if sites:
            return sites == {b"same-origin"}
        return {value for name, value in scope["headers"] if name == b"origin"} <= {self._origin}
