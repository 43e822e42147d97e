"""The cookies of the login page. One of them holds a login token."""

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence

from starlette.types import Scope

from tokenauth.settings.model import BrowserSettings

Header = tuple[bytes, bytes]

_FORM_VALUE = re.compile(rb"[A-Za-z0-9_-]{22}")


class Cookies:
    """Reads, sets and deletes the cookies.

    Each name has a prefix: browsers accept a `__Secure-` cookie only over https, and a `__Host-` cookie only from the
    host that uses it. Over http, which is for this machine only, there is no prefix. Another configuration may have
    left other variants of the login cookie in a browser. They log nobody in, and a log-out ends and deletes them.
    """

    def __init__(self, settings: BrowserSettings) -> None:
        self._secure = settings.origin.secure
        host, domain = settings.origin.host, settings.domain
        self._domain = domain
        if not self._secure:
            self.name, self._form_name = "tokenauth", "tokenauth-form"
            self._others: Sequence[tuple[str, str]] = ()
        else:
            self._form_name = "__Host-tokenauth-form"
            self.name = "__Secure-tokenauth" if domain else "__Host-tokenauth"
            others = [("__Host-tokenauth", ""), ("__Secure-tokenauth", "")]
            others += [("__Secure-tokenauth", parent) for parent in _domains_of(host)]
            self._others = [other for other in others if other != (self.name, domain)]
        self._wanted = self.name.encode() + b"="
        self._all_wanted = tuple({self._wanted, *(name.encode() + b"=" for name, _ in self._others)})
        self._form_wanted = self._form_name.encode() + b"="

    def login_values(self, scope: Scope) -> Sequence[bytes]:
        """Return the different values of the login cookie that a request has.

        Several mean that some other host has set one of them: there is no telling which.
        """
        return _read(_headers(scope), self._wanted)

    def values_in(self, header: bytes) -> Sequence[bytes]:
        """Return the same as `login_values`, of the only Cookie header."""
        before, name, rest = header.partition(self._wanted)
        if not name:
            return ()
        if self._wanted not in rest and (not before or before.endswith(b"; ")):  # as in nearly all requests
            return (rest.partition(b";")[0].strip(),)
        return _read([header], self._wanted)

    def all_login_values(self, scope: Scope) -> Sequence[bytes]:
        """Return the values of all variants of the login cookie, so that a log-out ends all of them."""
        return [value for wanted in self._all_wanted for value in _read(_headers(scope), wanted)]

    def has_form_value(self, scope: Scope) -> bool:
        """Return whether a request has the cookie of forms, whatever its value."""
        return bool(_read(_headers(scope), self._form_wanted))

    def form_values(self, scope: Scope) -> Sequence[str]:
        """Return the values of which a form must repeat one (see `new_form_value`).

        Over https several count as none: another host has set one of them. Over http they count, since servers on other
        ports of this machine can set one; requests of their pages are refused by Sec-Fetch-Site or Origin.
        """
        found = _read(_headers(scope), self._form_wanted)
        if len(found) > 1 and self._secure:
            return ()
        return [value.decode() for value in found if _FORM_VALUE.fullmatch(value)]

    def log_in(self, value: str, max_age: int | None) -> list[Header]:
        """Return the headers that set the login cookie. Without `max_age` it ends with the browser."""
        return [self._set_cookie(self.name, value, self._domain, max_age), *self._delete_others()]

    def log_out(self) -> list[Header]:
        """Return the headers that delete the login cookie, in all variants."""
        return [self._set_cookie(self.name, "", self._domain, 0), *self._delete_others()]

    def set_form_value(self, value: str) -> Header:
        """Return the header that sets the value that a form must repeat."""
        return self._set_cookie(self._form_name, value, "", None)

    def _delete_others(self) -> Iterator[Header]:
        for name, domain in self._others:
            yield self._set_cookie(name, "", domain, 0)

    def _set_cookie(self, name: str, value: str, domain: str, max_age: int | None) -> Header:
        """Set or delete a cookie. Browsers ignore a deletion that differs from the setting in Domain or Path."""
        cookie = f"{name}={value}; Path=/; HttpOnly; SameSite=Lax"
        if self._secure:
            cookie += "; Secure"
        if domain:
            cookie += f"; Domain={domain}"
        if max_age is not None:
            cookie += f"; Max-Age={max_age}"
        return b"set-cookie", cookie.encode()


def new_form_value() -> str:
    """Return a value for a form and a cookie. A page of another site can neither read nor set the cookie."""
    return secrets.token_urlsafe(16)


def _headers(scope: Scope) -> list[bytes]:
    return [value for name, value in scope["headers"] if name == b"cookie"]


def _read(headers: Iterable[bytes], wanted: bytes) -> list[bytes]:
    """Return the different values of a cookie; `wanted` is its name and "="."""
    pairs = [pair.strip() for header in headers for pair in header.split(b";")]
    return list(dict.fromkeys(pair[len(wanted) :] for pair in pairs if pair.startswith(wanted)))


def _domains_of(host: str) -> Iterator[str]:
    """Yield the domains that a cookie of a host can have had."""
    if host.startswith("[") or host.replace(".", "").isdigit():  # an IP address has none
        return
    labels = host.split(".")
    for start in range(len(labels) - 1):
        yield ".".join(labels[start:])
