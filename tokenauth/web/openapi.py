"""The description of the HTTP (OpenAPI 3.1), made of the routes and of the types of their messages."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import msgspec

from tokenauth import __version__
from tokenauth.errors import InsufficientScope, InvalidCredentials, NoFreeToken, Refusal, RetryLater
from tokenauth.web.operations import Answer, Operation
from tokenauth.web.responses import STATUS
from tokenauth.web.routing import Route

Document = dict[str, Any]

_SCHEMES: Mapping[str, Document] = {
    "X-Token": {"type": "apiKey", "in": "header", "name": "X-Token", "description": "A token of POST /api/token."},
    "Bearer": {"type": "http", "scheme": "bearer", "description": "The same token, in the header Authorization."},
    "Basic": {"type": "http", "scheme": "basic", "description": "Name and password of a user, as an OAuth client."},
    "X-API-PASSWORD": {"type": "apiKey", "in": "header", "name": "X-API-PASSWORD"},
}

_PARAMETERS = {
    "id": "The public id of a token, as GET /api/tokens lists it.",
    "pool": "The name of a pool of the configuration.",
    "token": "The value of a pool token.",
    "file": "One of the files that the page needs.",
}

_SECONDS = {"schema": {"type": "integer", "minimum": 0}, "description": "Seconds to wait before another try."}
_CHALLENGE = {"schema": {"type": "string"}, "description": "How to authenticate (RFC 6750 section 3, RFC 7617)."}


class Refused(msgspec.Struct):
    """Why a request is not granted: a code for programs, a sentence for people."""

    error: str
    error_description: str


def describe(routes: Iterable[Route], issuer: str) -> Document:
    """Write the document: every method of every route."""
    found = [
        (route, method, handler, handler.operation)  # type: ignore[attr-defined]
        for route in routes
        for method, handler in route.handlers.items()
    ]
    operations = [operation for *_, operation in found]
    schemas = _Schemas(map(_asked, operations), map(_answered, operations))
    paths: dict[str, Document] = {}
    tags: dict[str, str] = {}
    for route, method, handler, operation in found:
        tag = handler.__module__.rpartition(".")[2]
        tags[tag] = _sentence(sys.modules[handler.__module__].__doc__)
        summary = _sentence(handler.__doc__).rstrip(".")
        described = {"operationId": f"{method.lower()} {route.template}", "tags": [tag], "summary": summary}
        paths.setdefault(route.template, {})[method.lower()] = described | _describe(route, operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tokenauth", "version": __version__, "license": {"name": "MIT", "identifier": "MIT"}},
        "servers": [{"url": issuer or "/"}],
        "tags": [{"name": name, "description": text} for name, text in tags.items()],
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": _SCHEMES},
    }


class _Schemas:
    """The schemas of all message types, and references to them."""

    def __init__(self, asked: Iterable[Iterable[Any]], answered: Iterable[Iterable[Any]]) -> None:
        answers = [*chain.from_iterable(answered), Refused]
        types = list({repr(each): each for each in (*chain.from_iterable(asked), *answers)}.values())
        schemas, self.components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
        self._schemas = dict(zip(map(repr, types), schemas, strict=True))
        for struct in answers:
            if _sends_defaults(struct):
                component = self.components[struct.__name__]
                component["required"] = list(component["properties"])

    def of(self, type: Any) -> Document:
        """Return the schema of one of the types, or of several of which it is one."""
        if isinstance(type, tuple):
            return {"anyOf": [self.of(each) for each in type]}
        return self._schemas[repr(type)]


def _sends_defaults(kind: Any) -> bool:
    """Whether messages of a type always have all fields."""
    is_struct = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    return is_struct and not kind.__struct_config__.omit_defaults


def _asked(operation: Operation) -> Iterator[Any]:
    yield from operation.query.values()
    yield from (each for each in (operation.body, operation.form) if each is not None)


def _answered(operation: Operation) -> Iterator[Any]:
    for answer in operation.answers:
        if answer.type is not None:
            yield from answer.type if isinstance(answer.type, tuple) else [answer.type]


def _describe(route: Route, operation: Operation, schemas: _Schemas) -> Document:
    """Describe what an operation takes and answers."""
    guard = route.guard
    named = re.findall(r"\{(\w+)\}", route.template)
    parameters = [_parameter(name, "path", {"type": "string", "minLength": 1}, _PARAMETERS[name]) for name in named]
    parameters += [_parameter(name, "query", schemas.of(type)) for name, type in operation.query.items()]
    schemes = list(operation.schemes)
    if guard is not None and guard.asks_token:
        schemes = [f"{outer} {inner}".strip() for outer in ("X-Token", "Bearer") for inner in schemes or [""]]
    refused = [*operation.refuses, *(guard.refuses if guard else ())]
    described: Document = {"responses": _answers(operation.answers, refused, schemas)}
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None or operation.form is not None:
        if operation.form is None:
            content = {"application/json": {"schema": schemas.of(operation.body)}}
        else:
            once = {"additionalProperties": {"type": "string"}}  # a field that stands there twice reads as a list
            schema = schemas.of(operation.form) | once
            content = {"application/x-www-form-urlencoded": {"schema": schema}}
        described["requestBody"] = {"required": not operation.empty, "content": content}
    if schemes:
        described["security"] = [{name: [] for name in scheme.split()} for scheme in schemes]
    return described


def _answers(answers: Sequence[Answer], refusals: Iterable[type[Refusal]], schemas: _Schemas) -> Document:
    """Describe all answers by their status: those that are no refusals, and those that are."""
    described: dict[int, Document] = {answer.status: _answer(answer, schemas) for answer in answers}
    by_status = sorted(dict.fromkeys(refusals), key=STATUS.__getitem__)
    for status, kinds in groupby(by_status, key=STATUS.__getitem__):
        refusal = _refusal(list(kinds), schemas)
        described[status] = _either(described[status], refusal) if status in described else refusal
    return {str(status): described[status] for status in sorted(described)}


def _answer(answer: Answer, schemas: _Schemas) -> Document:
    described: Document = {"description": answer.says or _sentence(getattr(answer.type, "__doc__", None)) or "Done."}
    if answer.type is not None:
        described["content"] = {answer.media: {"schema": schemas.of(answer.type)}}
    elif answer.media != "application/json":
        described["content"] = {answer.media: {}}
    if answer.headers:
        described["headers"] = {
            name: {"schema": {"type": "string"}, "description": text} for name, text in answer.headers.items()
        }
    return described


def _refusal(kinds: Sequence[type[Refusal]], schemas: _Schemas) -> Document:
    described: Document = {"description": " ".join(_sentence(kind.__doc__) for kind in kinds)}
    if InvalidCredentials in kinds:
        described["content"] = {"text/plain": {"schema": {"const": "invalid credentials"}}}
    else:
        schema = {"allOf": [schemas.of(Refused), {"properties": {"error": {"enum": sorted({k.code for k in kinds})}}}]}
        described["content"] = {"application/json": {"schema": schema}}
    status = STATUS[kinds[0]]
    if any(issubclass(kind, RetryLater | NoFreeToken) for kind in kinds):
        described["headers"] = {"Retry-After": _SECONDS}
    elif InsufficientScope in kinds or (status == 401 and InvalidCredentials not in kinds):
        described["headers"] = {"WWW-Authenticate": _CHALLENGE}
    return described


def _either(one: Document, other: Document) -> Document:
    """Describe an answer that may be one of two with the same status."""
    merged = {**other, **one, "description": f"{one['description']} {other['description']}"}
    both = [each["content"]["application/json"]["schema"] for each in (one, other)]
    merged["content"] = {"application/json": {"schema": {"anyOf": both}}}
    return merged


def _parameter(name: str, where: str, schema: Document, text: str = "") -> Document:
    described = {"name": name, "in": where, "required": where == "path", "schema": schema}
    return described | ({"description": text} if text else {})


def _sentence(text: str | None) -> str:
    """Return the first line of a docstring."""
    return (text or "").strip().partition("\n")[0]
