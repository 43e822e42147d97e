"""The HTTP of token-management-service: a bounded pool whose tokens have owners."""

from typing import Annotated

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import LeaseLost, NoFreeToken, PoolFull, StoreUnavailable, UnknownToken
from tokenauth.models import LeaseCheck
from tokenauth.pools import MAX_TEXT, Pools, check_name
from tokenauth.settings.dialects import DialectSettings
from tokenauth.web import requests
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
