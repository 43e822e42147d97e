"""Each kind of refusal is provoked, and each response is documented."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import HandClock, log_in
from tests.wire.openapi.checked_client import (
    BODIES,
    GRANT,
    JSON,
    PASSWORD,
    Call,
    CheckedClient,
    client_form,
    example_path,
    login,
)
from tests.wire.openapi.conformance import Documented, Operation
from tokenauth.errors import (
    AlreadyReserved,
    AlreadyRotated,
    ClientGone,
    Forbidden,
    InsufficientScope,
    InvalidCredentials,
    InvalidRequest,
    InvalidToken,
    IssuerUnavailable,
    LeaseLost,
    LoginNeeded,
    NameTaken,
    NoFreeToken,
    NotRenewable,
    NotYourLease,
    Overloaded,
    PlaceLost,
    PoolFull,
    Refusal,
    RequestDiffers,
    Stopping,
    StoreUnavailable,
    TokenRequired,
    TooManyAttempts,
    TooManyLeases,
    TooManyPlaces,
    TooManyTokens,
    UnknownMember,
    UnknownPool,
    UnknownRequest,
    UnknownToken,
)
from tokenauth.models import LeaseRequest, Pool
from tokenauth.settings.model import DatabaseSettings
from tokenauth.stores.open import open_store
from tokenauth.waiting_line import MAX_PLACES
from tokenauth.web.exceptions import (
    BodyTooLarge,
    ForeignHost,
    ForeignOrigin,
    ForeignPage,
    InternalError,
    InvalidClient,
    InvalidScope,
    MethodNotAllowed,
    NotFound,
    RetryableInternalError,
    UnsupportedGrantType,
    UnsupportedMediaType,
)
from tokenauth.web.responses import STATUS

LEASES = "/api/pools/small/leases"
TOKENS = "/api/pools/small/tokens"
LINE = "/api/pools/small/requests"

REFUSED: dict[type[Refusal], list[Call]] = {
    InvalidRequest: [
        Call("GET", "/api/token"),
        Call("GET", f"/api/token?token={'x' * 9000}"),
        Call("GET", "/api/tokens?user=ann&user=bob", "admin"),
        Call("DELETE", "/api/tokens?keep=all", "ann"),
        Call("DELETE", "/api/tokens?kind=none", "ann"),
        Call("POST", "/api/tokens", "ann", {"json": {"name": "x", "ttl": "366d"}}),
        Call("POST", "/api/tokens/x/rotate", "ann", {"json": {"overlap": "soon"}}),
        Call("GET", "/api/pools/uuids?limit=0", "ann"),
        Call("GET", f"/api/pools/uuids?after={'x' * 9000}", "ann"),
        Call("POST", LEASES, "ann", {"json": {"holder": "\n"}}),
        Call("POST", "/oauth/token", "", {"data": {}}),
        Call("POST", "/oauth/token", "", {"json": {}}),
        Call("POST", "/oauth/introspect", "admin", client_form(token="x")),
        Call("POST", "/oauth/revoke", "", {"data": client_form()["data"], "headers": {"Authorization": "Basic x"}}),
        Call("GET", f"/simple/issue_token?info={'x' * 9000}", "", {"headers": PASSWORD}),
        Call("POST", "/random/generate", "", {"json": {"count": 1001}}),
        Call("POST", "/managed/assign-token", "", {"json": {"client_id": "\n"}}),
    ],
    InvalidScope: [Call("POST", "/oauth/token", "", client_form(**GRANT, scope="admin"))],
    UnsupportedGrantType: [Call("POST", "/oauth/token", "", client_form(grant_type="password"))],
    InvalidClient: [
        Call("POST", "/oauth/token", "", {"data": GRANT}),
        Call("POST", "/oauth/introspect", "", client_form("wrong", token="x")),
        Call("POST", "/oauth/revoke", "", {"data": {"token": "x"}}),
    ],
    InvalidCredentials: [Call("POST", "/api/token", "", login("wrong"))],
    Forbidden: [Call("GET", "/auth?scope=", "ann")],
    ForeignOrigin: [
        Call(method, path, "", {"headers": {"Origin": "https://foreign.example"}})
        for method, path in [
            *(("POST", f"/oauth/{endpoint}") for endpoint in ("token", "introspect", "revoke")),
            ("POST", "/random/generate"),
            ("POST", "/managed/assign-token"),
        ]
    ],
    ForeignHost: [
        Call("POST", path, "", {"headers": {"Host": "foreign.example", "Sec-Fetch-Site": "same-origin"}})
        for path in ("/api/token", "/oauth/token", "/random/generate")
    ],
    InsufficientScope: [
        Call("POST", "/api/pools/small/leases", "bob", {"json": {"wait": 0, "priority": 1}}),
        Call("DELETE", "/pool/api/token_pool/", "bob"),
    ],
    NotFound: [
        Call("GET", "/.well-known/oauth-authorization-server"),
        Call("DELETE", "/api/tokens/x", "ann"),
        Call("POST", "/api/tokens/x/rotate", "ann"),
        Call("GET", "/docs/nothing.js"),
        Call("POST", "/pool/api/keep_alive/x", "ann"),
    ],
    UnknownMember: [
        Call("PUT", "/api/pools/phones/members/none/reservation", "admin", {"json": {"until": "1h"}}),
        Call("DELETE", "/api/pools/uuids/members/none/reservation", "ann"),
    ],
    UnknownPool: [Call("GET", "/api/pools/none", "ann"), Call("POST", "/api/pools/none/leases", "ann")],
    UnknownToken: [
        Call("GET", f"{TOKENS}/x", "ann"),
        Call("DELETE", f"{TOKENS}/x", "ann"),
        Call("PUT", f"{LEASES}/x", "ann"),
        Call("DELETE", f"{LEASES}/x", "ann"),
    ],
    PoolFull: [Call("POST", TOKENS, "ann", {"json": {"count": 2}})],
    NotRenewable: [Call("POST", "/api/token/renew", "ann")],
    NoFreeToken: [Call("POST", LEASES, "ann"), Call("POST", LEASES, "ann", {"json": {"request": "none", "count": 1}})],
    UnknownRequest: [
        Call("DELETE", f"{LINE}/none", "ann"),
        Call("DELETE", f"{LINE}/none", "ann", {"params": {"user": "bob"}}),
        Call("DELETE", f"{LINE}/%00", "ann"),
    ],
    UnsupportedMediaType: [Call("POST", "/api/token", "", {"content": "x", "headers": {"Content-Type": "text/plain"}})],
}
"""Requests that are refused in any state. Refusals that need a state have their own tests."""

TESTED_BELOW = {
    TokenRequired,
    InvalidToken,
    BodyTooLarge,
    LeaseLost,
    NotYourLease,
    TooManyLeases,
    AlreadyReserved,
    LoginNeeded,
    NameTaken,
    TooManyTokens,
    AlreadyRotated,
    RequestDiffers,
    TooManyPlaces,
    PlaceLost,
    TooManyAttempts,
    Overloaded,
    StoreUnavailable,
}
"""Refusals with their own tests below."""

UNDOCUMENTED = {
    *(ClientGone, ForeignPage, InternalError, IssuerUnavailable, MethodNotAllowed, RetryableInternalError, Stopping)
}
"""Refusals that no operation documents: unsupported methods, internal errors, closed connections, the login page, and
the end of the server."""


def test_every_kind_of_refusal_is_tested() -> None:
    assert set(REFUSED) | TESTED_BELOW | UNDOCUMENTED == set(STATUS)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_refusal_is_as_documented(api: CheckedClient, kind: type[Refusal]) -> None:
    for method, path, user, options in REFUSED[kind]:
        answer = api.send(method, path, user, **options)
        assert answer.status_code == STATUS[kind], (path, answer.text)
        if kind is not InvalidCredentials:
            assert answer.json()["error"] == kind.code, path


def guarded(documented: Documented) -> Iterator[Operation]:
    """Iterate over the operations that require authentication."""
    return (operation for operation in documented if set() not in operation.schemes)


def test_a_missing_token_is_refused_as_documented(api: CheckedClient, documented: Documented) -> None:
    operations = list(guarded(documented))
    assert len(operations) > 25
    for operation in operations:
        answer = api.send_to(operation, **BODIES[operation.body])
        assert answer.status_code == 401, operation
        known = "Unauthorized" if operation.path.startswith("/simple/") else "token_required"
        assert answer.json()["error"] == known, operation


LACKING: dict[str, tuple[str, dict[str, Any]]] = {
    "GET /auth": ("scope=admin", {}),
    "GET /api/tokens": ("user=ann", {}),
    "DELETE /api/tokens": ("user=ann", {}),
    "DELETE /api/tokens/{id}": ("user=ann", {}),
    "POST /api/tokens": ("", {"json": {"name": "x", "scopes": ["admin"]}}),
    "POST /oauth/introspect": ("", {"data": {"token": "x"}}),
    "PUT /api/pools/{pool}/members/{name}/reservation": ("", {"json": {"until": "1h"}}),
    "DELETE /api/throttle": ("network=192.0.2.0/24", {}),
}
"""The queries and bodies of requests that need a scope. Others need one with any query, and with any body."""


def test_what_documents_a_scope_refuses_a_user_without(api: CheckedClient, documented: Documented) -> None:
    operations = [each for each in documented if InsufficientScope.code in json.dumps(each.described["responses"])]
    named = {f"{operation.method} {operation.path}" for operation in operations}
    assert named >= {*LACKING, "GET /api/status", "GET /api/throttle", "POST /pool/api/block_token"}
    for operation in operations:
        query, options = LACKING.get(f"{operation.method} {operation.path}", ("", BODIES[operation.body]))
        path = example_path(operation, pool="restricted")
        answer = api.send(operation.method, f"{path}?{query}", "bob", **options)
        assert (answer.status_code, answer.json()["error"]) == (403, InsufficientScope.code), (operation, answer.text)


def test_an_invalid_token_is_refused_as_documented(api: CheckedClient, documented: Documented) -> None:
    for operation in guarded(documented):
        for name, value in (("X-Token", "x"), ("Authorization", "Bearer x")):
            if {"X-Token"} in operation.schemes:
                answer = api.send_to(operation, headers={name: value}, **BODIES[operation.body])
                assert (answer.status_code, answer.json()["error"]) == (401, "invalid_token"), operation


def test_two_different_tokens_are_refused_as_documented(api: CheckedClient, documented: Documented) -> None:
    two = {"X-Token": "x", "Authorization": "Bearer y"}
    for operation in documented:
        if {"X-Token"} in operation.schemes:
            answer = api.send_to(operation, headers=two, **BODIES[operation.body])
            if operation.path != "/auth" and (operation.method, operation.path) != ("DELETE", "/api/token"):
                assert answer.status_code == 400, operation


UNREADABLE: dict[str, tuple[type[Refusal], type[Refusal], dict[str, Any]]] = {
    "too_long": (BodyTooLarge, BodyTooLarge, {"content": b"x" * 20_000}),
    "other_type": (UnsupportedMediaType, InvalidRequest, {"content": b"x", "headers": {"Content-Type": "text/plain"}}),
    "compressed": (UnsupportedMediaType, InvalidRequest, {"content": b"x", "headers": {"Content-Encoding": "gzip"}}),
    "not_utf8": (InvalidRequest, InvalidRequest, {"content": b"\xff"}),
    "neither_json_nor_form": (InvalidRequest, InvalidRequest, {"content": b"a=1&a=2"}),
}
"""Bodies, with their refusals by operations that expect JSON and by those that expect a form."""


@pytest.mark.parametrize("body", UNREADABLE)
def test_an_unreadable_body_is_refused_as_documented(api: CheckedClient, documented: Documented, body: str) -> None:
    as_json, as_form, options = UNREADABLE[body]
    token = {"X-Token": api.token("ann")}
    for operation in documented:
        if operation.body is not None and (operation.method, operation.path) != ("DELETE", "/api/token"):
            headers = {"Content-Type": operation.body, **token, **options.get("headers", {})}
            answer = api.send_to(operation, content=options["content"], headers=headers)
            assert answer.status_code == STATUS[as_json if operation.body == JSON else as_form], operation


ODD: dict[str, dict[str, Any]] = {
    "an unknown parameter": {"params": {"unknown": "1"}},
    "a long query": {"params": {"x": "y" * 9000}},
    "many parameters": {"params": {f"x{number}": "1" for number in range(120)}},
    "wrong values": {
        "params": dict.fromkeys(
            ["after", "force", "info", "keep", "kind", "limit", "scope", "token", "touch", "user"], "\0"
        )
    },
    "a foreign page": {"headers": {"Origin": "https://foreign.example", "Sec-Fetch-Site": "cross-site"}},
    "a rebound host": {"headers": {"Host": "foreign.example", "Sec-Fetch-Site": "same-origin"}},
}
"""Requests that some operations refuse."""


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_request_is_answered_as_documented(api: CheckedClient, documented: Documented, odd: str) -> None:
    options = ODD[odd]
    headers = {"X-Token": api.token("admin"), **PASSWORD, **options.get("headers", {})}
    for operation in documented:
        api.send_to(operation, **{**BODIES[operation.body], **options, "headers": headers})


@pytest.mark.parametrize("value", ['[1, "x"]', "true"])
def test_wrong_field_types_are_refused_as_documented(api: CheckedClient, documented: Documented, value: str) -> None:
    """Except by a log-out, which always succeeds. token-pool answers as for an unknown token."""
    token = {"X-Token": api.token("ann")}
    for operation in documented:
        if operation.body == JSON and (operation.method, operation.path) != ("DELETE", "/api/token"):
            fields = operation.described["requestBody"]["content"][JSON]["schema"]["$ref"].rpartition("/")[2]
            named = documented.document["components"]["schemas"][fields]["properties"]
            answer = api.send_to(operation, json=dict.fromkeys(named, json.loads(value)), headers=token)
            assert answer.status_code == 400, operation


def test_a_log_out_is_always_answered_as_documented(api: CheckedClient) -> None:
    for _, _, options in UNREADABLE.values():
        assert api.send("DELETE", "/api/token", **options).status_code == 200


def test_a_named_token_is_refused_as_documented(api: CheckedClient) -> None:
    def post(path: str, user: str = "bob", **body: Any) -> Any:
        return api.send("POST", f"/api/tokens{path}", user, json=body)

    made = [post("", name=f"job {number}").json() for number in range(50)]
    refused = [
        (post("", name="job 7"), 409, "name_taken"),
        (post("", name="another"), 409, "too_many_tokens"),
        (post(f"/{made[0]['id']}/rotate", overlap=60), 201, None),
        (post(f"/{made[0]['id']}/rotate"), 409, "already_rotated"),
    ]
    for path in ("", f"/{made[1]['id']}/rotate"):
        answer = api.send("POST", f"/api/tokens{path}", json={"name": "x"}, headers={"X-Token": made[0]["token"]})
        refused.append((answer, 403, "forbidden"))
    assert [(answer.status_code, answer.json().get("error")) for answer, *_ in refused] == [
        (status, code) for _, status, code in refused
    ]


def test_a_lost_lease_is_refused_as_documented(api: CheckedClient) -> None:
    token = api.send("POST", "/api/pools/uuids/tokens", "ann").json()["tokens"][0]
    for method in ("PUT", "DELETE"):
        answer = api.send(method, f"/api/pools/uuids/leases/{token}", "ann")
        assert (answer.status_code, answer.json()["error"]) == (409, "lease_lost")


async def fill_line(directory: Path, username: str, now: float) -> None:
    """Take all places but one, as another worker does: the server would be sent a thousand requests."""
    store = open_store(DatabaseSettings(f"sqlite+aiosqlite:///{directory}/tokenauth.db"), 10)
    await store.start()
    ask, pool = store.pools.ask, Pool("small", lease_ttl=60, capacity=1)
    places = (ask(pool, username, str(number), username, now, keep=60) for number in range(1, MAX_PLACES))
    assert {type(place) for place in await asyncio.gather(*places)} == {LeaseRequest}
    await store.stop(now)


def test_the_waiting_line_answers_as_documented(api: CheckedClient, directory: Path, clock: HandClock) -> None:
    def ask(user: str = "bob", **terms: object) -> tuple[int, str | None]:
        answer = api.send("POST", LEASES, user, json=terms)
        return answer.status_code, answer.json().get("error")

    assert ask(request="0", wait=0) == (202, None)
    assert ask(request="0", wait=0, priority=-1) == (409, "request_differs")
    assert ask(wait=0, priority=1) == (403, "insufficient_scope")
    shown = api.send("GET", LINE, "ann").json()
    assert (shown["waiting"], shown["requests"][0]["position"], "request" in shown["requests"][0]) == (1, 1, True)
    assert api.send("DELETE", f"{LINE}/0", "bob", params={"user": "ann"}).status_code == 403
    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(ask, request="held by me", wait=60)
        while [each["request"] for each in api.send("GET", LINE, "bob").json()["requests"]] != ["0", "held by me"]:
            assert not held.done()
        assert api.send("DELETE", f"{LINE}/held by me", "ann", params={"user": "bob"}).status_code == 204
        assert held.result() == (409, "place_lost")
    asyncio.run(fill_line(directory, "bob", clock()))
    assert ask(wait=0) == (409, "too_many_places")
    assert api.send("DELETE", f"{LINE}/0", "bob").status_code == 204
    clock.advance(60)
    assert api.send("GET", LINE, "ann").json()["waiting"] == 0


def test_a_foreign_lease_is_refused_as_documented(api: CheckedClient) -> None:
    api.send("POST", "/api/pools/uuids/tokens", "ann")
    token = api.send("POST", "/api/pools/uuids/leases", "ann").json()["token"]
    for method in ("PUT", "DELETE"):
        answer = api.send(method, f"/api/pools/uuids/leases/{token}", "bob")
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert api.send("DELETE", f"/api/pools/uuids/tokens/{token}", "ann").status_code == 204


def test_leases_over_per_user_are_refused_as_documented(api: CheckedClient) -> None:
    leases = "/api/pools/phones/leases"
    granted = api.send("POST", leases, "bob", json={"labels": ["pixel-8"], "ttl": "30s"})
    assert (granted.status_code, granted.json()["name"]) == (201, "pixel-8")
    answer = api.send("POST", leases, "bob")
    assert (answer.status_code, answer.json()["error"]) == (409, "too_many_leases")
    assert api.send("GET", "/api/pools/phones", "ann").json()["leased"] == 1
    taken = api.send("DELETE", f"{leases}/{granted.json()['token']}?force=true&take=true", "admin")
    assert (taken.status_code, taken.json()["holder"]) == (200, "admin")
    assert api.send("DELETE", f"{leases}/{granted.json()['token']}", "admin").status_code == 204


def test_a_foreign_reservation_is_refused_as_documented(api: CheckedClient) -> None:
    reservation = "/api/pools/tablets/members/tab/reservation"
    eve = {"X-Token": log_in(api.client, "eve", "bob-secret")}
    assert api.send("PUT", reservation, json={"until": "1h", "for": "bob"}, headers=eve).status_code == 200
    answer = api.send("PUT", reservation, "ann", json={"until": "1h"})
    assert (answer.status_code, answer.json()["error"]) == (409, "already_reserved")
    assert api.send("PUT", f"{reservation}?force=true", "ann", json={"until": "1h"}).status_code == 200
    assert api.send("DELETE", reservation, "ann").status_code == 204


def test_a_fully_leased_pool_is_refused_as_documented(api: CheckedClient, clock: HandClock) -> None:
    api.send("POST", TOKENS, "ann")
    lease = api.send("POST", LEASES, "ann")
    assert (lease.status_code, lease.json()["expires_in"]) == (201, 60)
    answer = api.send("POST", LEASES, "ann")
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "60")
    clock.advance(100)
    assert api.send("DELETE", f"{TOKENS}/{lease.json()['token']}", "ann").status_code == 204


THROTTLED = {
    "login": Call("POST", "/api/token", "", login("wrong", "nobody")),
    "token": Call("POST", "/oauth/token", "", client_form("wrong", **GRANT)),
    "introspect": Call("POST", "/oauth/introspect", "", client_form("wrong", token="x")),
    "revoke": Call("POST", "/oauth/revoke", "", client_form("wrong", token="x")),
    **{
        f"{method}_{name}": Call(method, f"/simple/{name}", "", {"headers": {"X-API-PASSWORD": "wrong"}})
        for name in ("issue_token", "recycle_token", "tokens")
        for method in ("GET", "POST")
    },
}


@pytest.mark.parametrize("which", THROTTLED)
def test_too_many_attempts_are_refused_as_documented(api: CheckedClient, which: str) -> None:
    method, path, user, options = THROTTLED[which]
    statuses = [api.send(method, path, user, **options).status_code for _ in range(2)]
    assert statuses == [401, 429]
    answer = api.send(method, path, user, **options)
    assert (answer.json()["error"], int(answer.headers["retry-after"]) > 0) == ("too_many_attempts", True)
