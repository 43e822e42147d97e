"""Headers that are rendered once are sent as uvicorn sends a list of them, in every state of a connection."""

import asyncio
from collections.abc import Sequence

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http import httptools_impl
from uvicorn.server import ServerState

from tests.support.speaking import Wire, options, turn
from tokenauth.server import protocol
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.web.asgi_extensions import RenderedHeaders
from tokenauth.web.responses import NO_CONTENT, NO_STORE

Headers = Sequence[tuple[bytes, bytes]]

DATE = (b"date", b"Sat, 28 Nov 2026 18:00:00 GMT")
HEADERS = RenderedHeaders(5, [(b"content-length", b"5"), NO_STORE])
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"


async def answer(
    request: bytes,
    headers: Headers,
    status: int = 200,
    paused: bool = False,
    ends: bool = False,
    body: bytes | None = None,
    parts: Sequence[bytes] = (),
) -> bytes:
    """Send a request, and return all that is sent for it and a second one. `parts` of the body are sent before it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": body})

    if body is None:
        body = b"hello" if status == 200 else b""
    state, wire = ServerState(), Wire()
    state.default_headers = [DATE]
    connected = BoundedProtocol(options(app), state, {}, asyncio.get_running_loop())
    connected.connection_made(wire)
    if ends:
        connected.shutdown()
    if paused:
        connected.pause_writing()
    connected.data_received(request)
    await turn()
    assert bool(wire.sent) is not paused
    if paused:
        connected.resume_writing()
        await turn()
    if not wire.closed and not wire.ends:
        connected.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await turn()
    sent = bytes(wire.sent) + (b" (closed)" if wire.closed or wire.ends else b"")
    connected.connection_lost(None)
    return sent


@pytest.mark.parametrize(
    ("request_", "status", "paused", "ends"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, False, False),
        (b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", 200, False, False),
        (b"GET / HTTP/1.0\r\n\r\n", 200, False, False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200, False, False),
        (POST + b"hello", 200, False, False),
        (POST + b"hel", 200, False, False),
        (POST.replace(b"Host", b"Expect: 100-continue\r\nHost") + b"hello", 200, False, False),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, True, False),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200, False, True),
        (b"DELETE / HTTP/1.1\r\nHost: a\r\n\r\n", 204, False, False),
    ],
    ids=["GET", "HEAD", "1.0", "close", "body", "part of a body", "100-continue", "not read", "shutdown", "no content"],
)
async def test_rendered_headers_are_sent_like_others(request_: bytes, status: int, paused: bool, ends: bool) -> None:
    headers = HEADERS if status == 200 else NO_CONTENT.raw_headers
    assert isinstance(headers, RenderedHeaders)
    sent = await answer(request_, headers, status, paused, ends)
    assert sent.startswith(b"HTTP/1.1 ")
    assert sent == await answer(request_, [*headers], status, paused, ends)


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize(
    ("parts", "body"),
    [([b"hel"], b"lo"), ([b"hello"], b""), ([b""], b"hello"), ([], b"hell"), ([], b"hello!"), ([b"hel"], b"lo!")],
    ids=["parts", "all in the first", "all in the last", "too short", "too long", "parts too long"],
)
async def test_bodies_of_any_length_are_sent_like_others(method: bytes, parts: Sequence[bytes], body: bytes) -> None:
    request = method + b" / HTTP/1.1\r\nHost: a\r\n\r\n"
    sent = await answer(request, HEADERS, body=body, parts=parts)
    assert sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert sent == await answer(request, [*HEADERS], body=body, parts=parts)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        POST + b"hello",
        POST + b"hel",
    ],
    ids=["GET", "HEAD", "1.0", "body", "part of a body"],
)
@pytest.mark.parametrize(("status", "length"), [(200, 5), (200, 0), (204, 0)])
@pytest.mark.parametrize(
    ("more", "closes"),
    [
        ([(b"content-length", b"%d"), (b"connection", b"close")], True),
        ([(b"content-length", b"%d"), (b"connection", b"keep-alive, Close")], True),
        ([(b"content-length", b"%d"), (b"connection", b"keep-alive")], False),
        ([(b"connection", b"close")], True),
        ([(b"transfer-encoding", b"chunked")], False),
        ([(b"content-length", b"%d"), (b"transfer-encoding", b"chunked")], False),
        ([(b"content-length", b"%d"), (b"content-length", b"9")], False),
        ([(b"content-length", b"9")], False),
        ([], False),
    ],
    ids=["close", "a list", "keep-alive", "only close", "chunked", "both", "two lengths", "another length", "none"],
)
async def test_headers_that_a_server_interprets_count(
    request_: bytes, status: int, length: int, more: Headers, closes: bool
) -> None:
    headers = [NO_STORE, *((name, value.replace(b"%d", b"%d" % length)) for name, value in more)]
    body = b"hello"[:length]
    sent = await answer(request_, RenderedHeaders(length, headers), status, body=body)
    assert sent == await answer(request_, headers, status, body=body)
    assert not closes or sent.endswith(b"(closed)")


async def test_rendered_headers_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would show nothing."""
    monkeypatch.setattr(protocol, "_send", httptools_impl.RequestResponseCycle.send)
    with_all = await answer(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", HEADERS)
    assert b"nosniff" in with_all
    assert b"nosniff" not in await answer(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", [*HEADERS])
    assert isinstance(NO_CONTENT.raw_headers, RenderedHeaders)
    assert b"nosniff" in await answer(b"DELETE / HTTP/1.1\r\nHost: a\r\n\r\n", NO_CONTENT.raw_headers, 204)


@pytest.mark.parametrize("header", [(b"a\r\nb", b"c"), (b"a", b"b\r\nc: d"), (b"A", b"b")])
def test_no_header_can_end_its_line(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="not a header"):
        RenderedHeaders(0, [header])
