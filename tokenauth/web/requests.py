"""A stricter starlette.requests.Request: it refuses what is ambiguous, too long or incomplete."""

import base64
import json
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import TypeVar

import msgspec
from starlette import requests
from starlette.types import Scope

from tokenauth.errors import ClientGone, InvalidRequest
from tokenauth.login_queue import DisconnectCheck
from tokenauth.models import Identity, Token
from tokenauth.nesting import json_opens_more_than
from tokenauth.values import redact
from tokenauth.web.asgi_extensions import client_disconnected
from tokenauth.web.client_address import client_address
from tokenauth.web.exceptions import BodyTooLarge, UnsupportedMediaType
from tokenauth.web.urlencoding import parse_fields

T = TypeVar("T", bound=msgspec.Struct)

MAX_BODY = 16 * 1024
"""Maximum size of a body, in bytes. The rest is not read."""

MAX_QUERY = 8 * 1024
"""Maximum size of a query, in bytes."""

MAX_FIELDS = 100
"""Maximum number of fields in a query or a form."""

MAX_NESTED = 32
"""Maximum number of arrays and objects in a JSON body. Every body is one flat object."""

MAX_USER_AGENT = 256
"""Maximum length of a User-Agent, in characters. The rest is cut off."""

_COLON = ord(":")
_FORM = b"application/x-www-form-urlencoded"
_HARMLESS_NAME = re.compile(r"[\w.\[\]-]{1,40}", re.ASCII)


@lru_cache(maxsize=1024)
def describe_agent(sent: bytes) -> str:
    """Return a User-Agent as it may be stored and logged: without tokens, and cut to MAX_USER_AGENT characters.

    It is cut last: what is left of a token would not be found.
    """
    return redact(sent.decode("latin-1"))[:MAX_USER_AGENT]


class Request(requests.Request):
    """A request whose accessors raise Refusal for invalid input."""

    @property
    def user(self) -> Identity:
        """The user whose token TokenMiddleware has validated."""
        user: Identity = self.scope["user"]
        return user

    @property
    def token(self) -> Token:
        """The token that TokenMiddleware has validated."""
        token: Token = self.scope["token"]
        return token

    @property
    def identity(self) -> Identity | None:
        """The user; None where no token is required."""
        user: Identity | None = self.scope.get("user")
        return user

    @property
    def username(self) -> str | None:
        """The name of the user; None where no token is required."""
        user = self.identity
        return None if user is None else user.username

    @property
    def client_address(self) -> str:
        """The IP address of the client, as reported by a trusted proxy if there is one."""
        return client_address(self.scope)

    @property
    def user_agent(self) -> str:
        """The User-Agent as it may be stored and shown."""
        return describe_agent(self.header(b"user-agent") or b"")

    @property
    def disconnect_check(self) -> DisconnectCheck:
        """A function that returns whether the client has disconnected."""
        return partial(client_disconnected, self.scope)

    def raise_if_disconnected(self) -> None:
        """Raise ClientGone if the client has disconnected, so that no token is issued to it."""
        if client_disconnected(self.scope):
            raise ClientGone

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of a name in lower case."""
        return next((value for key, value in self.scope["headers"] if key == name), None)

    def bearer(self) -> bytes | None:
        """Return the token of X-Token or Authorization: Bearer. Raises InvalidRequest for two different ones."""
        return bearer(self.scope)

    def basic(self) -> bytes | None:
        """Return `name:password` of Authorization: Basic (RFC 7617). Raises InvalidRequest."""
        found = []
        for name, value in self.scope["headers"]:  # in half of the time of a comprehension
            if name == b"authorization" and value[:6].lower() == b"basic ":
                found.append(value)
        if not found:
            return None
        try:
            [encoded] = found
            plain = base64.b64decode(encoded[6:].strip(), validate=True)
            if _COLON in plain:
                return plain
        except ValueError:
            pass
        raise InvalidRequest("Send one Authorization: Basic header, with name:secret in Base64.")

    # The query

    def check_query(self, known: Collection[str]) -> None:
        """Raise InvalidRequest if the query has a parameter that is not in `known`."""
        query = self.scope["query_string"]
        if query:
            for name, _ in query_pairs(query):
                if name not in known:
                    raise InvalidRequest(f"Unknown query parameter{_hint(name, known)}")

    def query_values(self, name: str) -> Sequence[str]:
        """Return all values of a query parameter. Raises InvalidRequest if the query is too long."""
        query = self.scope["query_string"]
        return [value for key, value in query_pairs(query) if key == name] if query else ()

    def query_value(self, name: str) -> str | None:
        """Return the value of a query parameter. Raises InvalidRequest if it has several different ones."""
        if not self.scope["query_string"]:
            return None
        values = set(self.query_values(name))
        if len(values) > 1:
            raise InvalidRequest(f"The query has several different values of {_quoted(name)}.")
        return next(iter(values), None)

    def query_number(self, name: str, default: int, low: int, high: int) -> int:
        """Return a query parameter that is a whole number. Raises InvalidRequest."""
        text = self.query_value(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 18 and low <= int(text) <= high):
            raise InvalidRequest(f"{name}: must be a whole number from {low} to {high}.")
        return int(text)

    def query_flag(self, name: str) -> bool:
        """Return whether a query parameter is `true`. Raises InvalidRequest if it is neither that nor `false`."""
        text = self.query_value(name)
        if text not in {None, "true", "false"}:
            raise InvalidRequest(f"{name}: must be true or false.")
        return text == "true"

    def counts_as_use(self) -> bool:
        """Return whether this counts as a use of the token to check; with `?touch=0` it does not.

        Raises InvalidRequest.
        """
        text = self.query_value("touch")
        if text not in {None, "0"}:
            raise InvalidRequest("touch: must be 0, or left out.")
        return text is None

    # The body

    async def json_body(self, decoder: msgspec.json.Decoder[T], empty: T | None = None) -> T:
        """Read a JSON body as the decoder's type. `empty` is the value of an empty body; without it one is refused.

        Raises UnsupportedMediaType, BodyTooLarge or InvalidRequest.
        """
        if empty is not None and not self.has_body:
            return empty
        if empty is None:
            self._check_json()
        body, complete = await self._read()
        if empty is not None:
            if not body:
                return empty
            self._check_json()
        if not complete:
            raise BodyTooLarge
        if not body:
            raise InvalidRequest("The body is empty. Send a JSON object.")
        return _decode(body, decoder)

    async def form_body(self) -> dict[str, str]:
        """Read a form in UTF-8, without its empty fields (RFC 6749 section 3.2).

        Raises BodyTooLarge or InvalidRequest.
        """
        is_form = False
        for name, value in self.scope["headers"]:
            if name == b"content-type":
                is_form = value == _FORM or value.partition(b";")[0].strip().lower() == _FORM
            elif name == b"content-encoding":
                raise InvalidRequest("The body must not have a Content-Encoding.")
            elif name == b"content-length":
                _check_length(value)
        if not is_form:
            raise InvalidRequest(f"The body must be a form: send Content-Type: {_FORM.decode()}.")
        body, complete = await self._read()
        if not complete:
            raise BodyTooLarge
        if body.count(b"&") >= MAX_FIELDS:
            raise InvalidRequest(f"The form has more than {MAX_FIELDS} fields.")
        try:
            body.decode()  # with the empty fields
            pairs = [(name.decode(), value.decode()) for name, value in parse_fields(body) if value]
        except ValueError:
            raise InvalidRequest("The form is not UTF-8.") from None
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise InvalidRequest("The form has a field twice.")
        return fields

    @property
    def has_body(self) -> bool:
        """Whether there may be a body. In HTTP/1, the headers announce it (RFC 9112 section 6.3)."""
        for name, value in self.scope["headers"]:  # in a third of the time of `any`
            if (name == b"content-length" and value != b"0") or name == b"transfer-encoding":
                return True
        return not self.scope.get("http_version", "").startswith("1.")

    async def refuse_body(self, known: Collection[str] = ()) -> None:
        """Raise InvalidRequest for a body other than `{}`; `known` are the parameters of the query."""
        body, complete = await self._read()
        if not complete or body.strip() not in {b"", b"{}"}:
            hint = f": send {' and '.join(map(_quoted, known))} in the query" if known else ""
            raise InvalidRequest(f"The body must be empty{hint}.")

    async def discard_body(self) -> None:
        """Receive the body, and ignore it. Raises InvalidRequest if the client disconnects before its end."""
        more = True
        while more:
            _, more = await self.read_part()

    async def read_part(self) -> tuple[bytes, bool]:
        """Return the next part of the body, and whether there are more.

        Raises InvalidRequest if the client disconnects.
        """
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("The connection was closed before the body was complete.")
        return message.get("body", b""), message.get("more_body", False)

    async def _read(self) -> tuple[bytes, bool]:
        """Read at most MAX_BODY bytes, and whether that is all of the body."""
        body, more = await self.read_part()
        while more and len(body) <= MAX_BODY:
            part, more = await self.read_part()
            body += part
        return body[:MAX_BODY], len(body) <= MAX_BODY

    def _check_json(self) -> None:
        """Check that the headers allow to read the body as JSON. Programs may omit the Content-Type, web pages may not.

        Browsers send a body without one to other origins with no preflight. Raises UnsupportedMediaType, or
        BodyTooLarge for a Content-Length.
        """
        says_json, from_page, encoded = None, False, False
        for name, value in self.scope["headers"]:
            if name == b"content-type":
                says_json = says_json is not False and _is_json_type(value)
            elif name == b"content-length":
                _check_length(value)
            elif name == b"origin":
                from_page = True
            elif name == b"content-encoding":
                encoded = True
        if encoded:
            raise UnsupportedMediaType("The body has a Content-Encoding. Send it without one.")
        if says_json is None and from_page:
            raise UnsupportedMediaType(
                "The Content-Type is missing. Web pages must send Content-Type: application/json."
            )
        if says_json is False:
            raise UnsupportedMediaType


def bearer(scope: Scope) -> bytes | None:
    """Return the token of the X-Token or the Authorization: Bearer header (RFC 6750 section 2.1).

    Raises InvalidRequest when two headers hold different ones.
    """
    found = None
    for name, value in scope["headers"]:
        if name == b"x-token":
            token = value.strip()
            if not token:  # an empty header is the same as none
                continue
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            token = value[7:].strip()
        else:
            continue
        if found is not None and token != found:
            raise InvalidRequest("Two different tokens were sent; send one, in X-Token or in Authorization: Bearer.")
        found = token
    return found


def header_token(scope: Scope, x_token_only: bool) -> bytes | None:
    """Return the token of a header, as `bearer` does, or that of X-Token without a look at Authorization.

    Raises InvalidRequest for two different ones.
    """
    if not x_token_only:
        return bearer(scope)
    found = {value.strip() for name, value in scope["headers"] if name == b"x-token"} - {b""}
    if len(found) > 1:
        raise InvalidRequest("Two different tokens were sent in X-Token; send one.")
    return next(iter(found), None)


def match_cursor(pattern: re.Pattern[str], after: str) -> re.Match[str]:
    """Parse where a page begins. Raises InvalidRequest."""
    found = pattern.fullmatch(after)
    if found is None:
        raise InvalidRequest("after: must be the `next` of an earlier page.")
    return found


def query_pairs(query: bytes) -> Sequence[tuple[str, str]]:
    """Return the names and values of a query, in order. Raises InvalidRequest if it is too long."""
    if len(query) > MAX_QUERY:
        raise InvalidRequest("The query is longer than 8 KiB.")
    if query.count(b"&") >= MAX_FIELDS:
        raise InvalidRequest(f"The query has more than {MAX_FIELDS} fields.")
    return [(name.decode(errors="replace"), value.decode(errors="replace")) for name, value in parse_fields(query)]


def _decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        text = body.decode()  # all of it: msgspec does not look into strings that it skips
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 (byte {error.start}).") from None
    if text.startswith("\ufeff"):
        raise InvalidRequest("The body begins with a byte order mark. Send UTF-8 without one.")
    if json_opens_more_than(MAX_NESTED, text):  # before a decoder recurses into it
        raise InvalidRequest(f"The body is nested too deeply: it has more than {MAX_NESTED} arrays and objects.")
    try:
        try:
            found = decoder.decode(text)
        except msgspec.ValidationError:
            raise InvalidRequest(_explain(text, decoder.type)) from None
        fields = found.__struct_fields__
        if "\\u" in text or any(text.count(f'"{field}"') > 1 for field in fields):  # "\u0061" is the key "a"
            json.loads(text, object_pairs_hook=partial(_refuse_duplicates, fields))
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not JSON: {_where(error)}.") from None
    except ValueError:  # Python refuses to convert more than 4,300 digits
        raise InvalidRequest("The body has a number that is too long.") from None
    return found


def _where(error: msgspec.DecodeError) -> str:
    """Return what is wrong with JSON, and at which byte. msgspec repeats nothing of it."""
    problem = str(error).removeprefix("JSON is malformed: ")
    return "it ends too early, or an escape sequence in it does" if problem == "Input data was truncated" else problem


def _refuse_duplicates(fields: Collection[str], pairs: list[tuple[str, object]]) -> None:
    names = [name for name, _ in pairs]
    for field in fields:
        if names.count(field) > 1:
            raise InvalidRequest(f"The body has {_quoted(field)} twice.")


def _check_length(announced: bytes) -> None:
    """Raise BodyTooLarge for a Content-Length that is too much, before the body is read."""
    if len(announced) >= len(str(MAX_BODY)) and announced.isdigit() and int(announced) > MAX_BODY:
        raise BodyTooLarge


def _is_json_type(content_type: bytes) -> bool:
    if content_type == b"application/json":
        return True
    kind, _, parameters = content_type.lower().partition(b";")
    kind = kind.strip()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return False
    settings = (parameter.strip().partition(b"=") for parameter in parameters.split(b";"))
    return all(value.strip(b'"') == b"utf-8" for name, _, value in settings if name == b"charset")


def _explain(text: str, record: type[msgspec.Struct]) -> str:
    """Say what is wrong with a body that is not a `record`. Raises DecodeError if it is not JSON."""
    try:
        values = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return "The body must be a JSON object."
    fields = {field.encode_name: field for field in msgspec.structs.fields(record)}
    if record.__struct_config__.forbid_unknown_fields:
        for name in values:
            if name not in fields:
                return f"Unknown field{_hint(name, fields)}"
    for name, field in fields.items():
        if name not in values:
            if field.required:
                return f"Missing field {_quoted(name)}."
            continue
        try:
            msgspec.json.decode(values[name], type=field.type)
        except msgspec.ValidationError as error:
            return f"{name}: {_in_json_terms(str(error))}."
    return "The body has a field twice."  # with a wrong value, and then with a right one


_EXPECTED = {"str": "a string", "int": "a whole number", "float": "a number", "array": "an array"}
_SENT = {**_EXPECTED, "int": "a number", "float": "a decimal number", "bool": "true or false", "object": "an object"}


def _in_json_terms(problem: str) -> str:
    """Return what msgspec says about a value in the words of JSON, such as "must be a string, not a number"."""
    problem, in_array, _ = problem.partition(" - at ")
    expected, sent, got = problem.partition(", got ")
    words = _replace_types(expected, _EXPECTED).removesuffix(".0")
    for old, new in (
        *(("Expected", "must be"), ("Number", "the number is")),
        *(("of length >=", "of length at least"), ("of length <=", "of length at most")),
        *((">=", "of at least"), ("<=", "of at most")),
    ):
        words = words.replace(old, new)
    return f"{'each ' * bool(in_array)}{words}{', not ' * bool(sent)}{_replace_types(got, _SENT)}"


def _replace_types(text: str, names: Mapping[str, str]) -> str:
    return re.sub("`([^`]+)`", lambda types: " or ".join(names.get(each, each) for each in types[1].split(" | ")), text)


def _hint(name: str, known: Collection[str]) -> str:
    """Name what is unknown, and what may be meant. A long or odd name is not repeated: it may be a secret."""
    shown = f" {_quoted(name)}" if _HARMLESS_NAME.fullmatch(name) else ""
    close = get_close_matches(name.lower(), known, 1) if shown else []
    if close:
        return f"{shown}: did you mean {_quoted(close[0])}?"
    return f"{shown}: known are {', '.join(map(_quoted, known))}." if known else f"{shown}: none is expected here."


def _quoted(name: str) -> str:
    return f'"{name}"'
