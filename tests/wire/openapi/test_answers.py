"""Each kind of refusal is asked for, and each answer is one that the document has."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.servers import HandClock
from tests.wire.openapi.asking import BODIES, GRANT, JSON, NO_TOKEN, PASSWORD, Ask, Asker, client_of_oauth, login
from tests.wire.openapi.conformance import Documented, Operation
from tokenauth.errors import (
    ClientGone,
    Forbidden,
    InsufficientScope,
    InvalidCredentials,
    InvalidRequest,
    InvalidToken,
    IssuerUnavailable,
    LeaseLost,
    NoFreeToken,
    NotYourLease,
    Overloaded,
    PoolFull,
    Refusal,
    StoreUnavailable,
    TokenRequired,
    TooManyAttempts,
    UnknownPool,
    UnknownToken,
)
from tokenauth.web.exceptions import (
    BodyTooLarge,
    ForeignPage,
    InternalError,
    InvalidClient,
    InvalidScope,
    MethodNotAllowed,
    NotFound,
    RetryableError,
    UnsupportedGrantType,
    UnsupportedMediaType,
)
from tokenauth.web.responses import STATUS

LEASES = "/api/pools/small/leases"
TOKENS = "/api/pools/small/tokens"

REFUSED: dict[type[Refusal], list[Ask]] = {
    InvalidRequest: [
        Ask("GET", "/api/token"),
        Ask("GET", f"/api/token?token={'x' * 9000}"),
        Ask("GET", "/api/tokens?user=ann&user=bob", "admin"),
        Ask("DELETE", "/api/tokens?keep=all", "ann"),
        Ask("GET", "/api/pools/uuids?limit=0", "ann"),
        Ask("GET", f"/api/pools/uuids?after={'x' * 9000}", "ann"),
        Ask("POST", LEASES, "ann", {"json": {"holder": "\n"}}),
        Ask("POST", "/oauth/token", "", {"data": {}}),
        Ask("POST", "/oauth/token", "", {"json": {}}),
        Ask("POST", "/oauth/introspect", "admin", client_of_oauth(token="x")),
        Ask("POST", "/oauth/revoke", "", {"data": client_of_oauth()["data"], "headers": {"Authorization": "Basic x"}}),
        Ask("GET", f"/simple/issue_token?info={'x' * 9000}", "", {"headers": PASSWORD}),
        Ask("POST", "/random/generate", "", {"json": {"count": 1001}}),
        Ask("POST", "/managed/assign-token", "", {"json": {"client_id": "\n"}}),
    ],
    InvalidScope: [Ask("POST", "/oauth/token", "", client_of_oauth(**GRANT, scope="admin"))],
    UnsupportedGrantType: [Ask("POST", "/oauth/token", "", client_of_oauth(grant_type="password"))],
    InvalidClient: [
        Ask("POST", "/oauth/token", "", {"data": GRANT}),
        Ask("POST", "/oauth/introspect", "", client_of_oauth("wrong", token="x")),
        Ask("POST", "/oauth/revoke", "", {"data": {"token": "x"}}),
    ],
    InvalidCredentials: [Ask("POST", "/api/token", "", login("wrong"))],
    Forbidden: [Ask("GET", "/auth?scope=", "ann")],
    ForeignPage: [
        Ask(method, path, "", {"headers": {"Origin": "https://foreign.example"}})
        for method, path in [
            *(("POST", f"/oauth/{endpoint}") for endpoint in ("token", "introspect", "revoke")),
            ("POST", "/random/generate"),
            ("POST", "/managed/assign-token"),
        ]
    ],
    InsufficientScope: [
        Ask("GET", "/auth?scope=admin", "ann"),
        Ask("GET", "/api/tokens?user=ann", "bob"),
        Ask("DELETE", "/api/tokens?user=ann", "bob"),
        Ask("DELETE", "/api/tokens/x?user=ann", "bob"),
        Ask("POST", "/oauth/introspect", "", client_of_oauth(token="x")),
        *(
            Ask(method, f"/api/pools/restricted{path}", "bob")
            for method, path in [
                ("GET", ""),
                ("POST", "/tokens"),
                ("GET", "/tokens/x"),
                ("DELETE", "/tokens/x"),
                ("POST", "/leases"),
                ("PUT", "/leases/x"),
                ("DELETE", "/leases/x"),
            ]
        ),
        Ask("POST", "/pool/api/token_pool", "bob"),
        Ask("DELETE", "/pool/api/token_pool/", "bob"),
        Ask("POST", "/pool/api/block_token", "bob"),
        Ask("POST", f"/pool/api/keep_alive/{NO_TOKEN}", "bob"),
    ],
    NotFound: [
        Ask("GET", "/.well-known/oauth-authorization-server"),
        Ask("DELETE", "/api/tokens/x", "ann"),
        Ask("GET", "/docs/nothing.js"),
        Ask("POST", "/pool/api/keep_alive/x", "ann"),
    ],
    UnknownPool: [Ask("GET", "/api/pools/none", "ann"), Ask("POST", "/api/pools/none/leases", "ann")],
    UnknownToken: [
        Ask("GET", f"{TOKENS}/x", "ann"),
        Ask("DELETE", f"{TOKENS}/x", "ann"),
        Ask("PUT", f"{LEASES}/x", "ann"),
        Ask("DELETE", f"{LEASES}/x", "ann"),
    ],
    PoolFull: [Ask("POST", TOKENS, "ann", {"json": {"count": 2}})],
    NoFreeToken: [Ask("POST", LEASES, "ann")],
    UnsupportedMediaType: [Ask("POST", "/api/token", "", {"content": "x", "headers": {"Content-Type": "text/plain"}})],
}
"""Requests that are refused whatever was asked before; tests of their own have what needs more."""

ELSEWHERE = {
    TokenRequired,
    InvalidToken,
    BodyTooLarge,
    LeaseLost,
    NotYourLease,
    TooManyAttempts,
    Overloaded,
    StoreUnavailable,
}
"""What the tests further down ask for."""

NOWHERE = {ClientGone, MethodNotAllowed, InternalError, IssuerUnavailable, RetryableError}
"""What no operation documents: another method, an unknown fault, an answer to a closed connection."""


def test_every_kind_of_refusal_is_asked_for() -> None:
    assert set(REFUSED) | ELSEWHERE | NOWHERE == set(STATUS)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_refusal_is_as_documented(asker: Asker, kind: type[Refusal]) -> None:
    for method, path, user, options in REFUSED[kind]:
        answer = asker.ask(method, path, user, **options)
        assert answer.status_code == STATUS[kind], (path, answer.text)
        if kind is not InvalidCredentials:
            assert answer.json()["error"] == kind.code, path


def guarded(documented: Documented) -> Iterator[Operation]:
    """Iterate over the operations that require authentication."""
    return (operation for operation in documented if set() not in operation.schemes)


def test_without_a_token_each_guarded_operation_is_refused_as_documented(asker: Asker, documented: Documented) -> None:
    asked = list(guarded(documented))
    assert len(asked) > 25
    for operation in asked:
        answer = asker.ask_for(operation, **BODIES[operation.body])
        assert answer.status_code == 401, operation
        known = "Unauthorized" if operation.path.startswith("/simple/") else "token_required"
        assert answer.json()["error"] == known, operation


def test_with_a_wrong_token_each_guarded_operation_is_refused_as_documented(
    asker: Asker, documented: Documented
) -> None:
    for operation in guarded(documented):
        for name, value in (("X-Token", "x"), ("Authorization", "Bearer x")):
            if {"X-Token"} in operation.schemes:
                answer = asker.ask_for(operation, headers={name: value}, **BODIES[operation.body])
                assert (answer.status_code, answer.json()["error"]) == (401, "invalid_token"), operation


def test_two_different_tokens_are_refused_as_documented(asker: Asker, documented: Documented) -> None:
    two = {"X-Token": "x", "Authorization": "Bearer y"}
    for operation in documented:
        if {"X-Token"} in operation.schemes:
            answer = asker.ask_for(operation, headers=two, **BODIES[operation.body])
            if operation.path != "/auth" and (operation.method, operation.path) != ("DELETE", "/api/token"):
                assert answer.status_code == 400, operation


UNREADABLE: dict[str, tuple[type[Refusal], type[Refusal], dict[str, Any]]] = {
    "too_long": (BodyTooLarge, BodyTooLarge, {"content": b"x" * 20_000}),
    "other_type": (UnsupportedMediaType, InvalidRequest, {"content": b"x", "headers": {"Content-Type": "text/plain"}}),
    "compressed": (UnsupportedMediaType, InvalidRequest, {"content": b"x", "headers": {"Content-Encoding": "gzip"}}),
    "not_text": (InvalidRequest, InvalidRequest, {"content": b"\xff"}),
    "neither": (InvalidRequest, InvalidRequest, {"content": b"a=1&a=2"}),
}
"""Bodies, and how they are refused where JSON is asked for and where a form is."""


@pytest.mark.parametrize("body", UNREADABLE)
def test_a_body_that_cannot_be_read_is_refused_as_documented(asker: Asker, documented: Documented, body: str) -> None:
    as_json, as_form, options = UNREADABLE[body]
    token = {"X-Token": asker.token("ann")}
    for operation in documented:
        if operation.body is not None and (operation.method, operation.path) != ("DELETE", "/api/token"):
            headers = {"Content-Type": operation.body, **token, **options.get("headers", {})}
            answer = asker.ask_for(operation, content=options["content"], headers=headers)
            assert answer.status_code == STATUS[as_json if operation.body == JSON else as_form], operation


@pytest.mark.parametrize("value", ['[1, "x"]', "true"])
def test_a_body_with_fields_of_other_types_is_refused_as_documented(
    asker: Asker, documented: Documented, value: str
) -> None:
    """One dialect takes whatever names no token for an unknown one; who logs out is answered in any case."""
    token = {"X-Token": asker.token("ann")}
    for operation in documented:
        if operation.body == JSON and (operation.method, operation.path) != ("DELETE", "/api/token"):
            fields = operation.described["requestBody"]["content"][JSON]["schema"]["$ref"].rpartition("/")[2]
            named = documented.document["components"]["schemas"][fields]["properties"]
            answer = asker.ask_for(operation, json=dict.fromkeys(named, json.loads(value)), headers=token)
            assert answer.status_code == 400, operation


def test_whatever_is_sent_a_log_out_is_answered_as_documented(asker: Asker) -> None:
    for _, _, options in UNREADABLE.values():
        assert asker.ask("DELETE", "/api/token", **options).status_code == 200


def test_a_lease_that_is_lost_is_refused_as_documented(asker: Asker) -> None:
    token = asker.ask("POST", "/api/pools/uuids/tokens", "ann").json()["tokens"][0]
    for method in ("PUT", "DELETE"):
        answer = asker.ask(method, f"/api/pools/uuids/leases/{token}", "ann")
        assert (answer.status_code, answer.json()["error"]) == (409, "lease_lost")


def test_a_lease_of_another_user_is_refused_as_documented(asker: Asker) -> None:
    asker.ask("POST", "/api/pools/uuids/tokens", "ann")
    token = asker.ask("POST", "/api/pools/uuids/leases", "ann").json()["token"]
    for method in ("PUT", "DELETE"):
        answer = asker.ask(method, f"/api/pools/uuids/leases/{token}", "bob")
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert asker.ask("DELETE", f"/api/pools/uuids/tokens/{token}", "ann").status_code == 204


def test_a_full_pool_that_is_all_lent_says_when_to_come_back_as_documented(asker: Asker, clock: HandClock) -> None:
    asker.ask("POST", TOKENS, "ann")
    lease = asker.ask("POST", LEASES, "ann")
    assert (lease.status_code, lease.json()["expires_in"]) == (201, 60)
    answer = asker.ask("POST", LEASES, "ann")
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "60")
    clock.advance(100)
    assert asker.ask("DELETE", f"{TOKENS}/{lease.json()['token']}", "ann").status_code == 204


THROTTLED = {
    "login": Ask("POST", "/api/token", "", login("wrong", "nobody")),
    "token": Ask("POST", "/oauth/token", "", client_of_oauth("wrong", **GRANT)),
    "introspect": Ask("POST", "/oauth/introspect", "", client_of_oauth("wrong", token="x")),
    "revoke": Ask("POST", "/oauth/revoke", "", client_of_oauth("wrong", token="x")),
    **{
        f"{method}_{name}": Ask(method, f"/simple/{name}", "", {"headers": {"X-API-PASSWORD": "wrong"}})
        for name in ("issue_token", "recycle_token", "tokens")
        for method in ("GET", "POST")
    },
}


@pytest.mark.parametrize("which", THROTTLED)
def test_too_many_attempts_are_refused_as_documented(asker: Asker, which: str) -> None:
    method, path, user, options = THROTTLED[which]
    statuses = [asker.ask(method, path, user, **options).status_code for _ in range(2)]
    assert statuses == [401, 429]
    answer = asker.ask(method, path, user, **options)
    assert (answer.json()["error"], int(answer.headers["retry-after"]) > 0) == ("too_many_attempts", True)
