"""Encodes valid and invalid HTTP/2 requests (RFC 9113), with prior knowledge and without compression."""

import struct
from collections.abc import Sequence

Fields = Sequence[tuple[bytes, bytes]]

_HEADERS, _DATA, _SETTINGS = 1, 0, 4
_END_STREAM, _END_HEADERS = 1, 4


def request(fields: Fields, body: bytes = b"", trailers: Fields = (), end: bool = True) -> bytes:
    """Encode the preface of a connection and one request. With `end=False` the body is incomplete."""
    last = _END_STREAM if end else 0
    frames = [_frame(_HEADERS, _END_HEADERS | (0 if body or trailers else last), _pack(fields))]
    if body:
        frames.append(_frame(_DATA, 0 if trailers else last, body))
    if trailers:
        frames.append(_frame(_HEADERS, _END_HEADERS | last, _pack(trailers)))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, b"", stream=0) + b"".join(frames)


def _frame(kind: int, flags: int, payload: bytes, stream: int = 1) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _pack(fields: Fields) -> bytes:
    """Encode fields as literals without indexing (RFC 7541 section 6.2.2)."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)


def _string(text: bytes) -> bytes:
    length, written = len(text), bytearray()
    if length < 127:
        return bytes([length]) + text
    length -= 127
    while length >= 128:
        written.append(length % 128 + 128)
        length //= 128
    return b"\x7f" + bytes([*written, length]) + text
