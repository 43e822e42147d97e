"""RemoteTokens while the issuer is unreachable: no token is accepted, except within the grace."""

import asyncio
import logging
import socket
import traceback
from contextlib import suppress

import pytest

from tests.support.servers import START
from tests.wire.client.conftest import Connect
from tests.wire.client.issuers import INVALID, URL, Hand, HeldIssuer, Reply, me, token
from tokenauth.client import RemoteTokens
from tokenauth.errors import IssuerUnavailable

VALUE = token(1)

NO_ANSWERS: dict[str, Reply] = {
    "500": (500, b""),
    "503": (503, b'{"error": "store_unavailable", "error_description": "..."}'),
    "307": (307, b""),
    "404": (404, b'{"error": "not_found", "error_description": "..."}'),
    "400": (400, b'{"error": "invalid_request", "error_description": "..."}'),
    "403": (403, b'{"error": "invalid_token", "error_description": "..."}'),
    "204": (204, b""),
    "401 no token came through": (401, b'{"error": "token_required", "error_description": "..."}'),
    "401 of a proxy": (401, b"<h1>Unauthorized</h1>"),
    "401 that is a list": (401, b'["invalid_token"]'),
    "200 of a proxy": (200, b"<h1>Welcome</h1>"),
    "200 of another service": (200, b'{"username": "ann"}'),
    "200 without a username": (200, me(VALUE, username="")),
    "200 of another token": (200, me(token(2))),
    "200 with scopes in one string": (200, me(VALUE, scopes="read write")),
    "200 without an end": (200, me(VALUE, expiry_time=None)),
    "200 nested too deep": (200, b'{"x":' * 100_000),
    "200 not in UTF-8": (200, me(VALUE).replace(b"ann", b"\xff")),
}


@pytest.mark.parametrize("reply", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
async def test_any_other_answer_refuses_the_token(connect: Connect, issuer: HeldIssuer, reply: Reply) -> None:
    tokens = connect(max_age=0, client=issuer.client(follow_redirects=True))
    issuer.reply = lambda _: reply
    with pytest.raises(IssuerUnavailable):
        await tokens.identify(VALUE)
    assert len(issuer.asked) == 1
    issuer.reply = lambda value: (200, me(value))
    assert await tokens.identify(VALUE) is not None


async def test_an_unreachable_issuer_refuses_every_token() -> None:
    async with RemoteTokens("http://127.0.0.1:1") as tokens:
        with pytest.raises(IssuerUnavailable):
            await tokens.identify(VALUE)


async def test_an_issuer_timeout_refuses_every_token(connect: Connect, issuer: HeldIssuer) -> None:
    issuer.gate.clear()
    async with asyncio.timeout(20):
        with pytest.raises(IssuerUnavailable):
            await connect(timeout=0.01).identify(VALUE)


async def test_a_byte_by_byte_answer_is_bounded_by_the_timeout() -> None:
    """Each byte arrives in time, but not the whole response: `timeout` is for the whole."""

    async def dribble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.set()
        with suppress(ConnectionError):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()
        gone.set()

    begun, gone = asyncio.Event(), asyncio.Event()
    server = await asyncio.start_server(dribble, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{_port(server.sockets[0])}"
    async with server, asyncio.timeout(60), RemoteTokens(url, timeout=0.2) as tokens:
        while not begun.is_set():  # on a busy machine, the time may be over before it is connected
            with pytest.raises(IssuerUnavailable):
                await tokens.identify(VALUE)
        await gone.wait()


async def test_closing_fails_pending_lookups(connect: Connect, issuer: HeldIssuer) -> None:
    tokens = connect()
    issuer.gate.clear()
    lookup = asyncio.create_task(tokens.identify(VALUE))
    await issuer.await_requests(1)
    await tokens.aclose()
    with pytest.raises(IssuerUnavailable):
        await lookup


async def test_a_confirmed_token_is_accepted_for_the_grace_only(
    connect: Connect, issuer: HeldIssuer, monotonic: Hand
) -> None:
    tokens = connect(max_age=2, stale_grace=60)
    confirmed = await tokens.identify(VALUE)
    issuer.reply = lambda _: (503, b"")
    monotonic.now += 62
    assert await tokens.identify(VALUE) is confirmed
    assert len(issuer.asked) == 2, "the issuer is still asked after a stale answer"
    monotonic.now += 0.001
    with pytest.raises(IssuerUnavailable):
        await tokens.identify(VALUE)


async def test_without_grace_a_confirmation_lasts_max_age(
    connect: Connect, issuer: HeldIssuer, monotonic: Hand
) -> None:
    tokens = connect(max_age=2)
    await tokens.identify(VALUE)
    issuer.reply = lambda _: (503, b"")
    monotonic.now += 2
    with pytest.raises(IssuerUnavailable):
        await tokens.identify(VALUE)


async def test_grace_applies_only_to_confirmed_tokens(connect: Connect, issuer: HeldIssuer, monotonic: Hand) -> None:
    tokens = connect(max_age=0, stale_grace=60)
    await tokens.identify(VALUE)
    issuer.reply = lambda _: INVALID
    assert await tokens.identify(VALUE) is None
    issuer.reply = lambda _: (503, b"")
    for value in (VALUE, token(2)):
        with pytest.raises(IssuerUnavailable):
            await tokens.identify(value)


async def test_grace_does_not_revive_expired_tokens(connect: Connect, issuer: HeldIssuer, wall: Hand) -> None:
    tokens = connect(max_age=0, stale_grace=60)
    issuer.reply = lambda value: (200, me(value, expiry_time=int(START) + 10))
    await tokens.identify(VALUE)
    issuer.reply = lambda _: (503, b"")
    wall.now += 9
    assert await tokens.identify(VALUE) is not None
    wall.now += 1
    with pytest.raises(IssuerUnavailable):
        await tokens.identify(VALUE)


@pytest.mark.parametrize("stale_grace", [0, 60])
async def test_an_outage_is_logged_once_and_without_a_token(
    connect: Connect, issuer: HeldIssuer, caplog: pytest.LogCaptureFixture, stale_grace: float
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = connect(max_age=0, stale_grace=stale_grace)
    messages = []
    for _ in range(2):
        issuer.reply = lambda _: (503, b"")
        for _ in range(3):
            with pytest.raises(IssuerUnavailable):
                await tokens.identify(VALUE)
        issuer.reply = lambda _: INVALID
        await tokens.identify(VALUE)
        messages.append([record.getMessage() for record in caplog.records if record.name == "tokenauth.client"])
    assert messages[0] == [f"tokenauth at {URL} is unreachable: it answers 503."]
    assert len(messages[1]) == 2
    assert VALUE.decode() not in caplog.text


async def test_a_closed_client_refuses_every_token(connect: Connect) -> None:
    tokens = connect()
    await tokens._client.aclose()
    with pytest.raises(IssuerUnavailable):
        await tokens.identify(VALUE)


async def test_no_error_or_its_cause_contains_the_token() -> None:
    async with RemoteTokens("http://127.0.0.1:1") as tokens:
        with pytest.raises(IssuerUnavailable) as caught:
            await tokens.identify(VALUE)
    assert caught.value.__context__ is None
    assert VALUE.decode() not in "".join(traceback.format_exception(caught.value))


def _port(listening: socket.socket) -> int:
    return int(listening.getsockname()[1])
