"""The dialects: services whose HTTP is served over pools. One row each; their HTTP is in `web/dialects/`."""

import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

from tokenauth import values
from tokenauth.settings.fields import Table, text

_PREFIX = text(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*", "empty or a path such as '/pool', without a slash at its end")
_PASSWORD = text(r"[\x21-\x7e]{1,1024}", "1 to 1024 ASCII characters without blanks, as a header", secret=True)


class DialectSettings(Table, frozen=True):
    """A dialect that is served."""

    pool: str
    prefix: Annotated[str, _PREFIX] = ""
    require_token: bool = False


class PasswordDialectSettings(DialectSettings, frozen=True, kw_only=True):
    """A dialect that has a password of its own, which every request carries."""

    password: Annotated[str, _PASSWORD]


class Dialect(NamedTuple):
    """What the other modules need to know about a dialect."""

    settings: type[DialectSettings] = DialectSettings
    new_value: Callable[[], str] | None = None
    """Makes the values of its pool's tokens, if its clients expect a certain form."""
    request_headers: tuple[str, ...] = ()
    """Headers of its own that pages of other origins can send."""
    needs_prefill: bool = False
    """Whether its pool must have prefill."""
    ages_while_leased: bool = False
    """Whether time under a lease that lapsed counts towards `token_ttl`."""


def _new_uuid() -> str:
    """Return a random UUID (RFC 9562 section 5.4; 122 bits of entropy)."""
    return str(uuid.uuid4())


def _new_prefixed() -> str:
    return f"token_{values.new_value()}"


DIALECTS: Mapping[str, Dialect] = {
    "simple-token-implement": Dialect(PasswordDialectSettings, request_headers=("X-API-PASSWORD",), needs_prefill=True),
    "token-pool": Dialect(new_value=_new_uuid, ages_while_leased=True),
    "random-token-generator": Dialect(new_value=_new_uuid),
    "token-management-service": Dialect(new_value=_new_prefixed),
}
