"""The pages for people: log in, log out, and where the user is logged in."""

import hmac
from collections.abc import Mapping
from datetime import UTC, datetime

from starlette.responses import Response

from tokenauth import user_agents
from tokenauth.addresses import network
from tokenauth.errors import InvalidCredentials, InvalidRequest, Refusal, RetryLater, StoreUnavailable, TooManyAttempts
from tokenauth.logs import log
from tokenauth.models import IssuedToken, Login, Token, TokenKind
from tokenauth.settings.model import Settings
from tokenauth.tokens import Tokens
from tokenauth.web.browser_auth import TWO_COOKIES
from tokenauth.web.cookies import Cookies, new_form_value
from tokenauth.web.csrf import OWN_ORIGIN, Hosts
from tokenauth.web.exceptions import ForeignOrigin, ForeignPage
from tokenauth.web.html import Pages, see_other
from tokenauth.web.requests import Request
from tokenauth.web.responses import STATUS, RawHeaders
from tokenauth.web.return_to import ReturnTo, host_of
from tokenauth.web.routing import Route

LOGIN, LOGOUT, HOME = PATHS = "/login", "/logout", "/"

_LOGGED_OUT = f"{LOGOUT}?done=1"
"""Where a log-out leads that ended the token of a cookie. One without a cookie must not claim that."""

_SHOWN = 20
"""Logins that the page at / lists, and named tokens."""

_NOTHING_ENDED = "Your login had ended already, so it could not end your other logins. Log in and try again."

_TWO_COOKIES = (
    "Your browser has two different login cookies. One of them may come from another site of this domain, so neither"
    " was used. Log in again. If this comes back, delete the cookies of this domain."
)


class LoginRoutes:
    def __init__(self, settings: Settings, tokens: Tokens, cookies: Cookies, return_to: ReturnTo) -> None:
        self._tokens = tokens
        self._hosts = Hosts((), {settings.browser.origin.host})
        self._cookies = cookies
        self._return_to = return_to
        self._remember_ttl = settings.browser.remember_ttl
        self._origin = str(settings.browser.origin)
        self._host = host_of(self._origin)
        self._cookie_domain = settings.browser.domain or settings.browser.origin.host
        self._pages = Pages(self._host, return_to.form_action())

    def routes(self) -> list[Route]:
        return [
            Route(LOGIN, {"GET": self.show_login, "POST": self.log_in}),
            Route(LOGOUT, {"GET": self.show_logout, "POST": self.log_out}),
        ]

    # Log in

    async def show_login(self, request: Request) -> Response:
        rd = _find_target(request)
        try:
            login, headers, note = await self._find_login(request)
        except RetryLater as refusal:
            return self._login_page(request, rd, refusal=refusal)
        if login is None:
            return self._login_page(request, rd, headers=headers, note=note or _sent_note(request))
        target = self._return_to.allowed(rd)
        return self._pages.render(
            "logged_in.html",
            username=login.user.username,
            target=target,
            target_host=target and host_of(target),
            cookie_domain=self._cookie_domain,
            note=_sent_note(request) or self._refused_target(rd),
        )

    async def log_in(self, request: Request) -> Response:
        form = await request.form_body()
        rd, username = _find_target(request, form), form.get("username", "")
        remember = "remember" in form
        try:
            self._check_form(request, form)
            issued = await self._tokens.issue(
                username,
                form.get("password", ""),
                request.client_address,
                request.user_agent,
                request.disconnect_check,
                self._remember_ttl if remember else None,
            )
            await self._end_replaced(request, issued)
        except Refusal as refusal:
            return self._login_page(request, rd, username, remember, refusal=refusal)
        max_age = int(self._remember_ttl) if remember else None
        return see_other(self._return_to.allowed(rd) or HOME, self._cookies.log_in(issued.value, max_age))

    def _login_page(
        self,
        request: Request,
        rd: str,
        username: str = "",
        remember: bool = False,
        *,
        refusal: Refusal | None = None,
        headers: RawHeaders = (),
        note: str = "",
    ) -> Response:
        target = self._return_to.allowed(rd)
        csrf, form_headers = self._form_value(request)
        status, retry_headers = _status_and_headers(refusal)
        return self._pages.render(
            "login.html",
            status,
            [*headers, *form_headers, *retry_headers],
            error=explain(refusal),
            note=note or self._refused_target(rd),
            csrf=csrf,
            rd=target or "",
            target_host=target and host_of(target),
            username=username,
            remember=remember,
            remember_time=in_words(self._remember_ttl),
        )

    async def _end_replaced(self, request: Request, issued: IssuedToken) -> None:
        """End the login of the cookie that a new one replaces. If that fails, the new one ends, and the old one stays.

        This comes after the new login, which would otherwise fail with the person logged out for nothing.
        """
        replaced = self._cookies.all_login_values(request.scope)
        try:
            await self._tokens.log_out(replaced, request.client_address, request.disconnect_check)
        except BaseException:  # also at the end of a stop: nobody gets the new cookie
            await self._tokens.take_back(issued, request.client_address)
            raise

    # Log out

    async def show_logout(self, request: Request) -> Response:
        rd = _find_target(request)
        if not self._cookies.all_login_values(request.scope):
            done = bool(_query_values(request, "done"))
            return self._pages.render("logged_out.html", note=self._refused_target(rd), done=done)
        return await self._logout_page(request, rd)

    async def log_out(self, request: Request) -> Response:
        form = await request.form_body()
        rd = _find_target(request, form)
        everywhere = "everywhere" in form
        try:
            self._check_form(request, form)
            if everywhere:
                login, headers, note = await self._find_login(request)
                if login is None:
                    return self._login_page(request, rd, headers=headers, note=note or _NOTHING_ENDED)
                await self._tokens.revoke_all(login.user.username, kind="login")
            ended = self._cookies.all_login_values(request.scope)
            await self._tokens.log_out(ended, request.client_address, request.disconnect_check)
        except Refusal as refusal:
            return await self._logout_page(request, rd, refusal, everywhere)
        default = _LOGGED_OUT if ended else LOGOUT
        return see_other(self._return_to.allowed(rd) or default, self._cookies.log_out())

    async def _logout_page(
        self, request: Request, rd: str, refusal: Refusal | None = None, everywhere: bool = False
    ) -> Response:
        try:
            login, headers, note = await self._find_login(request)
        except RetryLater:  # logging out works all the same
            login, headers, note = None, (), ""
        if login is None and headers and not note:  # the cookie was no longer valid
            return self._pages.render("logged_out.html", headers=headers, note=self._refused_target(rd), done=False)
        csrf, form_headers = self._form_value(request)
        status, retry_headers = _status_and_headers(refusal)
        return self._pages.render(
            "logout.html",
            status,
            [*form_headers, *retry_headers],
            error=explain(refusal),
            note=self._refused_target(rd),
            csrf=csrf,
            rd=self._return_to.allowed(rd) or "",
            username=login and login.user.username,
            everywhere=everywhere,
        )

    # Where the user is logged in

    async def show_logins(self, request: Request) -> Response:
        try:
            login, headers, _ = await self._find_login(request)
            if login is None:
                return see_other(LOGIN, headers)
            logins = await self._list(login, "login")
            named = await self._list(login, "named")
        except RetryLater as refusal:
            return self._login_page(request, "", refusal=refusal)
        logins.sort(key=lambda one: not one["current"])
        csrf, form_headers = self._form_value(request)
        return self._pages.render(
            "logins.html",
            headers=form_headers,
            username=login.user.username,
            logins=logins[:_SHOWN],
            more_logins=max(0, len(logins) - _SHOWN),
            named=named[:_SHOWN],
            more_named=max(0, len(named) - _SHOWN),
            csrf=csrf,
        )

    async def _list(self, login: Login, kind: TokenKind) -> list[dict[str, object]]:
        listed = await self._tokens.list_live(login.user.username, kind)
        return [_describe(token, login.token) for token in listed]

    # The cookie and the forms

    async def _find_login(self, request: Request) -> tuple[Login | None, RawHeaders, str]:
        """Return the login of the cookie; without one, the headers that delete a cookie that is not valid, and a note.

        Raises StoreUnavailable.
        """
        values = self._cookies.login_values(request.scope)
        if len(values) > 1:
            log.warning("cookie_twice", route=request.scope["path"])
            return None, self._cookies.log_out(), _TWO_COOKIES
        login = await self._tokens.identify(values[0]) if values else None
        return login, self._cookies.log_out() if values and login is None else (), ""

    def _form_value(self, request: Request) -> tuple[str, RawHeaders]:
        """Return the value that a form must repeat, and the header that sets its cookie if there is none yet."""
        found = self._cookies.form_values(request.scope)
        if found:
            return found[0], ()
        made = new_form_value()
        return made, [self._cookies.set_form_value(made)]

    def _check_form(self, request: Request, form: dict[str, str]) -> None:
        """Raise ForeignPage unless the form was on a page of this service, in the same browser.

        Browsers say where a form comes from in Sec-Fetch-Site, or in Origin, which is "null" because of our
        Referrer-Policy. For those that say neither, there is the cookie whose value the form repeats: pages of other
        sites can neither read nor set it.
        """
        site, origin = request.header(b"sec-fetch-site"), request.header(b"origin")
        foreign = _is_foreign(origin, self._origin) if site is None else site not in OWN_ORIGIN
        try:
            if foreign:
                raise ForeignPage(f"This form came from a page of another site. Open {self._origin} and try again.")
            self._hosts.check(request.scope)
            expected = self._cookies.form_values(request.scope)
            if not expected and self._cookies.has_form_value(request.scope):
                raise ForeignPage(
                    f"Your browser has a cookie that another site set for {self._host}. Delete its cookies, open"
                    f" {self._origin}{LOGIN}, and try again."
                )
            if not expected:
                target = self._return_to.allowed(_find_target(request, form))
                purpose = f", so it would not get to {host_of(target)}" if target else ""
                raise ForeignPage(
                    f"Your browser did not keep the cookie of {self._host}{purpose}. Open {self._origin}{LOGIN}, allow"
                    " its cookies, and try again."
                )
            repeated = form.get("csrf", "").encode()
            if not any(hmac.compare_digest(value.encode(), repeated) for value in expected):
                raise ForeignPage("This form was out of date. Try again.")
        except ForeignOrigin as refusal:
            log.warning("form_refused", route=request.scope["path"], network=network(request.client_address))
            raise refusal from None

    def _refused_target(self, rd: str) -> str:
        """Say that a browser is not sent to a page that it came from."""
        if not rd or self._return_to.allowed(rd):
            return ""
        return (
            "You will not be sent back to the page that you came from. Tell your administrator: browser.return_to of"
            f" {self._host} does not list its address."
        )


def _is_foreign(origin: bytes | None, own: str) -> bool:
    return origin not in {None, b"null", own.encode()}


def _find_target(request: Request, form: Mapping[str, str] | None = None) -> str:
    """Return where the browser wants to go: by the form, or else by the query. Nothing has checked it yet.

    The form repeats an address that was allowed. It is sent to the URL of its page, whose query has the others.
    """
    found = _query_values(request, "rd")
    in_form = "" if form is None else form.get("rd", "")
    return in_form or "\n".join(sorted(found))  # several different ones become one that is no address


def _query_values(request: Request, name: str) -> set[str]:
    """Return the values of a query parameter. In a query that is too long: none, except an `rd` that is no address."""
    try:
        return set(request.query_values(name))
    except InvalidRequest:  # people get a page, which says that it leads nowhere else
        return {"\n"} if name == "rd" else set()


def _sent_note(request: Request) -> str:
    """Return what /auth has found out about the cookies: a proxy may have kept one of them from this page."""
    return _TWO_COOKIES if TWO_COOKIES.encode() in request.scope["query_string"].split(b"&") else ""


def _status_and_headers(refusal: Refusal | None) -> tuple[int, RawHeaders]:
    if refusal is None:
        return 200, ()
    retry = [(b"retry-after", b"%d" % refusal.retry_after)] if isinstance(refusal, RetryLater) else ()
    return STATUS[type(refusal)], retry


def explain(refusal: Refusal | None) -> str:
    """Say to a person why a form was refused."""
    match refusal:
        case None:
            text = ""
        case InvalidCredentials():
            text = "The user name or the password is wrong."
        case TooManyAttempts():
            text = f"Too many failed logins. Try again in {in_words(refusal.retry_after)}."
        case StoreUnavailable():
            text = "Nobody can log in now: the database is unavailable. Try again shortly."
        case RetryLater():
            text = "The server is busy. Try again shortly."
        case InvalidRequest():
            text = f"This cannot be a user name and a password: {refusal}."
        case _:
            text = str(refusal)
    return text


def _describe(token: Token, current: Token) -> dict[str, object]:
    return {
        "current": token.digest == current.digest,
        "name": token.name,
        "browser": user_agents.short_name(token.user_agent),
        "address": token.address,
        "since": _time(token.issued_at),
        "used": token.last_used_at and _time(token.last_used_at),
        "until": _time(token.expires_at),
        "slides": token.is_extendable,
    }


def _time(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).strftime("%Y-%m-%d %H:%M UTC")


def in_words(seconds: float) -> str:
    """Return a duration, rounded up: "1 second", "90 seconds", "3 minutes", "30 days"."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60))
    unit, size = next(((unit, size) for unit, size in units if seconds == size or seconds >= 2 * size), ("second", 1))
    count = -int(-seconds // size)
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
