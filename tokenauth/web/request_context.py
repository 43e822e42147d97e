"""What the log and the audit log say of an HTTP request: its trace, its user, and where it came from."""

import re
from collections.abc import Mapping

from starlette.types import Scope

from tokenauth.models import Identity, Token
from tokenauth.request_context import RequestContext, current_request
from tokenauth.values import redact
from tokenauth.web.client_address import client_address
from tokenauth.web.requests import Request

# W3C Trace Context, section 3.2. Later versions may append fields.
_TRACE_PARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-[0-9a-f]{2}"
    rb"(?P<more>-.*)?",
    re.DOTALL,
)

_REQUEST_ID = re.compile(rb"[0-9A-Fa-f-]{8,36}")
"""What proxies make: 32 hexadecimal digits, or a UUID. No token has this form."""


class HttpContext(RequestContext):
    """The context of one request."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def trace(self) -> Mapping[str, str]:
        found = _TRACE_PARENT.fullmatch(self._only(b"traceparent"))
        if found is None or (found["version"] == b"00" and found["more"]):
            return {}
        return {"trace_id": found["trace"].decode(), "span_id": found["span"].decode()}

    def origin(self) -> Mapping[str, str]:
        scope = self._scope
        token: Token | None = scope.get("token")
        user: Identity | None = scope.get("user")
        request_id = _REQUEST_ID.fullmatch(self._only(b"x-request-id"))
        known = {
            "by": user and user.username,
            "by_token": token and token.id,
            "address": client_address(scope),
            "user_agent": redact(Request(scope).user_agent),
            "request_id": request_id and request_id[0].decode(),
        }
        return {key: value for key, value in known.items() if value}

    def _only(self, name: bytes) -> bytes:
        """Return the only header of a name; of several, none can be trusted to be right."""
        found = [value for key, value in self._scope["headers"] if key == name]
        return found[0].strip() if len(found) == 1 else b""


def set_current(scope: Scope) -> None:
    """Let what this task logs from now on name this request."""
    current_request.set(HttpContext(scope))
