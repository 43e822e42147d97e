"""What the clients make of the options for httpx: headers, redirects, and the number of connections."""

import asyncio
import traceback
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import Server
from tests.wire.client.sites import Answer, Seen, site
from tests.wire.client_pools.clients import Connect, Watch
from tokenauth import errors
from tokenauth.client import AsyncPoolClient, PoolClient

VALUE = "7" * 64


@pytest.mark.parametrize("kind", [PoolClient, AsyncPoolClient])
@pytest.mark.parametrize("mark", ["\n", "\r\nX-Token: 8", "\0", "\u00e9", "\udc00"], ids=ascii)
def test_headers_that_cannot_be_sent_are_not_quoted(kind: type[Any], mark: str) -> None:
    """A token that was read from a file may have a line break. The errors of httpx and h11 have the token."""
    with pytest.raises(ValueError, match="headers: a value has a character that cannot be sent") as refused:
        kind("http://127.0.0.1:1", headers={"X-Token": VALUE + mark})
    error = refused.value
    assert VALUE not in "".join([repr(error), repr(error.__context__), *traceback.format_exception(error)])


def test_a_redirect_takes_no_token_elsewhere(connect: Connect) -> None:
    """Httpx sends X-Token along to any origin."""
    with (
        site(lambda request: (200, {}, b"")) as elsewhere,
        site(lambda request: (307, {"Location": f"{elsewhere.url}/taken"}, b"")) as home,
    ):
        client = connect(home.url, headers={"X-Token": VALUE}, follow_redirects=True)
        with pytest.raises(errors.IssuerUnavailable), client.lease("permit"):
            raise AssertionError("there is no lease")
        assert home.paths() == ["POST /api/pools/permit/leases"]
        assert elsewhere.seen == []


class _Done:
    """What a hook returns: an AsyncClient awaits it, and a Client ignores it."""

    def __await__(self) -> Iterator[None]:
        return iter(())


def test_an_error_of_a_hook_does_not_show_the_token(connect: Connect, watch: Watch) -> None:
    """A keep-alive has the token in its URL, and that is in the text of an HTTPStatusError."""
    grant = b'{"token": "%b", "holder": "ann", "fence": 1, "expires_in": 9}' % VALUE.encode()

    def answer(request: Seen) -> Answer:
        watch.advance(2)  # it was waited for, so the client keeps it alive before it uses it
        return (201, {}, grant) if request.method == "POST" else (502, {}, b"")

    def check(response: httpx.Response) -> _Done:
        response.raise_for_status()
        return _Done()

    with site(answer) as home:
        client = connect(home.url, monotonic=watch, event_hooks={"response": [check]})
        with pytest.raises(errors.IssuerUnavailable) as refused, client.lease("permit", wait=1):
            raise AssertionError("there is no lease")
        assert VALUE in "".join(home.paths())
    assert VALUE not in "".join(traceback.format_exception(refused.value))


async def test_many_that_wait_do_not_hold_up_a_release(
    server: Server, login: dict[str, str], admin: PoolUser, watch: Watch
) -> None:
    """They are more than the connections that httpx opens by default."""

    async def hold() -> None:
        async with pools.lease("permit", wait=60):
            pass

    def connected() -> bool:
        return len(admin.call("GET", "/permit/requests")[1]["requests"]) >= 100

    async with AsyncPoolClient(server.url, headers=login, monotonic=watch) as pools, asyncio.timeout(60):
        async with pools.lease("permit"):
            waiting = [asyncio.create_task(hold()) for _ in range(101)]
            await asyncio.to_thread(until, connected, "they wait")
        await asyncio.gather(*waiting)
