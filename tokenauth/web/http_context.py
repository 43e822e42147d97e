"""What the log and the audit log say of an HTTP request: its trace, its user, and where it came from."""

import re
from collections.abc import Mapping

from starlette.types import Scope

from tokenauth.request_context import RequestContext, current_request
from tokenauth.web.client_address import client_address
from tokenauth.web.requests import describe_agent

# W3C Trace Context, section 3.2. Later versions may append fields.
_TRACE_PARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-[0-9a-f]{2}"
    rb"(?P<more>-.*)?",
    re.DOTALL,
)

_REQUEST_ID = re.compile(rb"[0-9A-Fa-f-]{8,36}")
"""What proxies make: 32 hexadecimal digits, or a UUID. No token has this form."""


class HttpContext(RequestContext):
    __slots__ = ("_scope",)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def trace(self) -> Mapping[str, str]:
        sent = b""
        for name, value in self._scope["headers"]:
            if name == b"traceparent":
                if sent:  # of several, none can be trusted to be right
                    return {}
                sent = value
        return _trace(sent) if sent else {}

    def origin(self) -> Mapping[str, str]:
        scope = self._scope
        found = {"address": client_address(scope)}
        for name, value in scope["headers"]:
            if name == b"user-agent":
                found.setdefault("user_agent", describe_agent(value))
            elif name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                found.setdefault("request_id", value.decode())
        if "user" in scope and scope["user"].username:
            found["by"] = scope["user"].username
        if "token" in scope:
            found["by_token"] = scope["token"].id
        return found


def _trace(sent: bytes) -> Mapping[str, str]:
    found = _TRACE_PARENT.fullmatch(sent.strip())
    if found is None or (found["version"] == b"00" and found["more"]):
        return {}
    return {"trace_id": found["trace"].decode(), "span_id": found["span"].decode()}


def set_current_request(scope: Scope) -> None:
    """Let what this task logs from now on name this request."""
    current_request.set(HttpContext(scope))
