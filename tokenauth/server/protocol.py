"""uvicorn's HTTP protocol with strict framing and bounded memory for each connection.

httptools (llhttp) refuses most of what RFC 9112 calls ambiguous. This module decides the rest. A request whose end is
not certain is refused and its connection closed: nothing that follows is read as a request.
"""

import asyncio
import re
import sys
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from functools import lru_cache, partial
from types import FunctionType
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import httptools
from httptools import HttpParserError, HttpParserUpgrade
from httptools.parser.url_parser import URL
from uvicorn._types import ASGI3Application, ASGISendEvent
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tokenauth.errors import Stopping
from tokenauth.server.head_limit import HeadLimit
from tokenauth.server.transport import MAX_DISCARDED, LingeringTransport
from tokenauth.web import urlencoding
from tokenauth.web.asgi_extensions import AT_ONCE, CLIENT, REFUSAL_RULES, AnswerAtOnce, RefusalRules, RenderedHeaders

MAX_HEAD = 16 * 1024
"""Bytes of a request line with its headers, of a chunk's head, and of trailers. More are answered 431."""

DRAIN = 1.0
"""Seconds that an idle connection stays open at shutdown, since a request may be on its way."""

HALF_CLOSE = 0.1
"""A client that ends its side within this many seconds of its last byte still waits for the answer, as `nc -N` does."""

SLOW = 60.0
"""Timeout in seconds for receiving a head, for receiving a body, and for reading the answer. It can take twice that."""

_PIECE = 1024
"""Bytes to feed to the parser at a time, so that few pipelined requests are parsed before their turn."""

_ORIGIN_TIMEOUT = 1.0
"""Seconds to search the rest of a head that is too large for its Origin header before refusing it."""

_MAX_ORIGIN = 512
"""Bytes of an Origin header; a host name has at most 253."""

_FRAMING_HEADERS = frozenset({b"host", b"expect", b"content-length", b"transfer-encoding"})
_CLOSE = (b"connection", b"close")
_BLANK_LINE = b"\r\n\r\n"
_BLANK, _SLASH, _HASH = b" /#"


_SECURITY_HEADERS = b"x-content-type-options: nosniff\r\nreferrer-policy: no-referrer\r\n"
"""Headers of every answer: browsers must not guess its type, and must not tell other sites the address of the page."""

Headers = Collection[tuple[bytes, bytes]]

_Refusal = tuple[bytes, bytes]
"""An answer of this module, as head and body: more headers can be put between them."""


def _refusal(status: str, message: str, media_type: str = "text/plain; charset=utf-8") -> _Refusal:
    head = f"HTTP/1.1 {status}\r\n{_SECURITY_HEADERS.decode()}connection: close\r\ncache-control: no-store\r\n"
    content = f"content-type: {media_type}\r\ncontent-length: {len(message) + 1}\r\n"
    return f"{head}{content}".encode(), f"\r\n{message}\n".encode()


_HEAD_TOO_LARGE = _refusal("431 Request Header Fields Too Large", "The request headers are larger than 16 KiB.")
_BAD_REQUEST = _refusal("400 Bad Request", "Invalid HTTP request received.")
_OUT_OF_MEMORY = _refusal(
    "503 Service Unavailable\r\nretry-after: 1", "The server is short of memory. Try again shortly."
)
_STOPPING = _refusal(
    "503 Service Unavailable\r\nretry-after: 1",
    f'{{"error":"{Stopping.code}","error_description":"{Stopping.description}"}}',
    "application/json",
)
_UNAUTHORIZED = _refusal(
    '401 Unauthorized\r\nwww-authenticate: Bearer realm="tokenauth"', "The request headers are too large or broken."
)

_ORIGIN = re.compile(rb"(?:^|\n)origin:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)
_TARGET = re.compile(rb"[^ \r\n]+ +([^ ?#\r\n]*)[ ?#\r\n]")
_USER = re.compile(rb"[^/?]*//[^/?]*@")
_HOST = re.compile(rb"(?:[\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-fv:.]+\])(?::\d*)?", re.ASCII)


class _BadHead(Exception):
    """The parser accepts a head that this server refuses."""


class _Flow(FlowControl):
    """uvicorn's flow control, whose reading can be held: nothing else then resumes it."""

    held = False

    def hold(self) -> None:
        """Read nothing until `release`."""
        self.held = True
        self.pause_reading()

    def release(self) -> None:
        self.held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        """Resume reading, unless it is held."""
        if not self.held:
            super().resume_reading()


_STATUS_LINES = {status: line + _SECURITY_HEADERS for status, line in STATUS_LINE.items()}

_send = FunctionType(RequestResponseCycle.send.__code__, {**vars(httptools_impl), "STATUS_LINE": _STATUS_LINES})
"""uvicorn's `send`, with _SECURITY_HEADERS in each status line. As headers, they cost 1 microsecond an answer."""


async def _send_500_response(cycle: RequestResponseCycle) -> None:
    """Answer a request whose application raised an error: 503 for lack of memory, and at a stop, else 500."""
    if not isinstance(sys.exception(), MemoryError | asyncio.CancelledError):
        await RequestResponseCycle.send_500_response(cycle)
        return
    headers = [(b"retry-after", b"1"), (b"content-length", b"0"), _CLOSE]
    await cycle.send({"type": "http.response.start", "status": 503, "headers": headers})
    await cycle.send({"type": "http.response.body", "body": b"", "more_body": False})


@lru_cache(maxsize=2)
def _render(headers: Headers) -> bytes | None:
    """Return the lines of the headers that the server adds to each answer; None if they close the connection."""
    return None if _CLOSE in headers else b"".join(b"%b: %b\r\n" % header for header in headers)


async def _sent() -> None:
    """Return what `send` returns when all is sent."""


def _nothing() -> None:
    """Do nothing."""


class _Cycle(RequestResponseCycle):
    """A request without a body, and its answer."""

    send_500_response = _send_500_response

    _head = b""  # of an answer whose body has its length: they are sent together

    def send(self, message: ASGISendEvent) -> Coroutine[Any, Any, None]:
        """Send as uvicorn does, and an answer with plain RenderedHeaders in a fifth of the time."""
        head = self._head
        if head:
            self._head = b""
            body: bytes = message.get("body", b"")  # type: ignore[assignment]
            if (
                len(body) != self.expected_content_length
                or message["type"] != "http.response.body"
                or message.get("more_body")
                or self.disconnected
                or self.flow.write_paused
            ):
                self.transport.write(head)
                return _send(self, message)  # type: ignore[no-any-return]
            self.transport.write(head + body)
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()
            return _sent()
        headers = message.get("headers")
        if (
            type(headers) is RenderedHeaders
            and headers.plain
            and (headers.content_length or message["status"] == 204)  # type: ignore[typeddict-item]  # others need a length
            and self.keep_alive
            and not (self.response_started or self.disconnected or self.flow.write_paused)
            and self.scope["method"] != "HEAD"
        ):
            lines = _render(tuple(self.default_headers))
            if lines is not None:
                self.response_started = True
                self.waiting_for_100_continue = self.chunked_encoding = False
                self.expected_content_length = headers.content_length
                status: int = message["status"]  # type: ignore[typeddict-item]
                self._head = b"%b%b%b\r\n" % (_STATUS_LINES[status], lines, headers.lines)
                return _sent()
        sent: Coroutine[Any, Any, None] = _send(self, message)
        return sent

    def answer_at_once(self, answer: AnswerAtOnce) -> bool:
        """Send an answer, if it can be sent now. Return False if the application must be called."""
        lines = _render(tuple(self.default_headers))
        if lines is None or not self.keep_alive or self.disconnected or self.flow.write_paused:
            return False
        try:
            found = answer()
        except Exception:  # the application will meet it again, and report it
            return False
        if found is None:
            return False
        headers, body = found
        self.transport.write(b"%b%b%b\r\n%b" % (_STATUS_LINES[200], lines, headers, body))
        self.response_started = self.response_complete = True
        self.message_event.set()
        self.on_response()
        self.on_response = _nothing  # it refers to the protocol, which refers to this
        return True


class _CycleWithBody(_Cycle):
    """A request with a body, and its answer. An answer before the end of the body closes the connection."""

    transport: LingeringTransport  # type: ignore[assignment]

    def send(self, message: ASGISendEvent) -> Coroutine[Any, Any, None]:
        if self.more_body:
            self.keep_alive = False
            self.transport.lingers = True
        return _Cycle.send(self, message)


class _CycleOfHTTP10(_CycleWithBody):
    """A request of HTTP/1.0, which knows no chunks: an answer without a length ends with the connection."""

    _has_length = True

    def send(self, message: ASGISendEvent) -> Coroutine[Any, Any, None]:
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                self.chunked_encoding = False
        elif message["type"] == "http.response.body" and not self._has_length:
            self.expected_content_length = len(message.get("body", b""))  # what uvicorn expects of this part
        return super().send(message)


class BoundedProtocol(HttpToolsProtocol):
    """Answers the requests of a connection in order, loses none at shutdown, and keeps little memory for it.

    A connection holds at most: a head of MAX_HEAD bytes, 64 KiB of a body that the application has not read, one read
    of the socket that waits behind requests (256 KiB), the requests in _PIECE bytes, and 128 KiB of answers that the
    client has not read.

    Each request's scope has the extension CLIENT. `gone` becomes true when the connection is lost, and when the client
    ends its side more than HALF_CLOSE after its last byte. A test that wants it at once closes with SO_LINGER (1, 0).
    """

    transport: LingeringTransport  # type: ignore[assignment]
    flow: _Flow
    url = b""
    _rules = RefusalRules()
    _line = b""
    _is_head = False
    _body_left = 0
    _between_chunks = False
    _line_ended = False
    _eof = False
    _upgrades = False
    _malformed = False
    _has_body = False
    _chunked = False
    _refused = False
    _host: bytes | None = None
    _valid_host = b""
    _unread = b""
    _received_at = 0.0
    _idle_since = 0.0
    _incomplete: object = None
    _last_answer: Callable[[], object] | None = None
    _timeout: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, or close the connection if that fails: the event loop would leave it open, and it would be counted."""
        try:
            self._begin(transport)
        except BaseException:  # memory is short
            self.connections.discard(self)
            self.transport = self.transport or cast(LingeringTransport, transport)
            transport.abort()
            raise

    def _begin(self, transport: asyncio.Transport) -> None:
        wrapped = LingeringTransport(transport, self.loop)
        accepted = self.client
        super().connection_made(cast(asyncio.Transport, wrapped))
        self.client = accepted or self.client  # after a reset, only `accept` knew it
        self.flow = _Flow(cast(asyncio.Transport, wrapped))
        self._rules = self.app_state.get(REFUSAL_RULES, RefusalRules())
        self._at_once = self.app_state.get(AT_ONCE, {})
        self._head_limit = HeadLimit(MAX_HEAD)
        self._client = {"gone": False, "stopping": False, "transport": wrapped}
        self._extensions = {CLIENT: self._client}
        self._idle_since = self.loop.time()
        self._timeout = self.loop.call_later(self.timeout_keep_alive, self._check_timeouts)

    def connection_lost(self, exc: Exception | None) -> None:
        if self not in self.connections:  # it could not begin
            return
        try:
            self._client["gone"] = True
            self.pipeline.clear()
            self._unread = b""
            for timer in (self._timeout, self._stalled):
                if timer is not None:
                    timer.cancel()
        finally:
            super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Close the connection when the requests that were received whole have been answered. With TLS, at once.

        asyncio cannot send over TLS once the client has ended its side.
        """
        self._eof = self.flow.held = True
        self.transport.lingers = False  # it sends no more
        if self.scheme == "https":
            self._client["gone"] = True
            return False
        if self.loop.time() - self._received_at > HALF_CLOSE:
            self._client["gone"] = True
        if self.transport.is_closing():
            return False
        cycle = self.cycle
        if self._last_answer is not None:
            return True
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            cycle.keep_alive = False
        elif cycle is None or cycle.response_complete or not self._drop_last():
            self.transport.close()
        return True

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def shutdown(self) -> None:
        """Close the connection after the next answer, or after DRAIN seconds without a request."""
        self._client["stopping"] = True
        if not self.idle:
            super().shutdown()
            return
        state = self.server_state
        if _CLOSE not in state.default_headers:
            state.default_headers = [*state.default_headers, _CLOSE]
        self.loop.call_later(DRAIN, super().shutdown)

    def cut_off(self) -> None:
        """Answer 503 to a request whose body is incomplete. Its application gets what has arrived, then a disconnect.

        Reset the connection if its client does not read.
        """
        cycle = self.cycle
        if self.flow.write_paused:
            self.transport.abort()
        elif cycle is not None and cycle.more_body and not cycle.response_complete:
            self._refuse(_STOPPING, self.url, b"")

    def pause_writing(self) -> None:
        """Stop sending to a client that does not read; reset the connection after SLOW seconds."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(SLOW, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _check_timeouts(self) -> None:
        """Close a connection that has been idle for too long, or whose request has been incomplete for too long.

        One timer that checks now and then costs less than a timer that each request sets again.
        """
        if self.transport.is_closing():
            return
        cycle, after = self.cycle, SLOW
        if cycle is not None and not cycle.response_complete:
            slow: object = cycle if cycle.more_body else None
        elif self._in_head():
            slow = self.scope
        else:
            slow, after = None, self._idle_since + self.timeout_keep_alive - self.loop.time()
        if after <= 0 or (slow is not None and slow is self._incomplete):
            self.transport.close()
            return
        self._incomplete = slow
        self._timeout = self.loop.call_later(after, self._check_timeouts)

    # Data from the client

    def data_received(self, data: bytes) -> None:
        """Feed the parser. Nearly always the data is one whole request, which goes the short way."""
        self._received_at = self.loop.time()
        size = len(data)
        end = data.find(_BLANK_LINE) + len(_BLANK_LINE)
        if (
            size > _PIECE
            or end < len(_BLANK_LINE)
            or data[0] <= _BLANK
            or self._body_left
            or self._unread
            or self._head_limit.size
            or (end < size and self._chunked)
        ):
            self._unread += data
            self._feed_unread()
            return
        self._line = data
        if end == size:
            self._feed(data)
            return
        self._feed(data[:end])
        if self._body_left == size - end and not self.pipeline:
            self._feed(data[end:])
        else:
            self._unread = data[end:]
            self._feed_unread()

    def _feed_unread(self) -> None:
        """Feed the unread data in pieces, until a request waits for an earlier one to be answered."""
        data, start = self._unread, 0
        while start < len(data) and not self.pipeline:
            end = min(start + min(_PIECE, self._head_limit.left), self._end_of_part(data, start))
            piece = data[start:end]
            if not self._head_limit.size:
                self._line = piece.lstrip(b"\r\n")
            elif self._in_head() and b"\n" not in self._line:
                self._line += piece
            self._feed(piece)
            start = end
        self._unread = data[start:]
        if self._unread and not self.transport.is_closing():
            self.flow.hold()

    def _in_head(self) -> bool:
        """Return whether the head of a request has begun and not ended."""
        return self.scope is not None and "method" not in self.scope

    def _end_of_part(self, data: bytes, start: int) -> int:
        """Return where the head, the body or the line of a chunk that goes on at `start` ends, at the latest.

        No piece has the end of one and the beginning of another, so that each is counted by itself.
        """
        if self._refused:
            return len(data)
        if self._body_left:
            return start + self._body_left
        if self._head_limit.size or (self._chunked and self.cycle is not None and self.cycle.more_body):
            end, length = data.find(b"\n", start, start + _PIECE), 1
        else:
            end, length = data.find(_BLANK_LINE, start, start + _PIECE), len(_BLANK_LINE)
        return len(data) if end < 0 else end + length

    def _feed(self, data: bytes) -> None:
        """Feed the parser. It stops at an Upgrade, which this server ignores: the request is framed like all others."""
        rest = data
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    break
                except HttpParserUpgrade as upgrade:
                    self._ignore_upgrade()
                    rest = rest[upgrade.args[0] :]
        except (HttpParserError, _BadHead, MemoryError) as error:
            # an error of a callback is the context of the parser's own error
            no_memory = isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError)
            in_body = self.cycle is not None and self.cycle.more_body and not self._in_head()
            target = self.url if in_body else _target(self._line)
            self._refuse(_OUT_OF_MEMORY if no_memory else _BAD_REQUEST, target, data)
            return
        if self._in_head():
            if self._head_limit.exceeded(self.scope, data):
                self._refuse(_HEAD_TOO_LARGE, self.url, data)
        elif self._between_chunks:
            if self._line_ended:
                self._line_ended = False
                self._head_limit.reset()
            elif self._head_limit.add(data):
                self._refuse(_HEAD_TOO_LARGE, self.url, data)
        elif self._head_limit.size:
            self._head_limit.reset()

    def _ignore_upgrade(self) -> None:
        """Feed the head again without its Upgrade, so that the body is framed by length or chunks (RFC 9110 7.8).

        The parser assumes that a request with an Upgrade has no body, and the same for CONNECT. Raises _BadHead for
        CONNECT: its content has no defined meaning (RFC 9110 9.3.6), and not every proxy frames it in the same way.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise _BadHead
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(lines)))

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = self._malformed = self._has_body = self._chunked = self._upgrades = False
        self._body_left = 0
        self._host = None
        self.headers = []
        self.scope = {  # type: ignore[typeddict-item]
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]
            "root_path": self.root_path,
            "headers": self.headers,
            "state": self.app_state.copy(),
            "extensions": self._extensions,  # type: ignore[typeddict-item]
        }

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in _FRAMING_HEADERS:
            if name == b"host":
                if self._host is not None:
                    self._malformed = True
                self._host = value
            elif name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            elif name == b"content-length":
                self._has_body = True
                self._body_left = int(value)
            elif value.strip().lower() != b"chunked":
                self._malformed = True  # no other transfer coding is supported
            else:
                self._has_body = self._chunked = self._between_chunks = self._line_ended = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Start to answer, or queue the request behind earlier ones. Raises _BadHead."""
        parser, host = self.parser, self._host
        method = parser.get_method()
        if parser.should_upgrade():
            self._upgrades = True
            return
        version = parser.get_http_version()
        if host != self._valid_host or host is None:
            self._check_host(version)
        if self._malformed or not self._line.startswith(b" HTTP/", len(method) + 1 + len(self.url)):
            raise _BadHead  # the parser accepts other protocols, and several blanks
        scope = self.scope
        if version != "1.1":
            if version != "1.0" or self._chunked:  # RFC 9112 6.1: chunks in HTTP/1.0 are ambiguous
                raise _BadHead
            scope["http_version"], self.expect_100_continue = version, False
        url = httptools.parse_url(self.url)
        raw_path = url.path or b"/"
        if self.url[0] != _SLASH or _HASH in self.url:
            _check_target(self.url, url)
        path = raw_path.decode("ascii")
        if "%" in path:
            path = urlencoding.unquote(raw_path).decode(errors="replace")
        scope["method"] = method.decode("ascii")
        scope["path"] = self.root_path + path
        scope["raw_path"] = self.root_path.encode("ascii") + raw_path
        scope["query_string"] = url.query or b""
        waits = self.cycle is not None and not self.cycle.response_complete
        kind = _CycleOfHTTP10 if version == "1.0" else _CycleWithBody if self._has_body else _Cycle
        self.cycle = kind(
            scope=scope,
            transport=cast(asyncio.Transport, self.transport),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        if waits:
            self.flow.hold()
            self.transport.lingers = True  # a client that sends ahead may do so after the last request
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    def _check_host(self, version: str) -> None:
        """Check a Host that this connection has not sent before (RFC 9112 3.2). Raises _BadHead."""
        if self._host is None:
            if version != "1.0":
                raise _BadHead
        elif _HOST.fullmatch(self._host.strip()) is None:
            raise _BadHead
        else:
            self._valid_host = self._host

    def on_body(self, body: bytes) -> None:
        if self._chunked:
            self._between_chunks = False
            self._head_limit.size = 0
        else:
            self._body_left -= len(body)
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_chunk_header(self) -> None:
        """Drop trailers: fields after the last chunk are not headers (RFC 9112 section 7.1.2)."""
        self.headers = deque(maxlen=0)  # type: ignore[assignment]
        self._line_ended = True

    def on_chunk_complete(self) -> None:
        """End a chunk. After the last one, the parser has also applied a `Connection: close` among the trailers."""
        self._between_chunks = self._line_ended = True
        if not self.parser.should_keep_alive():
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self._upgrades:  # it starts again, see _ignore_upgrade
            return
        self._between_chunks = False
        cycle = self.cycle
        cycle.more_body = False
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.parser = _Discard(self.transport)  # type: ignore[assignment]

    # Answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Answer in the next iteration of the event loop: at once, if the application can, or else in a task."""
        found = self._at_once.get(cycle.scope["path"])
        if found is not None and type(cycle) is _Cycle and cycle.scope["method"] == "GET":
            cycle.scope["route"], at_once = found  # type: ignore[typeddict-unknown-key]
            try:
                answer = at_once(cycle.scope)
            except Exception:  # the application will meet it again, and report it
                answer = None
            if answer is not None:
                self.loop.call_soon(self._answer_at_once, answer, cycle, app)
                return
        super()._start_asgi_task(cycle, app)

    def _answer_at_once(self, answer: AnswerAtOnce, cycle: _Cycle, app: ASGI3Application) -> None:
        if not cycle.answer_at_once(answer):
            super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Start the next request, or wait for one."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._idle_since = self.loop.time()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._last_answer is not None:
            self.flow.release()
            self._last_answer()
            return
        if self.pipeline or self._eof:
            return
        if self.flow.read_paused:
            self._received_at = self._idle_since  # while reading was paused, an end of the client's side went unnoticed
            self.flow.release()
            if self._unread:
                self._feed_unread()

    def _refuse(self, refusal: _Refusal, target: bytes, data: bytes) -> None:
        """Read no more requests, and send a refusal if the client waits for the answer to this request."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = self.transport.lingers = True
        self.parser = _Discard(self.transport)  # type: ignore[assignment]
        headers, cycle = self.headers, self.cycle
        self._is_head = self._line.lstrip(b"\r\n").startswith(b"HEAD ")
        if cycle is not None and cycle.more_body:  # the request is refused in the middle of its body
            headers = cycle.scope["headers"]  # type: ignore[assignment]
            self._is_head = cycle.scope["method"] == "HEAD"
            waits = self._drop_last()
            if not waits and cycle.response_started:
                self.transport.close()
                return
        else:
            waits = cycle is not None and not cycle.response_complete
        answer = partial(self._send_refusal, refusal, target, headers, self._unread or data)
        if waits:  # earlier requests are answered first
            self._last_answer = answer
        else:
            answer()

    def _send_refusal(self, refusal: _Refusal, target: bytes, headers: Headers, data: bytes) -> None:
        """Answer the last request of this connection with a refusal."""
        head_continues = refusal is _HEAD_TOO_LARGE
        if refusal not in {_OUT_OF_MEMORY, _STOPPING} and _path(target) in self._rules.fail_closed_paths:
            refusal = _UNAUTHORIZED
        origin = next((value for name, value in headers or () if name == b"origin"), None)
        match = _ORIGIN.search(data)
        if origin is None and match is not None:
            origin = match[1]
        if origin is None and head_continues and self._rules.cors_origins:
            answer = partial(self._answer, refusal)
            self.parser = _FindOrigin(self.transport, data, answer)  # type: ignore[assignment]
            self.loop.call_later(_ORIGIN_TIMEOUT, answer, None)
        else:
            self._answer(refusal, origin)

    def _answer(self, refusal: _Refusal, origin: bytes | None) -> None:
        """Send a refusal, which pages of the allowed origins may read, and close."""
        if not self.transport.is_closing():
            head, body = refusal
            if origin is not None and origin.decode("latin-1") in self._rules.cors_origins:
                head += b"access-control-allow-origin: %b\r\nvary: Origin\r\n" % origin
            self.transport.write(head + (b"\r\n" if self._is_head else body))
            self.transport.close()

    def _drop_last(self) -> bool:
        """Do not answer the last request, whose body never ends. Return whether it waits for earlier ones.

        Then the connection is closed when they have been answered.
        """
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        if not self.pipeline:
            return False
        self.pipeline.popleft()
        self._last_answer = self.transport.close
        return True


class _Discard:
    """Replaces the parser of a connection that accepts no more requests: discards data, up to a limit."""

    def __init__(self, transport: LingeringTransport) -> None:
        self._transport = transport
        self._left = MAX_DISCARDED

    def feed_data(self, data: bytes) -> None:
        self._transport.lingers = True
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()


class _FindOrigin(_Discard):
    """Finds the Origin in the rest of a head that is too large to be kept."""

    def __init__(self, transport: LingeringTransport, data: bytes, answer: Callable[[bytes | None], None]) -> None:
        super().__init__(transport)
        self._tail = data[-_MAX_ORIGIN:]
        self._answer = answer

    def feed_data(self, data: bytes) -> None:
        super().feed_data(data)
        text = self._tail + data
        match = _ORIGIN.search(text)
        if match is not None or _BLANK_LINE in text:
            self._answer(None if match is None else match[1])
        self._tail = text[-_MAX_ORIGIN:]


def _check_target(target: bytes, url: URL) -> None:
    """Check a target that is not just a path and a query (RFC 9112 3.2). Raises _BadHead."""
    if target == b"*":
        return
    scheme = (url.schema or b"").lower()
    if _HASH in target or scheme not in {b"http", b"https"} or not url.host or _USER.match(target) is not None:
        raise _BadHead


def _target(head: bytes) -> bytes:
    """Return the target of a head that was refused, up to its query; empty if the mistake comes before its end.

    It depends only on the bytes up to the mistake: `head` may have more, if they came with the same read.
    """
    found = _TARGET.match(head.lstrip(b"\r\n"))
    if found is None:
        return b""
    try:
        httptools.HttpRequestParser(object()).feed_data(found[0])  # without callbacks
    except HttpParserError:
        return b""
    return found[1]


def _path(target: bytes) -> str:
    """Return the decoded path of a request target, or an empty string if it has none."""
    try:
        return unquote(urlsplit(target.decode("latin-1")).path)
    except ValueError:
        return ""
