"""The HTTP of random-token-generator: a bounded pool of UUIDs."""

from typing import Annotated

import msgspec
from starlette.responses import Response

from tokenauth.errors import LeaseLost, NoFreeToken, PoolFull, UnknownToken
from tokenauth.models import LeaseCheck
from tokenauth.pools import MAX_COUNT
from tokenauth.service import Service
from tokenauth.settings.dialects import DialectSettings
from tokenauth.web.openapi import JSON_BODY, STORE, Answer, Operation, Section, schema_only
from tokenauth.web.requests import Request
from tokenauth.web.responses import DialectResponse
from tokenauth.web.routing import Handlers, when_complete

NAME = "random-token-generator"


class GenerateTokensRequest(msgspec.Struct):
    count: Annotated[int, schema_only(minimum=1, maximum=MAX_COUNT)] = 1


class OptionalTokenRequest(msgspec.Struct):
    token: str | None = None


class TokenRequest(msgspec.Struct):
    """Only for the documentation: shows that `token` is required. If it is missing, the original has its own answer."""

    token: Annotated[str, schema_only(minLength=1)]


class TokensAnswer(msgspec.Struct):
    tokens: list[str]


class AssignedAnswer(msgspec.Struct):
    token: str


class MessageAnswer(msgspec.Struct):
    message: str


class FailureAnswer(msgspec.Struct):
    error: str


_generate_decoder = msgspec.json.Decoder(GenerateTokensRequest)
_token_decoder = msgspec.json.Decoder(OptionalTokenRequest)


class RandomTokenGenerator:
    def __init__(self, service: Service, settings: DialectSettings) -> None:
        self._pools = service.pools
        self._pool = service.pools.find(settings.pool)

    def handlers(self) -> dict[str, Handlers]:
        return {
            "/generate": {"POST": self.generate},
            "/assign": {"POST": when_complete(self.assign)},
            "/unblock": {"POST": self.unblock},
            "/delete": {"DELETE": self.delete},
            "/keep-alive": {"POST": self.keep_alive},
        }

    async def generate(self, request: Request) -> Response:
        pool = self._pools.find_managed(self._pool.name, request.identity)
        body = await request.json_body(_generate_decoder, empty=GenerateTokensRequest())
        request.raise_if_disconnected()
        try:
            tokens = await self._pools.generate(pool, body.count)
        except PoolFull:
            return DialectResponse(FailureAnswer("Pool max size exceeded"), 400)
        return DialectResponse(TokensAnswer(list(tokens)))

    async def assign(self, request: Request) -> Response:
        request.raise_if_disconnected()
        try:
            token = await self._pools.assign(self._pool, request.username or NAME, request.username)
        except NoFreeToken:
            return DialectResponse(FailureAnswer("No free token available or token TTL expired"), 404)
        return DialectResponse(AssignedAnswer(token.value))

    async def unblock(self, request: Request) -> Response:
        token = await _token(request)
        if not token:
            return _token_required()
        try:
            await self._pools.release(self._pool, token, LeaseCheck(username=request.username))
        except UnknownToken:
            return _token_not_found()
        except LeaseLost:
            return DialectResponse(FailureAnswer("Token not assigned"), 404)
        return DialectResponse(MessageAnswer(f"Token {token} unblocked successfully"))

    async def delete(self, request: Request) -> Response:
        pool = self._pools.find_managed(self._pool.name, request.identity)
        token = await _token(request)
        if not token:
            return _token_required()
        try:
            await self._pools.delete(pool, token)
        except UnknownToken:
            return _token_not_found()
        return DialectResponse(MessageAnswer(f"Token {token} deleted successfully"))

    async def keep_alive(self, request: Request) -> Response:
        token = await _token(request)
        if not token:
            count = await self._pools.keep_alive_free(self._pool, request.identity)
            return DialectResponse(MessageAnswer(f"TTL extended successfully for {count} tokens"))
        try:
            leased = await self._pools.keep_alive_any(self._pool, token, request.identity)
        except UnknownToken:
            return _token_not_found()
        subject = f"Assigned token {token}" if leased else f"Token {token}"
        return DialectResponse(MessageAnswer(f"{subject} TTL extended successfully"))


async def _token(request: Request) -> str | None:
    return (await request.json_body(_token_decoder, empty=OptionalTokenRequest())).token


def _token_required() -> Response:
    return DialectResponse(MessageAnswer("Token is a required field"), 400)


def _token_not_found() -> Response:
    return DialectResponse(FailureAnswer("Token not found"), 404)


_BODY = (*JSON_BODY, *STORE)
_EXAMPLE_VALUE = "5d1f69b3-7c8a-4ed0-8622-150959fee9cd"
_EXAMPLE = {"token": _EXAMPLE_VALUE}
_NOT_FOUND = Answer(404, "The token does not exist.", FailureAnswer, {"error": "Token not found"})
_NO_TOKEN = Answer(400, "No token was named.", MessageAnswer, {"message": "Token is a required field"})

DOCUMENTATION = Section(
    name=NAME,
    text="Compatible with random-token-generator: a bounded pool of UUIDs.",
    operations=[
        Operation(
            method="POST",
            path="/generate",
            id="randomTokenGeneratorGenerate",
            title="Generate tokens",
            text="Adds free tokens to the pool: all of them, or none if there is too little room.",
            body=GenerateTokensRequest,
            body_required=False,
            example={"count": 1},
            answers=[
                Answer(200, "The new tokens.", TokensAnswer, {"tokens": [_EXAMPLE_VALUE]}),
                Answer(400, "The pool is full.", FailureAnswer, {"error": "Pool max size exceeded"}),
            ],
            refusals=_BODY,
        ),
        Operation(
            method="POST",
            path="/assign",
            id="randomTokenGeneratorAssign",
            title="Lease a token",
            text="Leases the token that has been free for the longest time.",
            answers=[
                Answer(200, "The token.", AssignedAnswer, _EXAMPLE),
                Answer(
                    404, "No token is free.", FailureAnswer, {"error": "No free token available or token TTL expired"}
                ),
            ],
            refusals=STORE,
        ),
        Operation(
            method="POST",
            path="/keep-alive",
            id="randomTokenGeneratorKeepAlive",
            title="Keep a token alive",
            text="Renews a lease, or a free token, for its full duration. Without a token: all free tokens.",
            body=OptionalTokenRequest,
            body_required=False,
            example=_EXAMPLE,
            answers=[
                Answer(
                    200,
                    "It is extended.",
                    MessageAnswer,
                    {"message": f"Assigned token {_EXAMPLE_VALUE} TTL extended successfully"},
                ),
                _NOT_FOUND,
            ],
            refusals=_BODY,
        ),
        Operation(
            method="POST",
            path="/unblock",
            id="randomTokenGeneratorUnblock",
            title="Release a leased token",
            text="Ends the lease of a token.",
            body=TokenRequest,
            example=_EXAMPLE,
            answers=[
                Answer(
                    200,
                    "The lease has ended.",
                    MessageAnswer,
                    {"message": f"Token {_EXAMPLE_VALUE} unblocked successfully"},
                ),
                _NO_TOKEN,
                Answer(404, "The token is not leased.", FailureAnswer, {"error": "Token not assigned"}),
            ],
            refusals=_BODY,
        ),
        Operation(
            method="DELETE",
            path="/delete",
            id="randomTokenGeneratorDelete",
            title="Delete a token",
            text="Deletes a token, also while it is leased.",
            body=TokenRequest,
            example=_EXAMPLE,
            answers=[
                Answer(
                    200,
                    "The token is deleted.",
                    MessageAnswer,
                    {"message": f"Token {_EXAMPLE_VALUE} deleted successfully"},
                ),
                _NO_TOKEN,
                _NOT_FOUND,
            ],
            refusals=_BODY,
        ),
    ],
)
