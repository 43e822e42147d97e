"""Finds every token in a log-out request, in whatever form a client sends it."""

import asyncio
import json
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress

from starlette.types import Scope

from tokenauth import values
from tokenauth.errors import InvalidRequest
from tokenauth.nesting import json_opens_more_than
from tokenauth.web.requests import MAX_BODY, MAX_FIELDS, MAX_NESTED, Request
from tokenauth.web.urlencoding import parse_fields

MAX_SEARCHED = 64 * 1024
"""Bytes of a body that are searched."""

MAX_INFLATED = 16 * 1024
"""Maximum bytes of all decompressed forms of a body."""

MAX_LAYERS = 3
"""Nested encodings that are decompressed."""

MAX_MEMBERS = 8
"""Members of a gzip file that are decompressed (RFC 1952 section 2.2)."""

_SLICE = 8 * 1024
"""Bytes that are searched at a time, which takes a few milliseconds at most; then other requests have their turn."""

_GZIP = b"\x1f\x8b"
_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32  # zlib tells them apart
_HEADERS = frozenset({b"x-token", b"authorization"})

_ONE_TOKEN = re.compile(rb'\{"token": ?"([A-Za-z0-9]{%d})"\}' % values.LENGTH)
"""The body of nearly all log-outs."""


async def find_logout_tokens(request: Request) -> Sequence[bytes]:
    """Return all tokens in a log-out request: the answer says that they are no longer valid, which must be true.

    It searches the query and the body (JSON, almost JSON, a form, text, UTF-16, any of it compressed). It searches the
    headers only if the query and the body have no token in a field named `token`. If they have one, the header only
    authenticates the caller: an admin who revokes a leaked token stays logged in. The size of a request limits how many
    tokens there can be.
    """
    body, complete = await _read(request)
    query: bytes = request.scope["query_string"]
    usual = _ONE_TOKEN.fullmatch(body)
    if usual is not None and complete and not query and not _content_encodings(request.scope):
        return [usual[1]]  # what the search below finds
    bodies = unpack(request.scope, body)
    found: dict[bytes, None] = {}
    for text in (query, *bodies):
        for start in range(0, len(text), _SLICE):
            if start:
                await asyncio.sleep(0)
            part = text[max(0, start - values.MAX_ENCODED_LENGTH) : start + _SLICE]
            found.update(dict.fromkeys(values.find_values(part)))
    named = _form_values(query)
    for text in bodies:
        await asyncio.sleep(0)
        named += _body_values(text)
    # The rest of an incomplete body might have named another token.
    if complete and not any(values.find_values(value) for value in named):
        for name, value in request.scope["headers"]:
            if name in _HEADERS:
                found.update(dict.fromkeys(values.find_values(value)))
    return list(found)


def unpack(scope: Scope, body: bytes) -> Sequence[bytes]:
    """Return a body, followed by its decompressed forms: gzip or deflate, with or without zlib's header.

    A wrong Content-Encoding or checksum does not matter: everything that can be decompressed is returned.
    """
    encodings = _content_encodings(scope)
    layers = sum(word.strip().lower() not in {b"", b"identity"} for word in encodings.split(b",", MAX_LAYERS))
    texts, left = [body], MAX_INFLATED
    for layer in range(MAX_LAYERS):
        if left == 0 or not (layer < layers or body.startswith(_GZIP)):
            break
        body = _inflate(body, left, _ZLIB_OR_GZIP) or _inflate(body, left, -zlib.MAX_WBITS)
        if not body:
            break
        texts.append(body)
        left -= len(body)
    return texts


def _content_encodings(scope: Scope) -> bytes:
    return b",".join(value for name, value in scope["headers"] if name == b"content-encoding")


def _inflate(data: bytes, limit: int, wbits: int) -> bytes:
    """Decompress data to at most `limit` bytes; return none if it is not compressed."""
    inflated = b""
    for _ in range(MAX_MEMBERS):
        decompressor = zlib.decompressobj(wbits)
        with suppress(zlib.error):
            # The checksum is in the last 8 or 4 bytes: if it is wrong, everything before it has been decompressed.
            for part in (data[:-8], data[-8:-4], data[-4:]):
                if decompressor.eof:
                    data += part
                else:
                    inflated += decompressor.decompress(decompressor.unconsumed_tail + part, limit - len(inflated))
                    data = decompressor.unused_data
                if len(inflated) >= limit:
                    return inflated
        if not decompressor.eof:
            break
    return inflated


async def _read(request: Request) -> tuple[bytes, bool]:
    """Read at most MAX_SEARCHED bytes of a body, and whether the client sent all of it."""
    body, more = b"", True
    try:
        while more and len(body) < MAX_SEARCHED:
            part, more = await request.read_part()
            body += part
    except InvalidRequest:
        return body, False
    return body[:MAX_SEARCHED], True


def _body_values(text: bytes) -> list[bytes]:
    """Return the values of `token` in a JSON object or a form; none if the text is too long to be parsed.

    A comma after the last field is tolerated, because some documentation has shown it.
    """
    if len(text) > MAX_BODY:
        return []
    try:
        plain = text.decode(json.detect_encoding(text)).strip().removeprefix("\ufeff")
    except ValueError:
        return []
    if not plain.startswith("{"):
        return _form_values(plain.encode())
    if json_opens_more_than(MAX_NESTED, plain):
        return []
    plain = plain.removesuffix("}").rstrip().removesuffix(",") + "}"
    try:
        fields = json.loads(plain, object_pairs_hook=tuple, strict=False)
    except ValueError:
        return []
    return [value.encode(errors="replace") for name, value in fields if name == "token" and isinstance(value, str)]


def _form_values(text: bytes) -> list[bytes]:
    """Return the values of `token` in a query or a form; none if the text is too long to be parsed."""
    if len(text) > MAX_BODY or text.count(b"&") >= MAX_FIELDS:
        return []
    return [value for name, value in parse_fields(text) if name == b"token"]
