"""The usual body of a log-out is read the short way, with the result of the search that all others get."""

from collections.abc import Sequence

import pytest
from starlette.types import Message

from tokenauth.web.logout_tokens import find_logout_tokens
from tokenauth.web.requests import Request

VALUE, OTHER = b"a" * 63 + b"1", b"b" * 63 + b"2"
BODY = b'{"token": "%b"}' % VALUE


async def find(
    body: bytes, headers: Sequence[tuple[bytes, bytes]] = (), query: bytes = b"", cut: bool = False
) -> Sequence[bytes]:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": cut}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    scope = {"type": "http", "method": "DELETE", "headers": [*headers], "query_string": query}
    return await find_logout_tokens(Request(scope, receive))


@pytest.mark.parametrize(
    ("headers", "query", "cut"),
    [
        ([], b"", False),
        ([(b"x-token", OTHER)], b"", False),
        ([(b"authorization", b"Bearer " + OTHER)], b"", False),
        ([(b"content-encoding", b"gzip")], b"", False),
        ([], b"token=" + OTHER, False),
        ([], b"", True),
    ],
    ids=["alone", "X-Token", "Bearer", "encoding", "query", "cut off"],
)
@pytest.mark.parametrize("body", [BODY, BODY.replace(b" ", b"")], ids=["blank", "dense"])
async def test_the_usual_body_is_read_like_others(
    body: bytes, headers: Sequence[tuple[bytes, bytes]], query: bytes, cut: bool
) -> None:
    found = await find(body, headers, query, cut)
    assert VALUE in found
    assert found == await find(b" " + body, headers, query, cut)


@pytest.mark.parametrize("body", [BODY.replace(b"token", b"other"), BODY[:-1] + b', "token": "%b"}' % OTHER])
async def test_other_bodies_are_searched(body: bytes) -> None:
    assert OTHER in await find(body, [(b"x-token", OTHER)])
