"""What the application answers at once is sent as its other answers are, and it is called for all else."""

import asyncio
from typing import NamedTuple

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from tests.support.speaking import Wire, options, turn
from tokenauth.errors import InvalidToken, StoreUnavailable
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.web.asgi_extensions import AT_ONCE, AnswerAtOnce, AtOnce, RenderedHeaders
from tokenauth.web.responses import NO_STORE
from tokenauth.web.routing import Route

HEADERS = RenderedHeaders(5, [(b"content-length", b"5"), NO_STORE])
GET = b"GET /x?a=b HTTP/1.1\r\nHost: a\r\n\r\n"
ROUTE = Route("/x", {})


class Outcome(NamedTuple):
    sent: bytes
    calls: int
    """How often the application was called."""
    asked: int
    """How often it was asked for an answer at once."""


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    scope["state"]["calls"].append(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b"hello"})


def hello(scope: Scope) -> AnswerAtOnce:
    assert scope["query_string"] == b"a=b"
    assert scope["route"] is ROUTE

    def answer() -> tuple[bytes, bytes]:
        scope["state"]["asked"].append(scope["path"])
        return HEADERS.lines, b"hello"

    return answer


def uninterested(scope: Scope) -> None:
    """Leave it to the application, by a look at the request."""


def refusing(scope: Scope) -> AnswerAtOnce:
    raise InvalidToken


def undecided(scope: Scope) -> AnswerAtOnce:
    return lambda: None


def failing(scope: Scope) -> AnswerAtOnce:
    def answer() -> tuple[bytes, bytes]:
        raise StoreUnavailable

    return answer


async def speak(data: bytes, at_once: AtOnce | None, state: str = "") -> Outcome:
    """Send data to a protocol whose connection is in a state, and then another request."""
    calls: list[str] = []
    times_asked: list[str] = []
    shared = {"calls": calls, "asked": times_asked, AT_ONCE: {"/x": (ROUTE, at_once)} if at_once else {}}
    wire = Wire()
    protocol = BoundedProtocol(options(_app), ServerState(), shared, asyncio.get_running_loop())
    protocol.connection_made(wire)
    if state == "stops":
        protocol.shutdown()
    if state == "is not read":
        protocol.pause_writing()
    protocol.data_received(data)
    if state == "stops meanwhile":
        protocol.shutdown()
    if state == "ends meanwhile":
        protocol.eof_received()
    if state == "is lost meanwhile":
        wire.abort()
        protocol.connection_lost(None)
    await turn()
    if state == "is not read":
        assert not wire.sent
        protocol.resume_writing()
        await turn()
    if not wire.closed and not wire.ends:
        protocol.data_received(b"GET /y HTTP/1.1\r\nHost: a\r\n\r\n")
        await turn()
    if state != "is lost meanwhile":
        protocol.connection_lost(None)
    assert not protocol.tasks
    return Outcome(
        bytes(wire.sent) + (b" (closed)" if wire.closed or wire.ends else b""), calls.count("/x"), len(times_asked)
    )


@pytest.mark.parametrize("at_once", [hello, uninterested, refusing, undecided, failing])
@pytest.mark.parametrize(
    ("data", "state", "asked"),
    [
        (GET, "", 1),
        (GET * 3, "", 3),
        (GET.replace(b"Host", b"Expect: 100-continue\r\nHost"), "", 1),
        (GET.replace(b"Host", b"Connection: close\r\nHost"), "", 0),
        (GET.replace(b"GET", b"HEAD"), "", 0),
        (GET.replace(b"GET", b"POST"), "", 0),
        (GET.replace(b"1.1", b"1.0"), "", 0),
        (GET.replace(b"Host", b"Content-Length: 0\r\nHost"), "", 0),
        (GET.replace(b"Host", b"Content-Length: 4\r\nHost") + b"body", "", 0),
        (GET.replace(b"Host", b"Content-Length: 40\r\nHost") + b"body", "", 0),
        (GET, "stops", 0),
        (GET, "stops meanwhile", 0),
        (GET, "ends meanwhile", 0),
        (GET, "is not read", 0),
    ],
    ids=[
        *("one", "three", "100-continue", "close", "HEAD", "POST", "1.0", "no body", "body", "part of a body"),
        *("stops", "stops meanwhile", "ends meanwhile", "not read"),
    ],
)
async def test_each_request_is_answered_once_and_in_the_same_way(
    at_once: AtOnce, data: bytes, state: str, asked: int
) -> None:
    without = await speak(data, None, state)
    assert without.calls == data.count(b"/x")
    assert without.sent.count(b"HTTP/1.1 200 OK") >= without.calls
    outcome = await speak(data, at_once, state)
    assert outcome.sent == without.sent
    if at_once is hello:  # what is found is sent: it was counted
        assert (outcome.calls, outcome.asked) == (without.calls - asked, asked)
    else:
        assert outcome.calls == without.calls


async def test_nothing_is_sent_to_a_client_that_is_gone() -> None:
    assert (await speak(GET, hello, "is lost meanwhile")).sent == b" (closed)"
