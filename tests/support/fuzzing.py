"""Streams of requests by a grammar, which are cut, merged and re-framed, sent to a real server over a socket.

Each target has an answer of its own, so an answer shows to which request it belongs. What the requests of a stream are,
says the parser of `framing.py`; h11 is a second opinion on that.
"""

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import h11
from hypothesis import strategies as st

from tests.support import framing
from tests.support.connections import TIMEOUT
from tests.support.framing import Reading, Stream

TARGETS = [
    *(b"/healthz", b"/readyz", b"/api/token?token=x", b"/api/me", b"/docs"),
    *(b"/tokenauth.d.ts", b"/tokenauth.js", b"/openapi.json"),
]
REFUSALS = {400, 431}


def _request(target: bytes, head: bytes, content: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\n%b\r\n%b" % (target, head, content)


_targets = st.sampled_from(TARGETS)
_plain = st.builds(lambda target: _request(target, b"Host: x\r\n", b""), _targets)
_bodies = st.one_of(
    st.lists(_plain, min_size=1, max_size=3).map(b"".join),
    _plain.map(lambda inner: b"0\r\n\r\n" + inner),
    _plain.map(lambda inner: b"\r\n" + inner),
    st.sampled_from([b"", b"abc", b"x" * 3000, b"7\r\nabc\r\n0\r\n\r\n"]),
    st.binary(max_size=30),
)


def _often(usual: Sequence[bytes], odd: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Choose something usual nine times in ten."""
    return st.integers(0, 9).flatmap(lambda chance: st.sampled_from(usual if chance else odd))


@st.composite
def _chunked(draw: st.DrawFn, body: bytes) -> bytes:
    found = b""
    while body:
        size = draw(st.integers(1, len(body)))
        found += draw(_often(framing._SIZES, framing._ODD_SIZES)) % size + body[:size] + b"\r\n"
        body = body[size:]
    return found + draw(_often(framing._ENDS, framing._ODD_ENDS))


@st.composite
def _framed(draw: st.DrawFn) -> bytes:
    """Make a request with a body in some framing, which may be wrong."""
    body = draw(_bodies)
    kind = draw(st.sampled_from(["none"] * 3 + ["length"] * 4 + ["chunks"] * 4 + ["wrong", "both", "coding", "twice"]))
    fields = [draw(_often([b"Host: x\r\n"], framing._ODD_HOSTS))]
    fields += draw(st.lists(_often(framing._OTHERS, framing._ODD_OTHERS), max_size=2))
    content = body
    if kind == "none":
        content = b""
    elif kind == "length":
        form = draw(_often([b"%d"], framing._LENGTHS))
        fields.append(b"Content-Length: %b\r\n" % (form % ((len(body),) * form.count(b"%"))))
    elif kind in {"wrong", "twice"}:
        lengths = draw(st.lists(st.integers(0, len(body) + 40), min_size=1, max_size=2 if kind == "twice" else 1))
        fields += [b"Content-Length: %d\r\n" % length for length in lengths]
    else:
        coding = draw(st.sampled_from(framing._CODINGS)) if kind == "coding" else b"chunked"
        fields.append(b"Transfer-Encoding: %b\r\n" % coding)
        content = draw(_chunked(body))
        if kind == "both":
            fields.append(b"Content-Length: %d\r\n" % draw(st.sampled_from([0, len(content), len(body)])))
    method = draw(_often([b"GET"], [b"POST", b"HEAD", b"OPTIONS", b"PUT"]))
    version = draw(_often([b"1.1"], [b"1.0", b"1.2"]))
    head = b"".join(draw(st.permutations(fields)))
    request = _request(draw(_targets), head, content)
    return request.replace(b"GET ", method + b" ", 1).replace(b"HTTP/1.1", b"HTTP/" + version, 1)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Make the segments of a stream: requests whose parts may be left out, repeated, swapped or replaced by noise."""
    data = b"".join(draw(st.lists(_framed(), min_size=1, max_size=4)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        start, length = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 0, 1, 2, 10, 40]))
        part, rest = data[start : start + length], data[start + length :]
        match draw(st.sampled_from(["leave out", "repeat", "swap", "noise"])):
            case "leave out":
                part = b""
            case "repeat":
                part += part
            case "swap":
                part, rest = rest[:length], part + rest[length:]
            case _:
                part = draw(st.sampled_from(framing._NOISE))
        data = data[:start] + part + rest
    ends = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True) if a < b]


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    closes: bool = field(default=False, compare=False)
    """Whether it says that the connection is closed after it."""


def exchange(port: int, segments: Sequence[bytes], requests: Sequence[Reading]) -> list[Answer]:
    """Send a stream, end this side, and read all answers.

    What arrives after the server has closed the connection resets it, and the last answer can be lost. Then the stream
    is sent again, all at once: a client that sends ahead always gets it.
    """
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received, closed = b"", False
        try:
            for segment in segments:
                connection.sendall(segment)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            closed = True
        try:
            while more := connection.recv(1 << 16):
                received += more
        except ConnectionResetError:
            closed = True
    if closed and len(segments) > 1:
        return exchange(port, [b"".join(segments)], requests)
    return list(_answers(received, [request.method for request in requests]))


def _answers(data: bytes, methods: Sequence[bytes]) -> Sequence[Answer]:
    found: list[Answer] = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, ("an incomplete head", head)
        status = int(head[9:12])
        if status < 200:
            continue
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        method = methods[len(found)] if len(found) < len(methods) else b""
        size = int(length[1]) if length and status != 204 else 0
        if status in REFUSALS and method in {b"HEAD", b""}:  # a refused request is not among the methods
            size = size if data and not data.startswith(b"HTTP/1.1 ") else 0
        elif method == b"HEAD":
            size = 0
        assert len(data) >= size, "an incomplete body"
        found.append(Answer(status, data[:size], b"\r\nconnection: close" in head.lower()))
        data = data[size:]
    return found


def fault(stream: Stream, answers: Sequence[Answer], expected: Mapping[bytes, Answer]) -> str | None:
    """Return what is wrong with the answers to a stream, or None."""
    complete = [request for request in stream.requests if request.body is not None]
    refused = bool(answers) and answers[-1].status in REFUSALS
    if len(answers) > len(stream.requests) + refused:  # an incomplete one may be answered, too
        return "more answers than requests"
    whole = stream.valid and len(complete) == len(stream.requests)
    if whole and len(answers) < len(complete) and not refused:
        # An answer that comes before the end of its request's body ends the connection, and says so.
        early = answers and answers[-1].closes and stream.framed[len(answers) - 1]
        if not early:
            return "a request is not answered"
    for number, (request, answer) in enumerate(zip(stream.requests, answers, strict=False)):
        if answer.status >= 500:
            return f"request {number}: {answer.status}"
        if refused and number == len(answers) - 1:
            continue
        if request.method == b"GET" and request.target in expected and answer != expected[request.target]:
            return f"request {number} got the answer {answer}"
        if request.method == b"HEAD" and answer.body:
            return f"request {number}: an answer to HEAD with a body"
    return None


def by_h11(data: bytes) -> list[Reading] | None:
    """Return the requests that h11 finds in a stream; None if it finds a fault."""
    connection, found = h11.Connection(h11.SERVER), list[Reading]()
    connection.receive_data(data)
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                found.append(Reading(event.method, event.target, b""))
            elif isinstance(event, h11.Data):
                found[-1] = found[-1]._replace(body=(found[-1].body or b"") + event.data)
            elif isinstance(event, h11.EndOfMessage):
                connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return found
                connection.start_next_cycle()
            else:
                return found
    except h11.ProtocolError:
        return None
