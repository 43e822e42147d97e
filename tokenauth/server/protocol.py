"""The HTTP protocol of uvicorn, made strict about where a request ends, and bounded in all that a connection may hold.

httptools (llhttp) refuses most of what RFC 9112 calls ambiguous; what it leaves open is decided here. What cannot be
framed for certain is refused, and the connection closed: nothing that follows is read as a request.
"""

import asyncio
import re
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import cast
from urllib.parse import unquote, urlsplit

import httptools
from httptools import HttpParserError, HttpParserUpgrade
from uvicorn._types import ASGISendEvent, HTTPScope
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tokenauth.server.transport import OnePiece
from tokenauth.web import percent
from tokenauth.web.asgi_extensions import CLIENT, REFUSAL_RULES, RefusalRules

MAX_HEAD = 16 * 1024
"""Bytes of a request line and its headers, and of what is between chunks or after a body; more are answered 431."""

DRAIN = 1.0
"""Seconds that an idle connection stays open at shutdown: a request may be on its way."""

HALF_CLOSE = 0.1
"""Seconds after its last byte within which a client that ends its side is taken to wait for the answer (`nc -N`)."""

SLOW = 60.0
"""Seconds that a client has for a head, for a body, and for reading what waits to be sent; up to twice that."""

_PIECE = 1024
"""Bytes that the parser is fed at a time, so that few requests wait behind the one that is being answered."""

_MAX_IGNORED = 8 * 1024 * 1024
"""Bytes that are read and dropped after a refusal, so that the answer is not lost to a reset."""

_SEARCH = 1.0
"""Seconds that a head which is too long is searched for its Origin before it is refused."""

_MAX_ORIGIN = 512
"""Bytes of a line that names an Origin; a host name has 253 at the most."""

_LOOKED_AT = frozenset({b"host", b"expect", b"content-length", b"transfer-encoding"})
_CLOSE = (b"connection", b"close")


class _Refused(Exception):
    """A head that the parser accepts and this server does not."""


ALWAYS = b"x-content-type-options: nosniff\r\nreferrer-policy: no-referrer\r\n"
"""Headers of every answer: browsers take it for what it says it is, and tell no other site the address it came from."""


def _last_words(status: str, why: str) -> tuple[bytes, bytes]:
    head = f"HTTP/1.1 {status}\r\n{ALWAYS.decode()}connection: close\r\ncache-control: no-store\r\n"
    about = f"content-type: text/plain; charset=utf-8\r\ncontent-length: {len(why)}\r\n"
    return f"{head}{about}".encode(), f"\r\n{why}".encode()


_TOO_LARGE = _last_words("431 Request Header Fields Too Large", "The request headers are larger than 16 KiB.")
_BROKEN = _last_words("400 Bad Request", "Invalid HTTP request received.")
_SHORT = _last_words("503 Service Unavailable\r\nretry-after: 1", "The server is short of memory. Try again shortly.")
_UNAUTHORIZED = _last_words(
    '401 Unauthorized\r\nwww-authenticate: Bearer realm="tokenauth"', "The request headers are too large or broken."
)

_ORIGIN = re.compile(rb"(?:^|\n)origin:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)
_HOST = re.compile(rb"(?:[\w.~!$&'()*+,;=%-]*|\[[0-9A-Fa-fv:.]+\])(?::\d*)?", re.ASCII)


class _Flow(FlowControl):
    """uvicorn's flow control, whose reading can be held until requests have been answered, whoever wants to go on."""

    held = False

    def hold(self) -> None:
        """Read nothing until release()."""
        self.held = True
        self.pause_reading()

    def release(self) -> None:
        """Go on reading."""
        self.held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        """Go on reading, unless it is held."""
        if not self.held:
            super().resume_reading()


_send = FunctionType(
    RequestResponseCycle.send.__code__,
    {**vars(httptools_impl), "STATUS_LINE": {status: line + ALWAYS for status, line in STATUS_LINE.items()}},
)
"""uvicorn's `send` with ALWAYS behind each status line: as headers, each answer would take 1 microsecond more."""


async def _send_500_response(cycle: RequestResponseCycle) -> None:
    """Answer for an app that could not even refuse: 503 if it had no memory for that."""
    if not isinstance(sys.exception(), MemoryError):
        await RequestResponseCycle.send_500_response(cycle)
        return
    headers = [(b"retry-after", b"1"), (b"content-length", b"0"), _CLOSE]
    await cycle.send({"type": "http.response.start", "status": 503, "headers": headers})
    await cycle.send({"type": "http.response.body", "body": b"", "more_body": False})


class _Cycle(RequestResponseCycle):
    """A request without a body, and its answer."""

    send = _send
    send_500_response = _send_500_response


class _CycleWithBody(RequestResponseCycle):
    """A request with a body, and its answer. If that is given before the body has come, the connection closes."""

    transport: OnePiece  # type: ignore[assignment]
    send_500_response = _send_500_response

    async def send(self, message: ASGISendEvent) -> None:
        """Send a part of the answer."""
        if self.more_body:
            self.keep_alive = False
            self.transport.lingers = True
        await _send(self, message)


class BoundedProtocol(HttpToolsProtocol):
    """Answers each request once and in turn, loses none at shutdown, and holds little for a connection.

    Per connection: a head of MAX_HEAD, a body of some 64 KiB that nobody has read yet, one read of the socket that
    waits behind requests (256 KiB), the requests of one _PIECE, and 128 KiB of answers that the client does not read.
    """

    transport: OnePiece  # type: ignore[assignment]
    flow: _Flow
    url = b""
    _rules = RefusalRules()
    _begun: HTTPScope | None = None
    _unfinished = 0
    _between_chunks = False
    _ended = False
    _upgrades = False
    _faulty = False
    _has_body = False
    _chunked = False
    _refused = False
    _host: bytes | None = None
    _known_host = b""
    _rest = b""
    _heard_at = 0.0
    _idle_since = 0.0
    _late: object = None
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        wrapped = OnePiece(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, wrapped))
        self.flow = _Flow(cast(asyncio.Transport, wrapped))
        self._rules = self.app_state.get(REFUSAL_RULES, RefusalRules())
        self._client = {"gone": False}
        self._extensions = {CLIENT: self._client}
        self._idle_since = self.loop.time()
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._look_at_idleness)

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._client["gone"] = True
        self.pipeline.clear()
        self._rest = b""
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """End the client's side; the connection closes when what was received whole has been answered."""
        self._ended = self.flow.held = True
        if self.loop.time() - self._heard_at > HALF_CLOSE:
            self._client["gone"] = True
        if self.transport.is_closing():
            return False
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            cycle.keep_alive = False
        elif self.pipeline:
            self._drop_last()
        else:
            self.transport.close()
        return True

    def shutdown(self) -> None:
        """Close the connection after the next answer, or when none is asked for."""
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
            return
        state = self.server_state
        if _CLOSE not in state.default_headers:
            state.default_headers = [*state.default_headers, _CLOSE]
        self.loop.call_later(DRAIN, super().shutdown)

    def pause_writing(self) -> None:
        """Stop answering a client that does not read, and close the connection if that lasts."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(SLOW, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on answering."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _look_at_idleness(self) -> None:
        """Close a connection that has been idle, or whose request does not come to its end.

        One timer that looks now and then costs each request less than one that is set again by each.
        """
        if self.transport.is_closing():
            return
        cycle, after = self.cycle, SLOW
        if cycle is not None and not cycle.response_complete:
            slow: object = cycle if cycle.more_body else None
        elif self.scope is not None and "method" not in self.scope:
            slow = self.scope
        else:
            slow, after = None, self._idle_since + self.timeout_keep_alive - self.loop.time()
        if after <= 0 or (slow is not None and slow is self._late):
            self.transport.close()
            return
        self._late = slow
        self._timer = self.loop.call_later(after, self._look_at_idleness)

    # What the client sends

    def data_received(self, data: bytes) -> None:
        """Take what has arrived. Nearly always that is a whole request, for which this costs a look."""
        self._heard_at = self.loop.time()
        if len(data) > _PIECE or self._rest:
            self._rest += data
            self._feed_rest()
        else:
            self._feed(data)

    def _feed_rest(self) -> None:
        """Feed what has arrived in pieces, until a request waits for others to be answered."""
        data, start = self._rest, 0
        while start < len(data) and not self.pipeline:
            self._feed(data[start : start + _PIECE])
            start += _PIECE
        self._rest = data[start:]
        if self._rest and not self.transport.is_closing():
            self.flow.hold()

    def _feed(self, data: bytes) -> None:
        """Feed the parser. It takes what follows an upgrade for another protocol: here it is framed like all others."""
        rest = data
        try:
            while True:
                try:
                    self.parser.feed_data(rest)
                    break
                except HttpParserUpgrade as upgrade:
                    self._ignore_upgrade()
                    rest = rest[upgrade.args[0] :]
        except (HttpParserError, _Refused, MemoryError) as error:
            # what a callback raises is the context of the parser's own error
            short = isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError)
            target = self.url or data.partition(b" ")[2].partition(b" ")[0]
            self._refuse(_SHORT if short else _BROKEN, target, data)
            return
        if self._between_chunks or (self.scope is not None and "method" not in self.scope):
            if self.scope is not self._begun:  # what came before it was whole
                self._begun, self._unfinished = self.scope, -data.rfind(b"\r\n\r\n")
            self._unfinished += len(data)
            if self._unfinished > MAX_HEAD:
                self._refuse(_TOO_LARGE, self.url, data)
        elif self._unfinished:
            self._begun, self._unfinished = None, 0

    def _ignore_upgrade(self) -> None:
        """Feed the head again without its Upgrade, so that the body is framed by length or chunks (RFC 9110 7.8).

        The parser gives a request with an Upgrade no body, and CONNECT none either. Raises _Refused for CONNECT, which
        has none by its definition (RFC 9110 9.3.6), though not all who pass it on know that.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise _Refused
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(lines)))

    # What the parser finds

    def on_message_begin(self) -> None:
        """Begin a request."""
        self.url = b""
        self.expect_100_continue = self._faulty = self._has_body = self._chunked = self._upgrades = False
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
        """Take one header."""
        name = name.lower()
        if name in _LOOKED_AT:
            if name == b"host":
                if self._host is not None:
                    self._faulty = True
                self._host = value
            elif name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            elif name == b"content-length":
                self._has_body = True
            elif value.strip().lower() != b"chunked":
                self._faulty = True  # what is under another coding, nobody here can read
            else:
                self._has_body = self._chunked = self._between_chunks = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin to answer, or let the request wait for its turn. Raises _Refused."""
        parser, host = self.parser, self._host
        if parser.should_upgrade():
            self._upgrades = True
            return
        version = parser.get_http_version()
        if host != self._known_host or host is None:
            self._judge_host(version)
        if self._faulty:
            raise _Refused
        scope = self.scope
        if version != "1.1":
            if version != "1.0" or self._chunked:  # RFC 9112 6.1: no HTTP/1.0 is framed by chunks
                raise _Refused
            scope["http_version"], self.expect_100_continue = version, False
        url = httptools.parse_url(self.url)
        raw_path = url.path or b"/"
        path = raw_path.decode("ascii")
        if "%" in path:
            path = percent.decode(raw_path).decode(errors="replace")
        scope["method"] = parser.get_method().decode("ascii")
        scope["path"] = self.root_path + path
        scope["raw_path"] = self.root_path.encode("ascii") + raw_path
        scope["query_string"] = url.query or b""
        waits = self.cycle is not None and not self.cycle.response_complete
        self.cycle = (_CycleWithBody if self._has_body else _Cycle)(
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
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    def _judge_host(self, version: str) -> None:
        """Look at a Host that this connection has not sent before (RFC 9112 3.2). Raises _Refused."""
        if self._host is None:
            if version != "1.0":
                raise _Refused
        elif _HOST.fullmatch(self._host.strip()) is None:
            raise _Refused
        else:
            self._known_host = self._host

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._between_chunks = False
        self._unfinished = 0
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_chunk_header(self) -> None:
        """Take no more headers of this request: what follows the last chunk (RFC 9112 section 7.1.2) is none."""
        self.headers = deque(maxlen=0)  # type: ignore[assignment]

    def on_chunk_complete(self) -> None:
        """End a chunk; the last one, after what follows it, where the parser, too, looks for `Connection: close`."""
        self._between_chunks = True
        if not self.parser.should_keep_alive():
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """End a request."""
        if self._upgrades:  # it begins again, see _ignore_upgrade
            return
        self._between_chunks = False
        cycle = self.cycle
        cycle.more_body = False
        cycle.message_event.set()

    # What is answered

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for it."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self.parser = _Deaf(self.transport)  # type: ignore[assignment]
            return
        self._idle_since = self.loop.time()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        if self.pipeline or self._ended:
            return
        if self.flow.read_paused:
            self._heard_at = self._idle_since  # only now it can be heard whether the client has ended its side
            self.flow.release()
            if self._rest:
                self._feed_rest()

    def _refuse(self, words: tuple[bytes, bytes], target: bytes, data: bytes) -> None:
        """Read no more requests, and say why to the client if it waits for an answer to what is refused."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = self.transport.lingers = True
        self.parser = _Deaf(self.transport)  # type: ignore[assignment]
        headers, cycle = self.headers, self.cycle
        if cycle is not None and cycle.more_body:  # it is refused in the middle of its body
            headers = cycle.scope["headers"]  # type: ignore[assignment]
            self._drop_last()
            if self.pipeline:  # others are answered first
                return
            if cycle.response_started:
                self.transport.close()
                return
        elif cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False  # it is the next request that is refused; this one is answered first
            return
        goes_on = words is _TOO_LARGE
        if (
            words is not _SHORT and _path(target) in self._rules.fail_closed_paths
        ):  # 401 would say that a token is invalid
            words = _UNAUTHORIZED
        origin = next((value for name, value in headers or () if name == b"origin"), None)
        match = _ORIGIN.search(self._rest or data)
        if origin is None and match is not None:
            origin = match[1]
        if origin is None and goes_on and self._rules.cors_origins:
            answer = partial(self._answer, words)
            self.parser = _Search(self.transport, data, answer)  # type: ignore[assignment]
            self.loop.call_later(_SEARCH, answer, None)
        else:
            self._answer(words, origin)

    def _answer(self, words: tuple[bytes, bytes], origin: bytes | None) -> None:
        """Send a refusal, which a page of a listed origin may read, and close."""
        if not self.transport.is_closing():
            head, body = words
            if origin is not None and origin.decode("latin-1") in self._rules.cors_origins:
                head += b"access-control-allow-origin: %b\r\nvary: Origin\r\n" % origin
            self.transport.write(head + body)
            self.transport.close()

    def _drop_last(self) -> None:
        """Answer the last request no more, since its body does not come to an end; close when it is its turn."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        if self.pipeline:
            self.pipeline[0] = self.cycle, self._hang_up

    async def _hang_up(self, *_: object) -> None:
        """Close the connection in its turn: an ASGI app."""
        self.transport.close()


class _Deaf:
    """Stands in for the parser of a connection that takes no more requests: drops what comes, within a bound."""

    def __init__(self, transport: OnePiece) -> None:
        self._transport = transport
        self._left = _MAX_IGNORED

    def feed_data(self, data: bytes) -> None:
        """Take nothing more."""
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()


class _Search(_Deaf):
    """Looks for the Origin of a head that is too long to be kept."""

    def __init__(self, transport: OnePiece, data: bytes, answer: Callable[[bytes | None], None]) -> None:
        super().__init__(transport)
        self._tail = data[-_MAX_ORIGIN:]
        self._answer = answer

    def feed_data(self, data: bytes) -> None:
        """Look at what comes until the head ends."""
        super().feed_data(data)
        text = self._tail + data
        match = _ORIGIN.search(text)
        if match is not None or b"\r\n\r\n" in text:
            self._answer(None if match is None else match[1])
        self._tail = text[-_MAX_ORIGIN:]


def _path(target: bytes) -> str:
    """Return the decoded path of a request target, as far as there is one."""
    try:
        return unquote(urlsplit(target.decode("latin-1")).path)
    except ValueError:
        return ""
