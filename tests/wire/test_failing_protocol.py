"""An error in a callback of a connection: it is closed and not counted any more, and the next one is served."""

import asyncio
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from starlette.responses import PlainTextResponse
from uvicorn.server import ServerState

from tests.support.certificates import make_certificate
from tokenauth.server import tls
from tokenauth.server.acceptor import Acceptor
from tokenauth.server.protocol import BoundedProtocol
from tokenauth.server.worker import uvicorn_options
from tokenauth.settings.model import ServerSettings

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

failing = {"in": ""}
"""The callback that fails now."""


class State(dict[str, Any]):
    """The state of the application, which a connection reads when it begins."""

    def get(self, key: str, default: Any = None) -> Any:
        if failing["in"] == "connection_made":
            raise MemoryError
        return super().get(key, default)


class Failing(BoundedProtocol):
    """Fails in one of its callbacks."""

    def data_received(self, data: bytes) -> None:
        if failing["in"] == "data_received":
            raise MemoryError
        super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        if failing["in"] == "eof_received":
            raise MemoryError
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        if failing["in"] == "connection_lost":
            self.pipeline = cast(Any, None)  # it fails when this is emptied
        super().connection_lost(exc)


async def converse(port: int, secured: ssl.SSLContext | None) -> bytes:
    """Send a request, end this side, and return what is answered before the server closes."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=secured)
        answer = b""
        with suppress(OSError):
            writer.write(REQUEST)
            if failing["in"] in {"data_received", "connection_made"}:
                answer = await reader.read()
            else:
                answer = await reader.readuntil(b"hello")
                if secured:
                    writer.close()  # it cannot end only its own side
                else:
                    writer.write_eof()
                answer += await reader.read()
        writer.transport.abort()
        return answer


async def serve(callback: str, server: ssl.SSLContext | None, client: ssl.SSLContext | None) -> list[int]:
    """Answer a request, four that fail, and another one. Return how many connections are counted after each."""
    options = uvicorn_options(lambda: PlainTextResponse("hello"), ServerSettings())
    options.load()
    state, counted = ServerState(), []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = Acceptor(listener, lambda each: Failing(options, each, State()), state, server)
        for name in ("", callback, callback, callback, callback, ""):
            failing["in"] = name
            with suppress(OSError, asyncio.IncompleteReadError):
                answer = await converse(listener.getsockname()[1], client)
            assert answer.startswith(b"HTTP/1.1 200") or name
            async with asyncio.timeout(20):
                while state.connections:  # noqa: ASYNC110  (nothing tells that one is lost)
                    await asyncio.sleep(0)
            counted.append(len(state.connections))
        acceptor.close()
    return counted


@pytest.mark.parametrize("protocol", ["http", "https"])
@pytest.mark.parametrize("callback", ["connection_made", "data_received", "eof_received", "connection_lost"])
def test_a_connection_that_fails_is_closed_and_not_counted(tmp_path: Path, callback: str, protocol: str) -> None:
    server = client = None
    if protocol == "https":
        made = make_certificate(tmp_path)
        pair = tls.read(ServerSettings(tls_certificate=str(made.certificate), tls_key=str(made.key)))
        assert pair is not None
        server, client = tls.create_context(pair), ssl.create_default_context(cafile=made.certificate)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_exception_handler(lambda _, __: None)
        assert runner.run(serve(callback, server, client)) == [0] * 6
