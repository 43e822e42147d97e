"""The HTTP of random-token-generator: a bounded pool of UUIDs."""

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import LeaseLost, NoFreeToken, PoolFull, UnknownToken
from tokenauth.lending import Dialect
from tokenauth.pools import Pools
from tokenauth.routes import requests
from tokenauth.routes.refusals import answer_json
from tokenauth.routes.table import Handlers

NAME = "random-token-generator"

_UNKNOWN = {"error": "Token not found"}
_REQUIRED = {"message": "Token is a required field"}


class _Wanted(msgspec.Struct):
    count: int = 1


class _Named(msgspec.Struct):
    token: str | None = None


_wanted = msgspec.json.Decoder(_Wanted)
_named = msgspec.json.Decoder(_Named)


class RandomTokenGenerator:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, pools: Pools, terms: Dialect) -> None:
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

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make tokens."""
        wanted = await requests.json_body(scope, receive, _wanted, empty=_Wanted())
        try:
            tokens = await self._pools.generate(self._pool, wanted.count)
        except PoolFull:
            await answer_json(send, {"error": "Pool max size exceeded"}, 400)
        else:
            await answer_json(send, {"tokens": tokens})

    async def assign(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend a token."""
        try:
            token = await self._pools.assign(self._pool, requests.caller(scope, NAME))
        except NoFreeToken:
            await answer_json(send, {"error": "No free token available or token TTL expired"}, 404)
        else:
            await answer_json(send, {"token": token.value})

    async def unblock(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End a lease."""
        token = await _token(scope, receive)
        if not token:
            await answer_json(send, _REQUIRED, 400)
            return
        try:
            await self._pools.release(self._pool, token)
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 404)
        except LeaseLost:
            await answer_json(send, {"error": "Token not assigned"}, 404)
        else:
            await answer_json(send, {"message": f"Token {token} unblocked successfully"})

    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Delete a token, free or lent."""
        token = await _token(scope, receive)
        if not token:
            await answer_json(send, _REQUIRED, 400)
            return
        try:
            await self._pools.delete(self._pool, token)
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 404)
        else:
            await answer_json(send, {"message": f"Token {token} deleted successfully"})

    async def keep_alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one token, or all free ones, live for their full time from now."""
        token = await _token(scope, receive)
        if not token:
            count = await self._pools.refresh_free(self._pool)
            await answer_json(send, {"message": f"TTL extended successfully for {count} tokens"})
            return
        try:
            _, lent = await self._pools.refresh(self._pool, token)
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 404)
        else:
            subject = f"Assigned token {token}" if lent else f"Token {token}"
            await answer_json(send, {"message": f"{subject} TTL extended successfully"})


async def _token(scope: Scope, receive: Receive) -> str | None:
    named = await requests.json_body(scope, receive, _named, empty=_Named())
    return named.token
