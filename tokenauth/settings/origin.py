"""Origins of web pages, as the configuration names them."""

import re
from typing import NamedTuple

from tokenauth.settings.fields import SettingError

DOMAIN = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]*[a-z_-][a-z0-9_-]*")
"""A domain, and no IP address and no top-level domain, in lower case."""

NO_USER = "must have no user and no password: remove everything between '//' and '@'"
"""The problem of a URL with an '@'. It does not show the URL: what is before the '@' may be a password."""

_ORIGIN = re.compile(r"(https?)://(\*\.)?((?:[a-z0-9_-]+\.)*[a-z0-9_-]+|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "[::1]"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Scheme, host and port of pages; `below` means all hosts below `host`, and not the host itself."""

    scheme: str
    host: str
    port: int
    below: bool = False

    def __str__(self) -> str:
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{'*.' if self.below else ''}{self.host}{port}"

    def covers(self, other: "Origin") -> bool:
        """Return whether the other one is this, or one of this."""
        if (self.scheme, self.port) != (other.scheme, other.port):
            return False
        return other.host.endswith(f".{self.host}") if self.below else other.host == self.host

    @property
    def secure(self) -> bool:
        return self.scheme == "https"


def parse_origin(text: str) -> Origin | None:
    """Return what an origin such as "https://app.example.com" or "https://*.example.com" names. None if it is none."""
    match = _ORIGIN.fullmatch(text)
    if match is None or int(match[4] or 1) > 65535:
        return None
    return Origin(match[1], match[3], int(match[4] or _DEFAULT_PORTS[match[1]]), match[2] is not None)


def check_origin(key: str, text: str) -> Origin:
    """Return the origin in the setting `key`: https, or http on this machine. Raises SettingError."""
    origin = parse_origin(text.lower())
    if origin is None:
        hint = ""
        if "@" in text:
            raise SettingError(key, NO_USER)
        if not text.isascii():
            hint = "; write the host as 'xn--...'"
        elif parse_origin("/".join(text.lower().split("/")[:3])):
            hint = "; write it without the slash and what follows"
        elif "*" in text:
            hint = "; the only wildcard is '*.' in front of a host"
        elif "://" not in text:
            hint = f"; write 'https://{text[:80]}'"
        raise SettingError(key, "must be an origin such as 'https://auth.example.com'", f", not {text[:80]!r}{hint}")
    if not origin.secure and origin.host not in _THIS_MACHINE:
        problem = "must begin with https (http only for localhost, 127.0.0.1 and [::1])"
        raise SettingError(key, problem, f", not {text[:80]!r}")
    if origin.below and not DOMAIN.fullmatch(origin.host):
        raise SettingError(key, "'*.' needs a domain such as 'example.com'", f", not {origin.host!r}")
    return origin
