"""Hooks for schemathesis: how to log in to the running service, and which tokens exist.

schemathesis imports this module in its own process (SCHEMATHESIS_HOOKS).
"""

import os
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4
from zlib import crc32

import requests
import schemathesis
from schemathesis import Case, HookContext
from schemathesis.auths import AuthContext
from schemathesis.generation.meta import CaseMetadata

from tests.wire.openapi.configurations import API_PASSWORD
from tokenauth.models import is_visible
from tokenauth.web.routes import console

URL = os.environ.get("TOKENAUTH_URL", "")
USER = os.environ.get("TOKENAUTH_USER", "")
"""The user who sends the requests. Empty: no login."""

_CLIENT = {"client_id": "admin", "client_secret": "admin"}
_session = requests.Session()
_headers: dict[str, str] = {}


def _send(method: str, path: str, document: dict[str, Any] | None = None) -> Any:
    if not _headers:
        _headers.update({"X-Token": _log_in("admin"), "X-API-PASSWORD": API_PASSWORD})
    answer = _session.request(method, URL + path, json=document, headers=_headers, timeout=30)
    assert answer.ok, (path, answer.status_code, answer.text)
    return answer.json()


def _log_in(username: str) -> str:
    password = "admin" if username == "admin" else f"{username}-secret"
    document = {"username": username, "password": password}
    return str(_session.post(f"{URL}/api/token", json=document, timeout=30).json()["token"])


class Login:
    """Adds the credentials that an operation needs."""

    def get(self, case: Case[Any], context: AuthContext) -> Mapping[str, str]:
        """Log in. Operations that end logins get a new token."""
        operation = f"{case.method} {context.operation.path}"
        if operation == "DELETE /api/token":
            return {"X-Token": _log_in(USER)}
        if operation == "DELETE /api/tokens":
            return {"X-Token": _log_in("ann")}
        if context.operation.path.startswith("/oauth/"):
            if isinstance(case.body, dict) and _CLIENT.keys() & case.body.keys():
                return {}  # a schema cannot express that a client must not authenticate twice
            if not operation.endswith("/introspect"):
                return {"Authorization": requests.auth._basic_auth_str(USER, USER)}
        if context.operation.path.startswith("/simple/"):
            return {"X-API-PASSWORD": API_PASSWORD}
        if "X-Token" not in _own:
            _own["X-Token"] = _log_in(USER)
        return _own

    def set(self, case: Case[Any], data: Mapping[str, str], context: AuthContext) -> None:
        case.headers.update(data)


_own: dict[str, str] = {}

if USER:
    schemathesis.auth(refresh_interval=None)(Login)


def _in_pool() -> dict[str, Any]:
    (token,) = _send("POST", "/api/pools/uuids/tokens", {"count": 1})["tokens"]
    return {"pool": "uuids", "token": token}


def _leased() -> dict[str, Any]:
    _in_pool()
    lease = _send("POST", "/api/pools/uuids/leases")
    return {"pool": "uuids", **lease}


def _in_line() -> dict[str, Any]:
    for _ in range(2):  # one user leases one phone at most, and then waits
        answer = _send("POST", "/api/pools/phones/leases", {"wait": 0})
    return {"pool": "phones", "request": answer["request"], "user": "admin"}


def _login_id() -> dict[str, Any]:
    _log_in("ann")
    (newest, *_) = _send("GET", "/api/tokens?user=ann")["tokens"]
    return {"id": newest["id"], "user": "ann"}


def _failed_login() -> dict[str, Any]:
    _session.post(f"{URL}/api/token", json={"username": "ann", "password": "wrong"}, timeout=30)
    return {"user": "ann", "address": "127.0.0.1", "network": "127.0.0.0/24"}


def _named() -> dict[str, Any]:
    _send("DELETE", "/api/tokens?kind=named")
    return {**_send("POST", "/api/tokens", {"name": "live"}), "overlap": "1h"}


def _unnamed() -> dict[str, Any]:
    """Return the fields of a token with a free name. Few random texts are durations or scopes of the user."""
    _send("DELETE", "/api/tokens?kind=named")
    return {"name": str(uuid4()), "scopes": ["admin"], "ttl": "1h"}


def _uuid() -> dict[str, Any]:
    token = _send("POST", "/pool/api/token_pool")["token"]
    return {"token": token, "token_uuid": token}


def _random() -> dict[str, Any]:
    return {"token": _send("POST", "/random/generate")["tokens"][0], "count": 1}


def _random_leased() -> dict[str, Any]:
    _random()
    return dict(_send("POST", "/random/assign"))


def _managed() -> dict[str, Any]:
    return {**_send("POST", "/managed/generate-token"), "client_id": "me"}


def _managed_leased() -> dict[str, Any]:
    _managed()
    return {**_send("POST", "/managed/assign-token", {"client_id": "me"}), "client_id": "me"}


def _introspectable() -> dict[str, Any]:
    return {**_CLIENT, "token": _log_in("ann")}


def _issued() -> dict[str, Any]:
    _session.get(f"{URL}/simple/issue_token", headers={"X-API-PASSWORD": API_PASSWORD}, timeout=30)
    return {}


LIVE: dict[str, Callable[[], dict[str, Any]]] = {
    "GET /auth": lambda: {"scope": "admin"},
    "POST /api/token": lambda: {"username": "ann", "password": "ann-secret"},
    "DELETE /api/throttle": _failed_login,
    "DELETE /api/tokens": lambda: {"user": "ann"},
    "DELETE /api/tokens/{id}": _login_id,
    "POST /api/tokens": _unnamed,
    "POST /api/tokens/{id}/rotate": _named,
    "POST /oauth/token": lambda: {**_CLIENT, "scope": "admin"},
    "POST /oauth/introspect": _introspectable,
    "POST /oauth/revoke": _introspectable,
    "GET /docs/{file}": lambda: {"file": "start.js"},
    "GET /console/{version}/{file}": lambda: {"version": console.version(), "file": "app.js"},
    "GET /api/pools/{pool}": _in_pool,
    "POST /api/pools/{pool}/tokens": lambda: {"pool": "uuids"},
    "GET /api/pools/{pool}/tokens/{token}": _in_pool,
    "DELETE /api/pools/{pool}/tokens/{token}": _in_pool,
    "POST /api/pools/{pool}/leases": _in_pool,
    "DELETE /api/pools/{pool}/requests/{request}": _in_line,
    "PUT /api/pools/{pool}/members/{name}/reservation": lambda: {"pool": "phones", "name": "moto", "until": "1h"},
    "PUT /api/pools/{pool}/leases/{token}": _leased,
    "DELETE /api/pools/{pool}/leases/{token}": _leased,
    "POST /random/assign": _random,
    "POST /random/unblock": _random_leased,
    "DELETE /random/delete": _random,
    "POST /random/keep-alive": _random,
    "POST /managed/assign-token": _managed,
    "POST /managed/keep-alive": _managed_leased,
    "POST /managed/unblock-token": _managed_leased,
    "POST /managed/delete-token": _managed,
    "DELETE /managed/delete-token": _managed,
    "GET /simple/recycle_token": _issued,
    "POST /simple/recycle_token": _issued,
    **{
        f"{operation}{slash}": _uuid
        for operation in (
            "DELETE /pool/api/token_pool",
            "POST /pool/api/block_token",
            "POST /pool/api/keep_alive/{token}",
        )
        for slash in ("", "/")
    },
}
"""Values that exist, created for each request: random values would never match a token."""


@schemathesis.hook
def map_case(context: HookContext, case: Case[Any]) -> Case[Any]:
    """Use existing values in well-formed requests: in all of the coverage phase, in about half of the fuzzed ones."""
    meta = case.meta
    wait = case.body.get("wait") if isinstance(case.body, dict) else None
    if isinstance(case.body, dict) and isinstance(wait, int | float) and 0 < wait <= 60:
        case.body["wait"] = 0.01  # nobody frees what it would wait for
    if meta is None or not meta.generation.mode.is_positive or not USER or not _wanted(case, meta):
        return case
    live = LIVE.get(f"{case.method} {case.operation.path}", dict)()
    for values in (case.path_parameters, case.query, case.body):
        if isinstance(values, dict):
            values.update({name: value for name, value in live.items() if values.get(name) is not None})
    return case


_ALWAYS = {
    ("DELETE", "/api/throttle"),  # what is no address is 400
    ("POST", "/oauth/token"),  # a scope that the client lacks is 400
    ("POST", "/api/tokens"),  # a duration that is too long is 400
    ("POST", "/api/tokens/{id}/rotate"),
    ("PUT", "/api/pools/{pool}/members/{name}/reservation"),
}
"""Operations that refuse some values with 400, which a schema cannot express."""


def _wanted(case: Case[Any], meta: CaseMetadata) -> bool:
    phase = meta.phase.name.value
    if phase == "stateful":  # this phase uses values of earlier responses
        return False
    if (case.method, case.operation.path) in _ALWAYS:
        return True
    sent = [values for values in (case.path_parameters, case.query, case.body) if values]
    return phase != "fuzzing" or not sent or crc32(repr(sent).encode()) % 2 == 0


def _go_together(operation: str, query: Mapping[str, Any]) -> bool:
    """Return whether a request may have all these parameters, which a schema cannot express."""
    sent = {name for name, value in query.items() if value is not None}
    if operation == "DELETE /api/throttle":
        return sent in ({"user", "address"}, {"network"})
    if operation == "GET /api/leases":
        return "after" not in sent  # only the `next` of an answer is valid
    if operation == "GET /api/tokens":
        return not sent & {"search", "limit", "after"} or query.get("user") == "*"
    return True


@schemathesis.hook
def filter_case(context: HookContext, case: Case[Any]) -> bool:
    """Skip requests that are valid for the schema but are refused, and the other way round."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        # The rest of the query, from `path` on, comes from the client and is ignored.
        return case.operation.path != "/auth" or "path" not in (case.query or {})
    if not isinstance(case.body, dict):
        return _go_together(f"{case.method} {case.operation.path}", case.query or {})
    if case.meta.phase.name.value == "stateful" and (
        case.operation.path.startswith("/api/tokens") or case.operation.path.endswith("/reservation")
    ):
        return False  # random texts are no durations; the other phases send some
    if case.body.get("labels"):
        return False  # no member has random labels
    if case.operation.path.endswith("/leases"):
        ttl, count = case.body.get("ttl"), case.body.get("count")
        if not (ttl is None or (isinstance(ttl, int) and 1 <= ttl <= 60)) or count not in {None, 1}:
            return False  # some pools have one token only, and each user has one phone at most
    # 1.0 is an integer for JSON Schema
    whole = all(not isinstance(case.body.get(name), float) for name in ("count", "fence", "priority"))
    # no regular expression that works in all schema readers matches only visible characters
    named = (case.body.get(name) for name in ("holder", "client_id", "note", "for"))
    return whole and all(not isinstance(name, str) or is_visible(name) for name in named)
