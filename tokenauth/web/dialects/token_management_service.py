"""The HTTP of token-management-service: a bounded pool whose tokens have owners."""

from dataclasses import replace
from typing import Annotated

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import LeaseLost, NoFreeToken, PoolFull, StoreUnavailable, UnknownToken
from tokenauth.models import LeaseCheck
from tokenauth.pools import MAX_TEXT, Pools, check_name
from tokenauth.settings.dialects import DialectSettings
from tokenauth.web import openapi, requests
from tokenauth.web.openapi import Section
from tokenauth.web.operations import JSON_BODY, Answer, Refusals, operation, said
from tokenauth.web.responses import answer_json
from tokenauth.web.routing import Handlers


class Asked(msgspec.Struct):
    """Which token, and for whom."""

    token: str | None = None
    client_id: str | None = None


class AskedFor(msgspec.Struct):
    """For whom a token is to be; it must be said."""

    client_id: Annotated[str, said(minLength=1, maxLength=MAX_TEXT, description="Printable.")]


class AskedAbout(msgspec.Struct):
    """Which token is meant; it must be said. Whose it is, is compared where it matters."""

    token: Annotated[str, said(minLength=1)]
    client_id: str | None = None


class Token(msgspec.Struct):
    """The token that was made or lent."""

    token: str


class Outcome(msgspec.Struct):
    """What was done, or is in the way."""

    message: str


_body = msgspec.json.Decoder(Asked)

_BODY: Refusals = (*JSON_BODY, StoreUnavailable)
_MISSING = Answer(400, Outcome)
_DENIED = Answer(403, Outcome)
_NONE = Answer(404, Outcome)


_EXAMPLE_VALUE = "token_m3Kz8RwYqBc5VnXh9TjLp0DsFg6AeUo2iKxQ7rBtCy4ZjHvNwMaSfGdPl1EuOIqT"
_EXAMPLE = {"token": _EXAMPLE_VALUE, "client_id": "client-7"}
_NO_TOKEN = openapi.Answer(400, "No token was named.", Outcome, {"message": "token is required"})

_DELETE = openapi.Operation(
    method="POST",
    path="/delete-token",
    id="tokenManagementServiceDelete",
    title="Delete a token",
    text="Deletes a token, also while it is leased.",
    body=AskedAbout,
    example={"token": _EXAMPLE_VALUE},
    answers=[
        openapi.Answer(200, "The token is deleted.", Outcome, {"message": "Token deleted successfully!"}),
        _NO_TOKEN,
        openapi.Answer(404, "The token does not exist.", Outcome, {"message": "Token not found"}),
    ],
    refusals=_BODY,
)

DOCUMENTATION = Section(
    name="token-management-service",
    text="Compatible with token-management-service: a bounded pool whose leases belong to a `client_id`.",
    operations=[
        openapi.Operation(
            method="POST",
            path="/generate-token",
            id="tokenManagementServiceGenerate",
            title="Generate a token",
            text="Adds a free token to the pool.",
            answers=[
                openapi.Answer(201, "The new token.", Token, {"token": _EXAMPLE_VALUE}),
                openapi.Answer(403, "The pool is full.", Outcome, {"message": "Token pool size limit reached"}),
            ],
            refusals=[StoreUnavailable],
        ),
        openapi.Operation(
            method="POST",
            path="/assign-token",
            id="tokenManagementServiceAssign",
            title="Lease a token",
            text="Leases the token that has been free for the longest time to a client.",
            body=AskedFor,
            example={"client_id": "client-7"},
            answers=[
                openapi.Answer(200, "The token.", Token, {"token": _EXAMPLE_VALUE}),
                openapi.Answer(400, "No client was named.", Outcome, {"message": "client_id is required"}),
                openapi.Answer(404, "No token is free.", Outcome, {"message": "No free token available"}),
            ],
            refusals=_BODY,
        ),
        openapi.Operation(
            method="POST",
            path="/keep-alive",
            id="tokenManagementServiceKeepAlive",
            title="Keep a lease alive",
            text="Lets the lease run for its full time from now. If `client_id` is sent, the lease must be that"
            " client's.",
            body=AskedAbout,
            example=_EXAMPLE,
            answers=[
                openapi.Answer(200, "The lease is extended.", Outcome, {"message": "Token keep-alive refreshed"}),
                _NO_TOKEN,
                openapi.Answer(
                    403,
                    "The client does not have this lease.",
                    Outcome,
                    {"message": "Token does not belong to this client"},
                ),
            ],
            refusals=_BODY,
        ),
        openapi.Operation(
            method="POST",
            path="/unblock-token",
            id="tokenManagementServiceUnblock",
            title="Release a leased token",
            text="Ends the lease of a token.",
            body=AskedAbout,
            example={"token": _EXAMPLE_VALUE},
            answers=[
                openapi.Answer(200, "The lease has ended.", Outcome, {"message": "Token unblocked"}),
                _NO_TOKEN,
                openapi.Answer(
                    403, "The token is not leased.", Outcome, {"message": "Token not assigned to any client"}
                ),
            ],
            refusals=_BODY,
        ),
        _DELETE,
        replace(_DELETE, method="DELETE", id="tokenManagementServiceDeleteByDelete"),
    ],
)


class TokenManagementService:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, pools: Pools, terms: DialectSettings) -> None:
        self._pools = pools
        self._pool = pools.find(terms.pool)

    def routes(self) -> dict[str, Handlers]:
        """List the addresses."""
        return {
            "/generate-token": {"POST": self.generate},
            "/assign-token": {"POST": self.assign},
            "/keep-alive": {"POST": self.keep_alive},
            "/unblock-token": {"POST": self.unblock},
            "/delete-token": {"POST": self.delete, "DELETE": self.delete},
        }

    @operation(Answer(201, Token), _DENIED, refuses=(StoreUnavailable,))
    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make one token."""
        requests.refuse_gone(scope)
        pool = self._pools.find_managed(self._pool.name, requests.user(scope))
        try:
            [token] = await self._pools.generate(pool, 1)
        except PoolFull:
            await _say(send, "Token pool size limit reached", 403)
        else:
            await answer_json(send, Token(token), 201)

    @operation(Answer(200, Token), _MISSING, _NONE, body=AskedFor, refuses=_BODY)
    async def assign(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend a token to a client."""
        body = await _read(scope, receive)
        if not body.client_id:
            await _say(send, "client_id is required", 400)
            return
        requests.refuse_gone(scope)
        try:
            token = await self._pools.assign(
                self._pool, check_name(body.client_id, "client_id"), requests.username(scope)
            )
        except NoFreeToken:
            await _say(send, "No free token available", 404)
        else:
            await answer_json(send, Token(token.value))

    @operation(Answer(200, Outcome), _MISSING, _DENIED, body=AskedAbout, refuses=_BODY)
    async def keep_alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a lease run for its full time from now, if it is this client's."""
        body = await _read(scope, receive)
        if not body.token:
            await _say(send, "token is required", 400)
            return
        try:
            await self._pools.keep_alive(
                self._pool, body.token, LeaseCheck(body.client_id, username=requests.username(scope))
            )
        except (UnknownToken, LeaseLost):
            await _say(send, "Token does not belong to this client", 403)
        else:
            await _say(send, "Token keep-alive refreshed")

    @operation(Answer(200, Outcome), _MISSING, _DENIED, body=AskedAbout, refuses=_BODY)
    async def unblock(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End a lease."""
        body = await _read(scope, receive)
        if not body.token:
            await _say(send, "token is required", 400)
            return
        try:
            await self._pools.release(self._pool, body.token, LeaseCheck(username=requests.username(scope)))
        except (UnknownToken, LeaseLost):
            await _say(send, "Token not assigned to any client", 403)
        else:
            await _say(send, "Token unblocked")

    @operation(Answer(200, Outcome), _MISSING, _NONE, body=AskedAbout, refuses=_BODY)
    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Delete a token, free or lent."""
        pool = self._pools.find_managed(self._pool.name, requests.user(scope))
        body = await _read(scope, receive)
        if not body.token:
            await _say(send, "token is required", 400)
            return
        try:
            await self._pools.delete(pool, body.token)
        except UnknownToken:
            await _say(send, "Token not found", 404)
        else:
            await _say(send, "Token deleted successfully!")


async def _read(scope: Scope, receive: Receive) -> Asked:
    return await requests.json_body(scope, receive, _body, empty=Asked())


async def _say(send: Send, message: str, status: int = 200) -> None:
    await answer_json(send, Outcome(message), status)
