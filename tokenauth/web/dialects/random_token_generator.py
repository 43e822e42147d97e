"""The HTTP of random-token-generator: a bounded pool of UUIDs."""

from typing import Annotated

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import LeaseLost, NoFreeToken, PoolFull, StoreUnavailable, UnknownToken
from tokenauth.models import LeaseCheck
from tokenauth.pools import MAX_COUNT, Pools
from tokenauth.settings.dialects import DialectSettings
from tokenauth.web import openapi, requests
from tokenauth.web.openapi import Section
from tokenauth.web.operations import JSON_BODY, Answer, Refusals, operation, said
from tokenauth.web.responses import answer_json
from tokenauth.web.routing import Handlers

NAME = "random-token-generator"


class HowMany(msgspec.Struct):
    """How many tokens are to be made."""

    count: Annotated[int, said(minimum=1, maximum=MAX_COUNT)] = 1


class NamedToken(msgspec.Struct):
    """Which token is meant."""

    token: str | None = None


class NamedFor(msgspec.Struct):
    """Which token is meant; it must be said."""

    token: Annotated[str, said(minLength=1)]


class MadeTokens(msgspec.Struct):
    """The tokens that were made."""

    tokens: list[str]


class Assigned(msgspec.Struct):
    """The token that was lent."""

    token: str


class Message(msgspec.Struct):
    """What was done, or is missing."""

    message: str


class Failure(msgspec.Struct):
    """What is in the way."""

    error: str


_wanted = msgspec.json.Decoder(HowMany)
_named = msgspec.json.Decoder(NamedToken)

_UNKNOWN = Failure("Token not found")
_REQUIRED = Message("Token is a required field")

_BODY: Refusals = (*JSON_BODY, StoreUnavailable)
_MISSING = Answer(400, Message)
_FAILED = Answer(404, Failure)


_EXAMPLE_VALUE = "5d1f69b3-7c8a-4ed0-8622-150959fee9cd"
_EXAMPLE = {"token": _EXAMPLE_VALUE}
_NOT_FOUND = openapi.Answer(404, "The token does not exist.", Failure, {"error": "Token not found"})
_NO_TOKEN = openapi.Answer(400, "No token was named.", Message, {"message": "Token is a required field"})

DOCUMENTATION = Section(
    name=NAME,
    text="Compatible with random-token-generator: a bounded pool of UUIDs.",
    operations=[
        openapi.Operation(
            method="POST",
            path="/generate",
            id="randomTokenGeneratorGenerate",
            title="Generate tokens",
            text="Adds free tokens to the pool: all of them, or none if there is too little room.",
            body=HowMany,
            body_required=False,
            example={"count": 1},
            answers=[
                openapi.Answer(200, "The new tokens.", MadeTokens, {"tokens": [_EXAMPLE_VALUE]}),
                openapi.Answer(400, "The pool is full.", Failure, {"error": "Pool max size exceeded"}),
            ],
            refusals=_BODY,
        ),
        openapi.Operation(
            method="POST",
            path="/assign",
            id="randomTokenGeneratorAssign",
            title="Lease a token",
            text="Leases the token that has been free for the longest time.",
            answers=[
                openapi.Answer(200, "The token.", Assigned, _EXAMPLE),
                openapi.Answer(
                    404, "No token is free.", Failure, {"error": "No free token available or token TTL expired"}
                ),
            ],
            refusals=[StoreUnavailable],
        ),
        openapi.Operation(
            method="POST",
            path="/keep-alive",
            id="randomTokenGeneratorKeepAlive",
            title="Keep a token alive",
            text="Lets a lease, or a free token, live for its full time from now. Without a token: all free tokens.",
            body=NamedToken,
            body_required=False,
            example=_EXAMPLE,
            answers=[
                openapi.Answer(
                    200,
                    "It is extended.",
                    Message,
                    {"message": f"Assigned token {_EXAMPLE_VALUE} TTL extended successfully"},
                ),
                _NOT_FOUND,
            ],
            refusals=_BODY,
        ),
        openapi.Operation(
            method="POST",
            path="/unblock",
            id="randomTokenGeneratorUnblock",
            title="Release a leased token",
            text="Ends the lease of a token.",
            body=NamedFor,
            example=_EXAMPLE,
            answers=[
                openapi.Answer(
                    200, "The lease has ended.", Message, {"message": f"Token {_EXAMPLE_VALUE} unblocked successfully"}
                ),
                _NO_TOKEN,
                openapi.Answer(404, "The token is not leased.", Failure, {"error": "Token not assigned"}),
            ],
            refusals=_BODY,
        ),
        openapi.Operation(
            method="DELETE",
            path="/delete",
            id="randomTokenGeneratorDelete",
            title="Delete a token",
            text="Deletes a token, also while it is leased.",
            body=NamedFor,
            example=_EXAMPLE,
            answers=[
                openapi.Answer(
                    200, "The token is deleted.", Message, {"message": f"Token {_EXAMPLE_VALUE} deleted successfully"}
                ),
                _NO_TOKEN,
                _NOT_FOUND,
            ],
            refusals=_BODY,
        ),
    ],
)


class RandomTokenGenerator:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, pools: Pools, terms: DialectSettings) -> None:
        self._pools = pools
        self._pool = pools.find(terms.pool)

    def routes(self) -> dict[str, Handlers]:
        """List the addresses."""
        return {
            "/generate": {"POST": self.generate},
            "/assign": {"POST": self.assign},
            "/unblock": {"POST": self.unblock},
            "/delete": {"DELETE": self.delete},
            "/keep-alive": {"POST": self.keep_alive},
        }

    @operation(Answer(200, MadeTokens), Answer(400, Failure), body=HowMany, empty=True, refuses=_BODY)
    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make tokens."""
        pool = self._pools.find_managed(self._pool.name, requests.user(scope))
        wanted = await requests.json_body(scope, receive, _wanted, empty=HowMany())
        requests.refuse_gone(scope)
        try:
            tokens = await self._pools.generate(pool, wanted.count)
        except PoolFull:
            await answer_json(send, Failure("Pool max size exceeded"), 400)
        else:
            await answer_json(send, MadeTokens(list(tokens)))

    @operation(Answer(200, Assigned), _FAILED, refuses=(StoreUnavailable,))
    async def assign(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend a token."""
        requests.refuse_gone(scope)
        user = requests.username(scope)
        try:
            token = await self._pools.assign(self._pool, user or NAME, user)
        except NoFreeToken:
            await answer_json(send, Failure("No free token available or token TTL expired"), 404)
        else:
            await answer_json(send, Assigned(token.value))

    @operation(Answer(200, Message), _MISSING, _FAILED, body=NamedFor, refuses=_BODY)
    async def unblock(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End a lease."""
        token = await _token(scope, receive)
        if not token:
            await answer_json(send, _REQUIRED, 400)
            return
        try:
            await self._pools.release(self._pool, token, LeaseCheck(username=requests.username(scope)))
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 404)
        except LeaseLost:
            await answer_json(send, Failure("Token not assigned"), 404)
        else:
            await answer_json(send, Message(f"Token {token} unblocked successfully"))

    @operation(Answer(200, Message), _MISSING, _FAILED, body=NamedFor, refuses=_BODY)
    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Delete a token, free or lent."""
        pool = self._pools.find_managed(self._pool.name, requests.user(scope))
        token = await _token(scope, receive)
        if not token:
            await answer_json(send, _REQUIRED, 400)
            return
        try:
            await self._pools.delete(pool, token)
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 404)
        else:
            await answer_json(send, Message(f"Token {token} deleted successfully"))

    @operation(Answer(200, Message), _FAILED, body=NamedToken, empty=True, refuses=_BODY)
    async def keep_alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one token, or all free ones, live for their full time from now."""
        token = await _token(scope, receive)
        if not token:
            count = await self._pools.keep_alive_free(self._pool, requests.user(scope))
            await answer_json(send, Message(f"TTL extended successfully for {count} tokens"))
            return
        try:
            lent = await self._pools.keep_alive_any(self._pool, token, requests.user(scope))
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 404)
        else:
            subject = f"Assigned token {token}" if lent else f"Token {token}"
            await answer_json(send, Message(f"{subject} TTL extended successfully"))


async def _token(scope: Scope, receive: Receive) -> str | None:
    named = await requests.json_body(scope, receive, _named, empty=NamedToken())
    return named.token
