"""Requests as an ASGI server passes them on."""

import msgspec
import pytest
from starlette.responses import Response
from starlette.types import Message

from tokenauth.errors import InvalidRequest
from tokenauth.web.requests import Request
from tokenauth.web.responses import NO_CONTENT
from tokenauth.web.routes.account import RotateRequest
from tokenauth.web.routing import strict

DECODER = msgspec.json.Decoder(RotateRequest)


def request(body: bytes, version: str, *headers: tuple[bytes, bytes]) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    return Request({"type": "http", "http_version": version, "headers": headers, "query_string": b""}, receive)


@pytest.mark.parametrize("version", ["2", "3"])
async def test_a_body_without_a_length_is_read(version: str) -> None:
    """Only HTTP/1 must announce it: a token would be rotated without its overlap."""
    sent = request(b'{"overlap": 60}', version)
    assert await sent.json_body(DECODER, RotateRequest()) == RotateRequest(60)
    assert await request(b"", version).json_body(DECODER, RotateRequest()) == RotateRequest()
    page = request(b'{"overlap": 60}', version, (b"origin", b"https://foreign.example"))
    with pytest.raises(InvalidRequest):
        await page.json_body(DECODER, RotateRequest())


async def test_an_unexpected_body_without_a_length_is_refused() -> None:
    async def handle(request: Request) -> Response:
        return NO_CONTENT

    handler = strict(handle)
    assert await handler(request(b"{}", "2")) is NO_CONTENT
    with pytest.raises(InvalidRequest):
        await handler(request(b'{"token": "x"}', "2"))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_http_1_announces_each_body(version: str) -> None:
    """The server reads nothing after a head that announces none: it would be the next request."""
    assert not request(b"", version).has_body
    assert request(b"{}", version, (b"content-length", b"2")).has_body
    assert request(b"{}", version, (b"transfer-encoding", b"chunked")).has_body


@pytest.mark.parametrize("before", [0, 200, 255])
def test_no_part_of_a_token_is_left_of_an_agent(before: int) -> None:
    value = "Zy9" * 21 + "x"
    sent = request(b"", "1.1", (b"user-agent", f"{'-' * before}{value} more".encode()))
    assert sent.user_agent == f"{'-' * before}(token) more"[:256]
