"""Requests: Starlette's, read strictly. What is ambiguous, too long or cut off is refused."""

import base64
import json
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache, partial
from ipaddress import ip_address
from typing import TypeVar

import msgspec
from starlette import requests
from starlette.types import Receive, Scope

from tokenauth.addresses import network
from tokenauth.errors import BodyTooLarge, ClientGone, InvalidRequest, UnsupportedMediaType
from tokenauth.login_queue import Gone
from tokenauth.logs import log
from tokenauth.models import Identity, Token
from tokenauth.nesting import json_opens_more_than
from tokenauth.web import percent
from tokenauth.web.asgi_extensions import client_gone

T = TypeVar("T", bound=msgspec.Struct)

MAX_BODY = 16 * 1024
"""Bytes of a body that are read; the rest is cut off while it streams in."""

MAX_SEARCHED = 64 * 1024
"""Bytes of a body that are searched for a token to be ended."""

MAX_INFLATED = 16 * 1024
"""Bytes that such a body is unpacked to, if it is compressed, in all of its layers."""

MAX_LAYERS = 3
"""Encodings one within the other that are unpacked."""

MAX_MEMBERS = 8
"""Members of a gzip file that are unpacked (RFC 1952 section 2.2)."""

MAX_QUERY = 8 * 1024
"""Bytes of a query that are read."""

MAX_FIELDS = 100
"""Fields of a query or of a form that are read."""

MAX_NESTED = 32
"""Arrays and objects in a JSON body that are read. Every body here is one flat object."""

MAX_USER_AGENT = 256
"""Characters of a User-Agent that are kept."""

_GZIP = b"\x1f\x8b"
_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32  # it tells them apart by itself
_NAMEABLE = re.compile(r"[\w.\[\]-]{1,40}", re.ASCII)


MAX_ADDRESS = 64
"""Characters of a client's address that are looked at; the longest one of IPv6 has 45, and then may name a zone."""


class Request(requests.Request):
    """A request of Starlette's, with readings that raise a refusal for what is ambiguous, too long or cut off."""

    @property
    def user(self) -> Identity:
        """The user of a request that TokenMiddleware has let through."""
        user: Identity = self.scope["user"]
        return user

    @property
    def token(self) -> Token:
        """The token of a request that TokenMiddleware has let through."""
        token: Token = self.scope["token"]
        return token

    @property
    def identity(self) -> Identity | None:
        """The user; None where no token is required."""
        return user(self.scope)

    @property
    def username(self) -> str | None:
        """The name of the user; None where no token is required."""
        return username(self.scope)

    @property
    def client_address(self) -> str:
        """The address of the client, as a trusted proxy names it."""
        return client_address(self.scope)

    @property
    def user_agent(self) -> str:
        """What the client calls itself, cut to MAX_USER_AGENT characters."""
        return user_agent(self.scope)

    @property
    def gone(self) -> Gone:
        """A function that returns whether the client has closed its connection."""
        return gone(self.scope)

    def refuse_gone(self) -> None:
        """Raise ClientGone if the client has closed its connection: it would never receive what is issued now."""
        refuse_gone(self.scope)

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of this name, which is in lower case."""
        return header(self.scope, name)

    def bearer(self) -> bytes | None:
        """Return the token of X-Token or Authorization: Bearer. Raises InvalidRequest for two different ones."""
        return bearer(self.scope)

    def basic(self) -> bytes | None:
        """Return `name:password` of Authorization: Basic. Raises InvalidRequest for several, or a malformed one."""
        return basic(self.scope)

    def query_values(self, name: str) -> list[str]:
        """Return all values of a query parameter. Raises InvalidRequest when the query is too long."""
        return query_values(self.scope, name)

    def query_value(self, name: str) -> str | None:
        """Return the value of a query parameter. Raises InvalidRequest when it has several different values."""
        return query_value(self.scope, name)

    def query_number(self, name: str, default: int, low: int, high: int) -> int:
        """Return the whole number of a query parameter. Raises InvalidRequest."""
        return query_number(self.scope, name, default, low, high)

    def query_flag(self, name: str) -> bool:
        """Return whether a query parameter is "true". Raises InvalidRequest for anything but true and false."""
        return query_flag(self.scope, name)

    def check_query(self, known: Collection[str]) -> None:
        """Raise InvalidRequest if the query has a parameter that is not one of `known`."""
        if self.scope["query_string"]:
            check_query(self.scope, known)

    @property
    def has_body(self) -> bool:
        """Whether the headers announce a body."""
        return has_body(self.scope)

    async def refuse_body(self, known: Collection[str] = ()) -> None:
        """Raise InvalidRequest for a body other than `{}`; `known` are the parameters of the query."""
        await refuse_body(self.receive, known)

    async def completed(self) -> None:
        """Wait for the end of a request whose body means nothing. Raises InvalidRequest if it is cut off."""
        await completed(self.receive)

    async def json_body(self, decoder: msgspec.json.Decoder[T], empty: T | None = None) -> T:
        """Read a JSON body as the decoder's type. `empty` is the value of an empty body, which is refused without.

        Raises UnsupportedMediaType, BodyTooLarge or InvalidRequest.
        """
        return await json_body(self.scope, self.receive, decoder, empty)

    async def form_body(self) -> dict[str, str]:
        """Read a form in UTF-8 (application/x-www-form-urlencoded). Raises BodyTooLarge or InvalidRequest."""
        return await form_body(self.scope, self.receive)


def bearer(scope: Scope) -> bytes | None:
    """Return the token of the X-Token or the Authorization: Bearer header (RFC 6750 section 2.1).

    Raises InvalidRequest when two headers hold different ones.
    """
    found = None
    for name, value in scope["headers"]:
        if name == b"x-token":
            token = value.strip()
            if not token:  # sent, and empty: as good as not sent
                continue
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            token = value[7:].strip()
        else:
            continue
        if found is not None and token != found:
            raise InvalidRequest("Two different tokens were sent; send one, in X-Token or in Authorization: Bearer.")
        found = token
    return found


def query_pairs(query: bytes) -> Sequence[tuple[str, str]]:
    """Return the names and values of a query, in order. Raises InvalidRequest when it is too long to read."""
    if len(query) > MAX_QUERY:
        raise InvalidRequest("The query is longer than 8 KiB.")
    if query.count(b"&") >= MAX_FIELDS:
        raise InvalidRequest(f"The query has more than {MAX_FIELDS} fields.")
    return [(name.decode(errors="replace"), value.decode(errors="replace")) for name, value in _fields(query)]


def _fields(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Go through the names and values of a query or a form."""
    for field in text.split(b"&"):
        if field:
            name, _, value = field.partition(b"=")
            yield percent.decode_form(name), percent.decode_form(value)


def values_in(text: bytes, name: str) -> list[bytes]:
    """Return what a body has under a name, if it is a JSON object or a form; nothing if it is too long to be read.

    A comma after the last field is no fault: some documents have shown it so.
    """
    if len(text) > MAX_BODY:
        return []
    try:
        plain = text.decode(json.detect_encoding(text)).strip().removeprefix("\ufeff")
    except ValueError:
        return []
    if not plain.startswith("{"):
        return values_in_form(plain.encode(), name)
    if json_opens_more_than(MAX_NESTED, plain):
        return []
    plain = plain.removesuffix("}").rstrip().removesuffix(",") + "}"
    try:
        document = json.loads(plain, object_pairs_hook=tuple, strict=False)
    except ValueError:
        return []
    return [value.encode(errors="replace") for key, value in document if key == name and isinstance(value, str)]


def values_in_form(text: bytes, name: str) -> list[bytes]:
    """Return what a query or a form has under a name; nothing if it is too long to be read."""
    if len(text) > MAX_BODY or text.count(b"&") >= MAX_FIELDS:
        return []
    return [value for key, value in _fields(text) if key == name.encode()]


def check_query(scope: Scope, known: Collection[str]) -> None:
    """Raise InvalidRequest if the query has a parameter that is not one of `known`."""
    for name, _ in query_pairs(scope["query_string"]):
        if name not in known:
            raise InvalidRequest(f"The query has an unknown parameter{_hint(name, known)}")


def query_values(scope: Scope, name: str) -> list[str]:
    """Return the values that the query gives a name. Raises InvalidRequest when it is too long to read."""
    return [value for key, value in query_pairs(scope["query_string"]) if key == name]


def query_value(scope: Scope, name: str) -> str | None:
    """Return the one value that the query gives a name. Raises InvalidRequest when it gives several."""
    values = set(query_values(scope, name))
    if len(values) > 1:
        raise InvalidRequest(f"The query has several different values of {name!r}.")
    return next(iter(values), None)


def query_number(scope: Scope, name: str, default: int, low: int, high: int) -> int:
    """Return the whole number that the query gives a name. Raises InvalidRequest."""
    text = query_value(scope, name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and low <= int(text) <= high):
        raise InvalidRequest(f"{name}: must be a whole number from {low} to {high}.")
    return int(text)


def query_flag(scope: Scope, name: str) -> bool:
    """Return whether the query says `name=true`. Raises InvalidRequest."""
    text = query_value(scope, name) if scope["query_string"] else None
    if text not in {None, "true", "false"}:
        raise InvalidRequest(f"{name}: must be true or false.")
    return text == "true"


def header(scope: Scope, name: bytes) -> bytes | None:
    """Return the first header of this name."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def body(receive: Receive) -> tuple[bytes, bool]:
    """Read at most MAX_BODY bytes; the flag says whether that was all. Raises InvalidRequest when it is cut off."""
    data, more = await _part(receive)
    while more and len(data) <= MAX_BODY:
        part, more = await _part(receive)
        data += part
    return data[:MAX_BODY], len(data) <= MAX_BODY


async def _part(receive: Receive) -> tuple[bytes, bool]:
    """Wait for more of a body. Raises InvalidRequest when the client has gone: half a request is none."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise InvalidRequest("The connection was closed before all of the body had come.")
    return message.get("body", b""), message.get("more_body", False)


def has_body(scope: Scope) -> bool:
    """Return whether a request says that it has a body."""
    for name, value in scope["headers"]:
        if (name == b"content-length" and value != b"0") or name == b"transfer-encoding":
            return True
    return False


async def refuse_body(receive: Receive, known: Collection[str]) -> None:
    """Raise InvalidRequest if there is a body, unless it says nothing; `known` are the parameters of the query."""
    data, complete = await body(receive)
    if not complete or data.strip() not in {b"", b"{}"}:
        named = f": put {' and '.join(map(repr, known))} in the query" if known else ""
        raise InvalidRequest(f"The body must be empty{named}.")


async def any_body(receive: Receive) -> tuple[bytes, bool]:
    """Read at most MAX_SEARCHED bytes, whatever they are; the flag says whether the client was there to the end."""
    data, more = b"", True
    try:
        while more and len(data) < MAX_SEARCHED:
            part, more = await _part(receive)
            data += part
    except InvalidRequest:
        return data, False
    return data[:MAX_SEARCHED], True


async def completed(receive: Receive) -> None:
    """Wait for the end of a request whose body means nothing. Raises InvalidRequest when it is cut off."""
    more = True
    while more:
        _, more = await _part(receive)


def unpack(scope: Scope, data: bytes) -> Sequence[bytes]:
    """Return a body, and then what is in it if it is compressed: gzip or deflate, with or without the zlib header.

    What is not, or cannot be unpacked, is the body alone. Neither the header nor a checksum has to be right.
    """
    encodings = [value for name, value in scope["headers"] if name == b"content-encoding"]
    said = sum(word.strip().lower() not in {b"", b"identity"} for word in b",".join(encodings).split(b",", MAX_LAYERS))
    readings, left = [data], MAX_INFLATED
    for layer in range(MAX_LAYERS):
        if left == 0 or not (layer < said or data.startswith(_GZIP)):
            break
        data = _inflate(data, left)
        if not data:
            break
        readings.append(data)
        left -= len(data)
    return readings


def _inflate(data: bytes, limit: int) -> bytes:
    """Return the beginning of what is compressed; nothing if it is not."""
    return _inflate_as(_ZLIB_OR_GZIP, data, limit) or _inflate_as(-zlib.MAX_WBITS, data, limit)


def _inflate_as(wbits: int, data: bytes, limit: int) -> bytes:
    found = b""
    for _ in range(MAX_MEMBERS):
        engine = zlib.decompressobj(wbits)
        with suppress(zlib.error):
            # Checksums come last, 8 bytes or 4: a wrong one takes nothing away from what was found before it.
            for part in (data[:-8], data[-8:-4], data[-4:]):
                if engine.eof:
                    data += part
                else:
                    found += engine.decompress(engine.unconsumed_tail + part, limit - len(found))
                    data = engine.unused_data
                if len(found) >= limit:
                    return found
        if not engine.eof:
            break
    return found


async def json_body(scope: Scope, receive: Receive, decoder: msgspec.json.Decoder[T], empty: T | None = None) -> T:
    """Read a JSON body as the decoder's type; no body at all stands for `empty`, where there is that.

    Raises UnsupportedMediaType, BodyTooLarge or InvalidRequest, which names the fault.
    """
    if empty is None and not _is_json(scope):
        raise UnsupportedMediaType
    data, complete = await body(receive)
    if empty is not None:
        if not data:
            return empty
        if not _is_json(scope):
            raise UnsupportedMediaType
    if not complete:
        raise BodyTooLarge
    if not data:
        raise InvalidRequest("The body is empty; send a JSON object.")
    try:
        text = data.decode()  # all of it: msgspec does not look into strings that it skips
        _check_nesting(text)
        found = decoder.decode(text)
        fields = found.__struct_fields__
        if "\\u" in text or any(text.count(f'"{field}"') > 1 for field in fields):  # an escaped key may be the same one
            json.loads(text, object_pairs_hook=partial(_refuse_twice, fields))
    except msgspec.ValidationError as error:
        raise InvalidRequest(_in_words(error, decoder.type.__struct_fields__)) from None
    except (msgspec.DecodeError, ValueError):
        raise InvalidRequest("The body is not JSON in UTF-8.") from None
    return found


async def form_body(scope: Scope, receive: Receive) -> dict[str, str]:
    """Read a form in UTF-8 (application/x-www-form-urlencoded); an empty value is none (RFC 6749 section 3.2).

    Raises BodyTooLarge or InvalidRequest, which names the fault.
    """
    readable = False
    for name, value in scope["headers"]:
        if name == b"content-type":
            readable = value.partition(b";")[0].strip().lower() == b"application/x-www-form-urlencoded"
        elif name == b"content-encoding":
            raise InvalidRequest("The body must not have a Content-Encoding.")
        elif name == b"content-length":
            _check_length(value)
    if not readable:
        raise InvalidRequest("The body must be a form: send Content-Type: application/x-www-form-urlencoded.")
    data, complete = await body(receive)
    if not complete:
        raise BodyTooLarge
    if data.count(b"&") >= MAX_FIELDS:
        raise InvalidRequest(f"The form has more than {MAX_FIELDS} fields.")
    try:
        data.decode()  # all of it, also what is left out
        pairs = [(name.decode(), value.decode()) for name, value in _fields(data) if value]
    except ValueError:
        raise InvalidRequest("The form is not UTF-8.") from None
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise InvalidRequest("The form has a field twice.")
    return fields


def basic(scope: Scope) -> bytes | None:
    """Return the name and the password of the Authorization: Basic header, `name:password` (RFC 7617).

    Raises InvalidRequest when there are several, or it cannot be read.
    """
    found = [value for name, value in scope["headers"] if name == b"authorization" and value[:6].lower() == b"basic "]
    if not found:
        return None
    try:
        [encoded] = found
        plain = base64.b64decode(encoded[6:].strip(), validate=True)
        if b":" in plain:
            return plain
    except ValueError:
        pass
    raise InvalidRequest("The header Authorization: Basic must be there once, with name:secret in Base64.")


def user(scope: Scope) -> Identity | None:
    """Return the user of the request; None where no token is required."""
    found: Identity | None = scope.get("user")
    return found


def username(scope: Scope) -> str | None:
    """Return the name of the user of the request; None where no token is required."""
    found = user(scope)
    return None if found is None else found.username


def gone(scope: Scope) -> Gone:
    """Return what says whether the client of this request has closed its connection."""
    return partial(client_gone, scope)


def refuse_gone(scope: Scope) -> None:
    """Raise ClientGone if nobody waits for the answer: nothing may be issued that nobody receives."""
    if client_gone(scope):
        raise ClientGone


def client_address(scope: Scope) -> str:
    """Return the address of the client: the peer's, or what a trusted proxy says it is; "unknown" if that is none."""
    client = scope.get("client")
    if not client:
        return ""
    address = _address(str(client[0])[:MAX_ADDRESS])
    if not noticed:
        forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        named = str(client[0]).encode("latin-1", "replace")  # by a proxy, if it is trusted
        if forwarded and not any(named in value for value in forwarded):
            _notice(address)
    return address


def _notice(peer: str) -> None:
    """Log, once, that a peer may be a proxy that is not trusted: behind it, all clients are taken for one."""
    noticed.append(peer)
    log.warning(
        "forwarded_for_ignored",
        peer=network(peer),
        action="if this is your proxy, list it in server.trusted_proxies: without it, its clients are throttled as one",
    )


noticed: list[str] = []
"""The peer that this was logged of."""


@lru_cache(maxsize=4096)
def _address(text: str) -> str:
    """Return an address in its usual spelling: IPv4 as such, and without a zone, which can be of any length."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return "unknown"
    return str(getattr(address, "ipv4_mapped", None) or address)


def user_agent(scope: Scope) -> str:
    """Return how the client calls itself, cut to a sensible length."""
    return (header(scope, b"user-agent") or b"")[:MAX_USER_AGENT].decode("latin-1")


def _is_json(scope: Scope) -> bool:
    """Whether a body may be read as JSON. Programs need not say that it is; a web page must.

    What a page sends without a type, its browser sends for pages of any origin, without asking first. Raises
    BodyTooLarge for a body that is announced as such.
    """
    typed, from_page, encoded = None, False, False
    for name, value in scope["headers"]:
        if name == b"content-type":
            typed = typed is not False and _says_json(value)
        elif name == b"content-length":
            _check_length(value)
        elif name == b"origin":
            from_page = True
        elif name == b"content-encoding":
            encoded = True
    return not encoded and (not from_page if typed is None else typed)


def _check_length(announced: bytes) -> None:
    """Raise BodyTooLarge for a Content-Length that is too much, before any of that is read."""
    if len(announced) >= len(str(MAX_BODY)) and announced.isdigit() and int(announced) > MAX_BODY:
        raise BodyTooLarge


def _says_json(content_type: bytes) -> bool:
    if content_type == b"application/json":
        return True
    kind, _, parameters = content_type.lower().partition(b";")
    kind = kind.strip()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return False
    settings = (parameter.strip().partition(b"=") for parameter in parameters.split(b";"))
    return all(value.strip(b'"') == b"utf-8" for name, _, value in settings if name == b"charset")


def _check_nesting(text: str) -> None:
    """Raise InvalidRequest for JSON with too many arrays and objects, so that no decoder has to recurse into them."""
    if json_opens_more_than(MAX_NESTED, text):
        raise InvalidRequest(f"The body is nested too deep: it has more than {MAX_NESTED} arrays and objects.")


def _refuse_twice(fields: Collection[str], pairs: list[tuple[str, object]]) -> None:
    names = [name for name, _ in pairs]
    for field in fields:
        if names.count(field) > 1:
            raise InvalidRequest(f"The body has {field!r} twice.")


def _in_words(error: msgspec.ValidationError, known: Collection[str]) -> str:
    problem, _, path = str(error).partition(" - at ")
    unknown = str(error).removeprefix("Object contains unknown field `")
    if unknown != str(error):
        return f"The body has an unknown field{_hint(unknown.removesuffix('`'), known)}"
    where = f" at {path.strip('`').removeprefix('$.')}" if path else ""
    return f"The body is not what it should be: {problem[0].lower()}{problem[1:]}{where}."


def _hint(name: str, known: Collection[str]) -> str:
    """Say which name is unknown, and which may be meant. A long or odd name is not repeated: it may be a secret."""
    shown = f" {name!r}" if _NAMEABLE.fullmatch(name) else ""
    close = get_close_matches(name.lower(), known, 1) if shown else []
    if close:
        return f"{shown}: did you mean {close[0]!r}?"
    return f"{shown}: known are {', '.join(map(repr, known))}." if known else f"{shown}: none is known here."
