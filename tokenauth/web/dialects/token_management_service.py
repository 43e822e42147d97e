"""The HTTP of token-management-service: a bounded pool whose leases belong to clients."""

from dataclasses import replace
from typing import Annotated

import msgspec
from starlette.responses import Response

from tokenauth.errors import LeaseLost, NoFreeToken, PoolFull, UnknownToken
from tokenauth.models import LeaseCheck
from tokenauth.pools import MAX_TEXT, check_name
from tokenauth.service import Service
from tokenauth.settings.dialects import DialectSettings
from tokenauth.web.openapi import JSON_BODY, STORE, Answer, Operation, Section, schema_only
from tokenauth.web.requests import Request
from tokenauth.web.responses import DialectResponse
from tokenauth.web.routing import Handlers, when_complete


class _AnyRequest(msgspec.Struct):
    """All requests are decoded as this. A missing field is no error here: the original has an answer of its own."""

    token: str | None = None
    client_id: str | None = None


class AssignToClientRequest(msgspec.Struct):
    """Only for the documentation: shows the required fields."""

    client_id: Annotated[str, schema_only(minLength=1, maxLength=MAX_TEXT, description="The client. Printable.")]


class ClientTokenRequest(msgspec.Struct):
    """Only for the documentation: shows the required fields."""

    token: Annotated[str, schema_only(minLength=1)]
    client_id: Annotated[str, schema_only(description="The client that has the lease.")] | None = None


class NewTokenAnswer(msgspec.Struct):
    token: str


class OutcomeAnswer(msgspec.Struct):
    message: str


_decoder = msgspec.json.Decoder(_AnyRequest)


class TokenManagementService:
    def __init__(self, service: Service, settings: DialectSettings) -> None:
        self._pools = service.pools
        self._pool = service.pools.find(settings.pool)

    def handlers(self) -> dict[str, Handlers]:
        return {
            "/generate-token": {"POST": when_complete(self.generate)},
            "/assign-token": {"POST": self.assign},
            "/keep-alive": {"POST": self.keep_alive},
            "/unblock-token": {"POST": self.unblock},
            "/delete-token": {"POST": self.delete, "DELETE": self.delete},
        }

    async def generate(self, request: Request) -> Response:
        request.raise_if_disconnected()
        pool = self._pools.find_managed(self._pool.name, request.identity)
        try:
            [token] = await self._pools.generate(pool, 1)
        except PoolFull:
            return _outcome("Token pool size limit reached", 403)
        return DialectResponse(NewTokenAnswer(token), 201)

    async def assign(self, request: Request) -> Response:
        body = await _body(request)
        if not body.client_id:
            return _outcome("client_id is required", 400)
        request.raise_if_disconnected()
        holder = check_name(body.client_id, "client_id")
        try:
            token = await self._pools.assign(self._pool, holder, request.username)
        except NoFreeToken:
            return _outcome("No free token available", 404)
        return DialectResponse(NewTokenAnswer(token.value))

    async def keep_alive(self, request: Request) -> Response:
        body = await _body(request)
        if not body.token:
            return _token_required()
        check = LeaseCheck(body.client_id, username=request.username)
        try:
            await self._pools.keep_alive(self._pool, body.token, check)
        except (UnknownToken, LeaseLost):
            return _outcome("Token does not belong to this client", 403)
        return _outcome("Token keep-alive refreshed")

    async def unblock(self, request: Request) -> Response:
        body = await _body(request)
        if not body.token:
            return _token_required()
        try:
            await self._pools.release(self._pool, body.token, LeaseCheck(username=request.username))
        except (UnknownToken, LeaseLost):
            return _outcome("Token not assigned to any client", 403)
        return _outcome("Token unblocked")

    async def delete(self, request: Request) -> Response:
        pool = self._pools.find_managed(self._pool.name, request.identity)
        body = await _body(request)
        if not body.token:
            return _token_required()
        try:
            await self._pools.delete(pool, body.token)
        except UnknownToken:
            return _outcome("Token not found", 404)
        return _outcome("Token deleted successfully!")


async def _body(request: Request) -> _AnyRequest:
    return await request.json_body(_decoder, empty=_AnyRequest())


def _outcome(message: str, status: int = 200) -> Response:
    return DialectResponse(OutcomeAnswer(message), status)


def _token_required() -> Response:
    return _outcome("token is required", 400)


_BODY = (*JSON_BODY, *STORE)
_EXAMPLE_VALUE = "token_m3Kz8RwYqBc5VnXh9TjLp0DsFg6AeUo2iKxQ7rBtCy4ZjHvNwMaSfGdPl1EuOIqT"
_EXAMPLE = {"token": _EXAMPLE_VALUE, "client_id": "client-7"}
_NO_TOKEN = Answer(400, "No token was named.", OutcomeAnswer, {"message": "token is required"})

_DELETE = Operation(
    method="POST",
    path="/delete-token",
    id="tokenManagementServiceDelete",
    title="Delete a token",
    text="Deletes a token, also while it is leased.",
    body=ClientTokenRequest,
    example={"token": _EXAMPLE_VALUE},
    answers=[
        Answer(200, "The token is deleted.", OutcomeAnswer, {"message": "Token deleted successfully!"}),
        _NO_TOKEN,
        Answer(404, "The token does not exist.", OutcomeAnswer, {"message": "Token not found"}),
    ],
    refusals=_BODY,
)

DOCUMENTATION = Section(
    name="token-management-service",
    text="Compatible with token-management-service: a bounded pool whose leases belong to a `client_id`.",
    operations=[
        Operation(
            method="POST",
            path="/generate-token",
            id="tokenManagementServiceGenerate",
            title="Generate a token",
            text="Adds a free token to the pool.",
            answers=[
                Answer(201, "The new token.", NewTokenAnswer, {"token": _EXAMPLE_VALUE}),
                Answer(403, "The pool is full.", OutcomeAnswer, {"message": "Token pool size limit reached"}),
            ],
            refusals=STORE,
        ),
        Operation(
            method="POST",
            path="/assign-token",
            id="tokenManagementServiceAssign",
            title="Lease a token",
            text="Leases the token that has been free for the longest time to a client.",
            body=AssignToClientRequest,
            example={"client_id": "client-7"},
            answers=[
                Answer(200, "The token.", NewTokenAnswer, {"token": _EXAMPLE_VALUE}),
                Answer(400, "No client was named.", OutcomeAnswer, {"message": "client_id is required"}),
                Answer(404, "No token is free.", OutcomeAnswer, {"message": "No free token available"}),
            ],
            refusals=_BODY,
        ),
        Operation(
            method="POST",
            path="/keep-alive",
            id="tokenManagementServiceKeepAlive",
            title="Keep a lease alive",
            text="Renews the lease for its full duration. If `client_id` is sent, the lease must be that client's.",
            body=ClientTokenRequest,
            example=_EXAMPLE,
            answers=[
                Answer(200, "The lease is extended.", OutcomeAnswer, {"message": "Token keep-alive refreshed"}),
                _NO_TOKEN,
                Answer(
                    403,
                    "The client does not have this lease.",
                    OutcomeAnswer,
                    {"message": "Token does not belong to this client"},
                ),
            ],
            refusals=_BODY,
        ),
        Operation(
            method="POST",
            path="/unblock-token",
            id="tokenManagementServiceUnblock",
            title="Release a leased token",
            text="Ends the lease of a token.",
            body=ClientTokenRequest,
            example={"token": _EXAMPLE_VALUE},
            answers=[
                Answer(200, "The lease has ended.", OutcomeAnswer, {"message": "Token unblocked"}),
                _NO_TOKEN,
                Answer(403, "The token is not leased.", OutcomeAnswer, {"message": "Token not assigned to any client"}),
            ],
            refusals=_BODY,
        ),
        _DELETE,
        replace(_DELETE, method="DELETE", id="tokenManagementServiceDeleteByDelete"),
    ],
)
