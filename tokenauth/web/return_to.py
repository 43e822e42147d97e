"""Where a browser may be sent: only to pages of the origins that the configuration lists."""

import re
from collections.abc import Sequence

from tokenauth.settings.model import BrowserSettings
from tokenauth.settings.origin import Origin, parse_origin

MAX_LENGTH = 4096
"""Characters of an address; a longer one is not allowed."""

_ADDRESS = re.compile(r"([A-Za-z]{4,5}://[A-Za-z0-9._:\[\]-]+)(/[\x21-\x5b\x5d-\x7e]*)?")
"""An absolute URL as browsers send it: without user info, and in printable ASCII without a backslash."""


class ReturnTo:
    """Knows the allowed origins: those of `browser.return_to`, and that of the login page."""

    def __init__(self, settings: BrowserSettings) -> None:
        self._origins: Sequence[Origin] = (settings.origin, *settings.return_origins)

    def allowed(self, address: str) -> str | None:
        """Return an address, with scheme and host in lower case, if a browser may be sent there; otherwise None.

        What is not certainly an absolute URL of an allowed origin is not allowed: nothing is repaired.
        """
        match = _ADDRESS.fullmatch(address) if len(address) <= MAX_LENGTH else None
        origin = None if match is None else self._find(match[1])
        return None if match is None or origin is None else f"{origin}{match[2] or '/'}"

    def allows_origin(self, origin: str) -> bool:
        """Return whether an Origin header names an allowed origin."""
        return self._find(origin) is not None

    def form_action(self) -> str:
        """Return the sources of the Content-Security-Policy's `form-action`. Chromium also checks redirects."""
        # The policy cannot name an IPv6 address.
        sources = (f"{origin.scheme}:" if origin.host.startswith("[") else str(origin) for origin in self._origins[1:])
        return " ".join(dict.fromkeys(["'self'", *sources]))

    def _find(self, text: str) -> Origin | None:
        origin = parse_origin(text.lower())
        if origin is None or origin.below or not any(allowed.covers(origin) for allowed in self._origins):
            return None
        return origin


def host_of(address: str) -> str:
    """Return host and port of an allowed address, to show them."""
    return address.split("/", 3)[2]
