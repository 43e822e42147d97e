"""A small strict parser of HTTP/1.1 (RFC 9112), and a generator of byte streams on which parsers have disagreed.

The parser shares no code with the server and is simple instead of fast. It is more lenient than the RFC where that
cannot change the framing: several spaces in a request line, empty lines before it, and text in a chunk extension.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Reading(NamedTuple):
    """One request. The body is None if it is incomplete."""

    method: bytes
    target: bytes
    body: bytes | None


class Stream(NamedTuple):
    """The requests in a byte stream, and whether all of it could be parsed."""

    requests: list[Reading]
    valid: bool
    """False if the next request, or the rest of the last one, is malformed."""
    framed: list[bool]
    """Whether each request announces a body, which may be empty."""


class _Invalid(Exception):
    pass


class _Incomplete(Exception):
    pass


_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) +([!-~]+) +HTTP/1\.([01])" % _TOKEN)
_FIELD = re.compile(rb"(%b):[ \t]*((?:[!-~\x80-\xff](?:[ \t]*[!-~\x80-\xff])*)?)[ \t]*" % _TOKEN)
_METHODS = [b"GET", b"POST", b"OPTIONS", b"DELETE", b"PUT", b"HEAD"]
_TARGET = re.compile(rb"/[!-~]*|[a-zA-Z][a-zA-Z0-9+.-]*://[!-~]+|\*")
_HOST = re.compile(rb"(?:[0-9A-Za-z._~!$&'()*+,;=%-]*|\[[0-9A-Fa-fv:.]+\])(?::[0-9]*)?")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t -~\x80-\xff]*)?")
_LENGTH = re.compile(rb"[0-9]+")
_MAX_LENGTH = 2**64 - 1


def read(data: bytes) -> Stream:
    """Parse requests until one is incomplete, ends the connection, or has ambiguous framing."""
    requests: list[Reading] = []
    framed: list[bool] = []
    at = 0
    try:
        while True:
            while data[at : at + 1] in {b"\r", b"\n"}:
                at += 1
            if at == len(data):
                return Stream(requests, True, framed)
            line, at = _line(data, at)
            method, target, version = _request_line(line)
            fields, at = _fields(data, at)
            framing = _framing(fields, chunks=version == b"1")
            requests.append(Reading(method, target, None))
            framed.append(framing != 0)
            body, at, trailers = _chunks(data, at) if framing is None else (*_counted(data, at, framing), [])
            requests[-1] = Reading(method, target, body)
            if version == b"0" or _ends([*fields, *trailers]):
                return Stream(requests, True, framed)
    except _Invalid:
        return Stream(requests, False, framed)
    except _Incomplete:
        return Stream(requests, True, framed)


def _request_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None or _TARGET.fullmatch(match[2]) is None or match[1] not in _METHODS:
        raise _Invalid
    return match[1], match[2], match[3]


def _line(data: bytes, at: int) -> tuple[bytes, int]:
    """Return a line and the offset of the next one. A line ends with CRLF and has no other CR, LF or NUL."""
    end = data.find(b"\r\n", at)
    line = data[at : len(data) if end < 0 else end]
    if re.search(rb"[\r\n\0](?!\Z)|[\n\0]", line) or (end >= 0 and b"\r" in line):
        raise _Invalid
    if end < 0:
        raise _Incomplete
    return line, end + 2


def _fields(data: bytes, at: int) -> tuple[list[tuple[bytes, bytes]], int]:
    found: list[tuple[bytes, bytes]] = []
    while True:
        line, at = _line(data, at)
        if not line:
            return found, at
        match = _FIELD.fullmatch(line)
        if match is None:
            raise _Invalid
        found.append((match[1].lower(), match[2]))


def _framing(fields: Sequence[tuple[bytes, bytes]], chunks: bool) -> int | None:
    """Return the length of the body, or None if it is chunked."""
    hosts, lengths, codings = (
        [value for name, value in fields if name == wanted]
        for wanted in (b"host", b"content-length", b"transfer-encoding")
    )
    if len(hosts) > 1 or (chunks and not hosts) or not all(map(_HOST.fullmatch, hosts)):
        raise _Invalid
    if codings:
        if lengths or not chunks or [coding.lower() for coding in codings] != [b"chunked"]:
            raise _Invalid
        return None
    if len(lengths) > 1 or not all(map(_LENGTH.fullmatch, lengths)):
        raise _Invalid
    length = int(lengths[0]) if lengths else 0
    if length > _MAX_LENGTH:
        raise _Invalid
    return length


def _counted(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    if len(data) - at < length:
        raise _Incomplete
    return data[at : at + length], at + length


def _chunks(data: bytes, at: int) -> tuple[bytes, int, list[tuple[bytes, bytes]]]:
    body = b""
    while True:
        line, at = _line(data, at)
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise _Invalid
        size = int(match[1], 16)
        if size == 0:
            trailers, at = _fields(data, at)
            if {name for name, _ in trailers} & {b"content-length", b"transfer-encoding"}:
                raise _Invalid
            return body, at, trailers
        part, at = _counted(data, at, size)
        body += part
        if not b"\r\n".startswith(data[at : at + 2]):
            raise _Invalid
        _, at = _counted(data, at, 2)


def _ends(fields: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether the client announces that no request follows."""
    options = [value.lower() for name, value in fields if name in {b"connection", b"proxy-connection"}]
    return any(option.strip() == b"close" for value in options for option in value.split(b","))


# The generator

INNER = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"
"""A request inside bodies. It must not be answered unless the body ends before it."""

_TARGETS = [b"/a", b"/b?c=d", b"/auth", b"/%61", b"http://x/a"]
_ODD_TARGETS = [b"*", b"*/a", b"*?a", b"x:443", b"/a#b", b"x", b"http://x"]
_ODD_HOSTS = [b"", b"Host: x\r\nHost: x\r\n", b"Host: x\r\nhost: y\r\n", b"Host: a b\r\n", b"Host: x, y\r\n"]
_OTHERS = [
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQ\r\n",
    b"upgrade: TLS/1.2\r\nconnection: close, UPGRADE\r\n",
    b"Upgrade: websocket\r\n",
    b"Connection: upgrade\r\n",
    b"Expect: 100-continue\r\n",
    b"X-Empty:\r\n",
    b"X-Text: \xc3\xa4\r\n",
]
_ODD_OTHERS = [
    b"Content-Length : 3\r\n",
    b"X-Folded: a\r\n b\r\n",
    b"X-Text: a\x00b\r\n",
    b"X Text: a\r\n",
    b"X-Text: a\n",
]
_LENGTHS = [
    *(b"+%d", b"%d,%d", b"0x%x", b"-%d", b" %d ", b"00%d", b"%d 0", b"", b"%d\x0b", b"1%d", b"18446744073709551616%d"),
]
_CODINGS = [
    *(b"chunked", b"Chunked", b" chunked ", b"x, chunked", b"chunked, x", b"identity", b"chunked;q=1", b"xchunked"),
    *(b"", b",chunked", b"chunked,chunked", b"\x0bchunked", b"chunked\r\nTransfer-Encoding: chunked", b"gzip"),
]
_SIZES = [b"%x\r\n", b"%X;a=b\r\n", b'%x;a="b;c"\r\n', b"0%x\r\n"]
_ODD_SIZES = [b"0x%x\r\n", b"%x \r\n", b" %x\r\n", b"%x\n", b"%x;\na\r\n"]
_ENDS = [
    *(b"0\r\n\r\n", b"00\r\n\r\n", b"0\r\nX-Trailer: a\r\n\r\n"),
    *(b"0\r\nConnection: close\r\n\r\n", b"0\r\nHost: y\r\n\r\n"),
]
_ODD_ENDS = [b"0\n\n", b"0\r\n\n", b"0\r\nContent-Length: 9\r\n\r\n", b"0\r\n x\r\n\r\n", b"\r\n0\r\n\r\n"]
_BODIES = [b"", b"abc", INNER, b"\r\n" + INNER, b"0\r\n\r\n" + INNER, b"7\r\nabc\r\n0\r\n\r\n", INNER * 2, b"x" * 3000]
_NOISE = [
    *(b"\r", b"\n", b"\0", b" ", b"\t", b"\r\n", b":", b",", b"\x0b", b"\x7f", b"\xff", b"0"),
    *(b"Host: x\r\n", b"\r\n\r\n"),
]


def sequences(seed: int, odd: bool) -> Iterator[list[bytes]]:
    """Generate streams, each as a list of the segments in which it arrives. A seed always gives the same streams.

    Odd streams contain malformed parts and random changes, and may end anywhere.
    """
    source = random.Random(seed)
    while True:
        stream = b"".join(_request(source, odd) for _ in range(source.choice([1, 1, 2, 3, 4])))
        if odd:
            for _ in range(source.choice([0, 0, 0, 1, 2])):
                stream = _mutate(source, stream)
            if source.random() < 0.2:
                stream = stream[: source.randrange(len(stream) + 1)]
        yield _cut(source, stream)


def _request(source: random.Random, odd: bool) -> bytes:
    def choose(usual: Sequence[bytes], others: Sequence[bytes]) -> bytes:
        return source.choice(others if odd and source.random() < 0.06 else usual)

    content = body = source.choice(_BODIES)
    framing = source.choice(["none", "length", "length", "chunks", "chunks"])
    version = choose([b"1.1"] * 9 + ([] if framing == "chunks" else [b"1.0"]), [b"1.0", b"0.9", b"1.2", b"2.0"])
    if odd and source.random() < 0.1:
        framing = source.choice(["coding", "both", "wrong"])
    fields = [choose([b"Host: x\r\n"], _ODD_HOSTS)]
    fields += [choose([other], _ODD_OTHERS) for other in source.sample(_OTHERS, source.choice([0, 0, 1, 1, 2]))]
    if framing == "none":
        content = b""
    if framing == "length":
        form = choose([b"%d"], _LENGTHS)
        fields.append(b"Content-Length: %b\r\n" % (form % ((len(body),) * form.count(b"%"))))
    if framing == "wrong":
        fields.append(b"Content-Length: %d\r\n" % max(0, len(body) + source.choice([-3, -1, 1, 40])))
    if framing in {"coding", "both", "chunks"}:
        fields.append(b"Transfer-Encoding: %b\r\n" % (source.choice(_CODINGS) if framing == "coding" else b"chunked"))
        content = _chunked(source, body, odd)
    if framing == "both":
        fields.append(b"Content-Length: %d\r\n" % source.choice([0, len(content), len(body)]))
    source.shuffle(fields)
    method, target = choose(_METHODS, [b"CONNECT", b"get", b"BREW"]), choose(_TARGETS, _ODD_TARGETS)
    return b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, target, version, b"".join(fields), content)


def _chunked(source: random.Random, body: bytes, odd: bool) -> bytes:
    found = b""
    while body:
        part, body = body[: (size := source.randint(1, len(body)))], body[size:]
        sizes = _ODD_SIZES if odd and source.random() < 0.06 else _SIZES
        found += source.choice(sizes) % len(part) + part + b"\r\n"
    return found + source.choice(_ODD_ENDS if odd and source.random() < 0.06 else _ENDS)


def _mutate(source: random.Random, stream: bytes) -> bytes:
    at = source.randrange(len(stream) + 1)
    end = at + source.choice([0, 0, 1, 1, 2, 10])
    return stream[:at] + source.choice([b"", *_NOISE, stream[at : at + 20]]) + stream[end:]


def _cut(source: random.Random, stream: bytes) -> list[bytes]:
    if source.random() < 0.2 and len(stream) < 1000:
        return [stream[at : at + 1] for at in range(len(stream))]
    ends = sorted(source.randrange(len(stream) + 1) for _ in range(source.choice([0, 1, 1, 2, 5])))
    return [stream[start:end] for start, end in zip([0, *ends], [*ends, len(stream)], strict=True) if start < end]
