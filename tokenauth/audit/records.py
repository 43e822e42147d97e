"""Which events of the log are acts for the audit log, and what a record says of them."""

import os
import socket
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from tokenauth.audit.chain import timestamp
from tokenauth.logs import json_line
from tokenauth.request_context import RequestContext


class Act(NamedTuple):
    """How an event is audited."""

    action: str
    target: tuple[str, ...] = ()
    """Fields of the event that name what was acted on."""
    result: str | None = "ok"
    """How it ended; None if the `reason` of the event says it."""


ACTS: Mapping[str, Act] = {
    "token_issued": Act("login", ("id",)),
    "login_failed": Act("login", result="invalid_credentials"),
    "login_refused": Act("login", result=None),
    "login_not_checked": Act("login", result="overloaded"),
    "token_revoked": Act("revoke_token", ("id",)),
    "revocation_held_in_memory": Act("revoke_token", ("id",), "held"),
    "revocation_lost": Act("revoke_token", ("id",), "lost"),
    "revocations_lost": Act("revoke_tokens", result="lost"),
    "tokens_revoked": Act("revoke_tokens", ("kind",)),
    "revocation_interrupted": Act("revoke_tokens", ("kind",), "interrupted"),
    "named_token_issued": Act("issue_token", ("id",)),
    "named_token_rotated": Act("rotate_token", ("id",)),
    "access_denied": Act("access", ("route",), None),
    "throttle_cleared": Act("clear_throttle", ("range",)),
    "member_reserved": Act("reserve_member", ("pool", "member")),
    "member_unreserved": Act("unreserve_member", ("pool", "member")),
    "lease_forced": Act("end_lease", ("pool", "member")),
    "pool_member_reserved": Act("reserve_member", ("pool", "member")),
    "pool_member_unreserved": Act("unreserve_member", ("pool", "member")),
    "pool_lease_released": Act("end_lease", ("pool", "member")),
    "pool_tokens_generated": Act("generate_pool_tokens", ("pool",)),
    "pool_token_deleted": Act("delete_pool_token", ("pool",)),
    "user_added": Act("add_user"),
    "user_password_changed": Act("change_password"),
    "user_scopes_changed": Act("change_scopes"),
    "user_removed": Act("remove_user"),
    "configuration_written": Act("write_configuration", ("file",)),
    "configuration_refused": Act("start", result="configuration_refused"),
    "reloaded": Act("reload"),
    "reload_refused": Act("reload", result="refused"),
    "reload_ordered": Act("order_reload"),
    "schema_upgraded": Act("upgrade_schema"),
    "database_created": Act("upgrade_schema"),
    "listening": Act("start"),
    "stopping": Act("stop"),
}
"""The acts by event. Events that are not here are not audited."""

LOGOUT = "logout"
"""The action of `token_revoked` when the client sent the token itself: it proves nothing else, so nobody is `by`."""

DROPPED = "lines_dropped"
"""The action of a record that counts those that did not fit into memory."""

MAX_RECORD = 16 * 1024
"""Bytes of a record."""

_MAX_TEXT, _MAX_ITEMS = 1000, 1000
"""Characters of one text in a record, and items of one list."""

_CUTS = (_MAX_TEXT, 10), (_MAX_TEXT, 3), (100, 3), (30, 3)
"""The same for a record that is too long. The last makes any short enough."""

_LEFT_OUT = frozenset({"event", "level", "timestamp", "user", "by", "network", "trace_id", "span_id"})


def make_record(
    event: Mapping[str, object], request: RequestContext | None, command: bool = False
) -> dict[str, object]:
    """Return the record of an event whose name is in ACTS.

    request: the one that caused it. command: whether an operator did it with a command.
    """
    name = str(event["event"])
    act = ACTS[name]
    origin = {} if request is None else {**request.origin(), **request.trace()}
    asked_by = origin.pop("by", None)
    by, user = event.get("by") or asked_by, event.get("user")
    action, details = act.action, {key: _clean(event[key]) for key in event if key not in _LEFT_OUT}
    if action == "revoke_token" and not command and by is None:
        action = LOGOUT  # anyone who has the token can do that
    elif name in {"token_issued", "access_denied"}:
        by = by or user
    record: dict[str, object] = {"time": timestamp(), "action": action}
    record["result"] = details.pop("reason") if act.result is None else act.result
    if by:
        record["by"] = _clean(by)
    if user:
        record["user"] = _clean(user)
    if target := [str(found) for field in act.target if (found := details.pop(field, None)) is not None]:
        record["target"] = _clean("/".join(target))
    record["via"] = "command" if command else "server" if request is None else "http"
    record |= origin
    if details := {key: value for key, value in details.items() if value is not None}:
        record["details"] = details
    record["host"], record["pid"] = _host(), os.getpid()
    return record


def encode(record: Mapping[str, object]) -> bytes:
    """Return a record as JSON of at most MAX_RECORD bytes. If it is cut for that, it says so."""
    line = json_line(record)
    for max_text, max_items in _CUTS:
        if len(line) <= MAX_RECORD:
            break
        line = json_line({key: _clean(record[key], max_text, max_items) for key in record} | {"cut": True})
    return line


def _clean(value: object, max_text: int = _MAX_TEXT, max_items: int = _MAX_ITEMS) -> object:
    """Shorten texts and lists, and escape lone surrogates, which JSON in UTF-8 cannot have."""
    if isinstance(value, str):
        shortened = value[:max_text]
        return shortened if shortened.isascii() else shortened.encode(errors="backslashreplace").decode()
    if isinstance(value, list | tuple):
        return [_clean(item, max_text) for item in value[:max_items]] + ["and more"] * (len(value) > max_items)
    if isinstance(value, dict):
        return {key: _clean(item, max_text, max_items) for key, item in value.items()}
    return value


@cache
def _host() -> str:
    return socket.gethostname()
