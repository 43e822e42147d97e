"""Build an OpenAPI 3.1 document from descriptions of operations."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from tokenauth import __version__, errors
from tokenauth.web import exceptions
from tokenauth.web.responses import STATUS, refusal_document

Document = dict[str, Any]

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"

X_TOKEN, BEARER, BASIC = "X-Token", "Bearer", "Basic"

JSON_BODY: Sequence[type[errors.Refusal]] = (
    errors.InvalidRequest,
    exceptions.BodyTooLarge,
    exceptions.UnsupportedMediaType,
)
"""How a JSON body can be refused."""

STORE: Sequence[type[errors.Refusal]] = (errors.Overloaded, errors.StoreUnavailable)
"""How an operation that reads or writes the database can refuse."""

TOKEN_GUARD: Sequence[type[errors.Refusal]] = (errors.InvalidRequest, errors.TokenRequired, errors.InvalidToken, *STORE)
"""How an operation that requires a token can refuse a request before it looks at it."""

NO_NUL = r"^[^\u0000]*$"
"""A pattern for texts that must not have a NUL character."""


def schema_only(**schema: Any) -> msgspec.Meta:
    """Return constraints that the schema of a type shows, and that are checked elsewhere than in decoding."""
    return msgspec.Meta(extra_json_schema=schema)


class ErrorAnswer(msgspec.Struct):
    """The body of every error, except where a path documents another one."""

    error: str
    error_description: str


class Parameter(NamedTuple):
    """A parameter of a path or of a query. One without an example is left out of the example request."""

    name: str
    text: str
    type: object = str
    example: str | None = None


class Answer(NamedTuple):
    """An answer in a form of its own, as opposed to a refusal. `type` is what msgspec makes the schema of."""

    status: int
    text: str
    type: object = None
    example: object = None
    media: str = JSON
    headers: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A method of a path, written for the people who call it.

    The example of the request (`example` for its body, and those of the parameters) gets the first of the answers.
    `security` lists alternatives; each is the schemes that have to be used together.
    """

    method: str
    path: str
    id: str
    title: str
    text: str
    answers: Sequence[Answer]
    refusals: Sequence[type[errors.Refusal]] = ()
    parameters: Sequence[Parameter] = ()
    body: object = None
    media: str = JSON
    body_required: bool = True
    example: object = None
    security: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """Operations that are shown together, and the security schemes that only they have."""

    name: str
    text: str
    operations: Sequence[Operation]
    schemes: Mapping[str, Document] = field(default_factory=dict)

    def below(self, prefix: str) -> "Section":
        """Return the same section with all paths below a prefix."""
        return replace(self, operations=[replace(each, path=prefix + each.path) for each in self.operations])

    def guarded(self, *refusals: type[errors.Refusal]) -> "Section":
        """Return the same section with a token required everywhere, and with more refusals."""
        return replace(self, operations=[guarded(each, *refusals) for each in self.operations])

    def refusing(self, *refusals: type[errors.Refusal]) -> "Section":
        """Return the same section with more refusals everywhere."""
        changed = [replace(each, refusals=[*each.refusals, *refusals]) for each in self.operations]
        return replace(self, operations=changed)


def guarded(operation: Operation, *refusals: type[errors.Refusal]) -> Operation:
    """Return the same operation with a token required, in addition to its own security."""
    security = [(scheme, *others) for scheme in (X_TOKEN, BEARER) for others in operation.security or [()]]
    return replace(operation, security=security, refusals=[*operation.refusals, *TOKEN_GUARD, *refusals])


# Swagger UI focuses the last field: that of X-Token.
_SCHEMES: Mapping[str, Document] = {
    BASIC: {
        "type": "http",
        "scheme": "basic",
        "description": "For the OAuth 2.0 endpoints: a user name and password, as `client_id` and `client_secret`.",
    },
    BEARER: {
        "type": "http",
        "scheme": "bearer",
        "description": "The token, sent as `Authorization: Bearer` instead of `X-Token`.",
    },
    X_TOKEN: {
        "type": "apiKey",
        "in": "header",
        "name": "X-Token",
        "description": "Paste the `token` from the answer of **Log in**.",
    },
}

_REFUSALS: Mapping[type[errors.Refusal], tuple[errors.Refusal, str]] = {
    type(example): (example, text)
    for example, text in (
        (errors.InvalidRequest("The body is empty. Send a JSON object."), "The request is malformed."),
        (exceptions.InvalidScope("write", "read"), "The client does not have every scope that it asks for."),
        (exceptions.UnsupportedGrantType(), "The grant type is not supported."),
        (exceptions.InvalidClient(), "The name or secret of the client is missing or wrong."),
        (errors.TokenRequired(), "No token was sent."),
        (errors.InvalidToken(), "The token is unknown, expired or revoked."),
        (
            errors.Forbidden("scope: is empty or malformed. Leave it out, or name the required scopes."),
            "The query cannot be understood, so nothing passes.",
        ),
        (
            exceptions.ForeignOrigin("https://other.example"),
            "A web page of another origin, which `server.cors_origins` does not list, sent the request.",
        ),
        (errors.NotYourLease(), "The lease belongs to another user."),
        (errors.InsufficientScope("admin"), "The user does not have a scope that this needs."),
        (exceptions.NotFound(), "It does not exist."),
        (errors.UnknownPool(), "The pool does not exist."),
        (errors.UnknownToken(), "The token is not in the pool: it was deleted, it expired, or it never existed."),
        (errors.LoginNeeded(), "The token that was sent is a named one, or has only some of its user's scopes."),
        (errors.NameTaken(), "The user has a live token of this name."),
        (errors.TooManyTokens(), "The user has too many named tokens. None was ended."),
        (errors.AlreadyRotated(), "The token was rotated before. A newer one has its name, or had it."),
        (errors.NotRenewable(), "The lifetime of the token is fixed."),
        (errors.PoolFull(), "The pool has too little room. No token was generated."),
        (errors.TooManyLeases(), "The user has leased as many tokens as one user may. No token was leased."),
        (errors.AlreadyReserved(), "Another user has reserved the member. Nothing was changed."),
        (errors.UnknownMember(), "The pool has no such member."),
        (errors.NoFreeToken(30), "No token is free. `Retry-After` says when the next lease ends."),
        (errors.RequestDiffers(), "A request of this id has other terms."),
        (errors.TooManyPlaces(), "The user has 1,000 requests in the line."),
        (errors.PlaceLost(), "The request is not in the line any more: it was taken out, or its time was over."),
        (errors.UnknownRequest(), "The user has no such request in the line."),
        (errors.LeaseLost(), "The lease is over, or another one has replaced it. Stop using the token."),
        (exceptions.BodyTooLarge(), "The body is larger than 16 KiB."),
        (exceptions.UnsupportedMediaType(), "The body is not JSON in UTF-8."),
        (errors.TooManyAttempts(retry_after=30), "Too many failed logins. Wait for `Retry-After` seconds."),
        (errors.Overloaded(), "The server is overloaded. Try again shortly."),
        (errors.StoreUnavailable(), "The database is unavailable. This says nothing about any token."),
        (exceptions.RetryableInternalError(), "An unexpected error. This says nothing about the token."),
    )
}
"""An example of each refusal, and its text for callers."""

_SECONDS = {"schema": {"type": "integer", "minimum": 0}, "description": "Seconds to wait before the next attempt."}
_CHALLENGE = {"schema": {"type": "string"}, "description": "How to authenticate (RFC 6750 section 3, RFC 7617)."}


def build_document(sections: Sequence[Section], intro: str, fields: Mapping[str, str], server: str) -> Document:
    """Build the document. `intro` is its first text; `fields` describes fields of messages by their names."""
    operations = [operation for section in sections for operation in section.operations]
    schemas = _Schemas(operations, fields)
    paths: dict[str, Document] = {}
    schemes: dict[str, Document] = {}
    for section in sections:
        schemes |= section.schemes
        for operation in section.operations:
            described = {"tags": [section.name], **_describe(operation, schemas)}
            paths.setdefault(operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tokenauth API",
            "version": __version__,
            "description": intro,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": server}],
        "tags": [{"name": section.name, "description": section.text} for section in sections],
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": {**schemes, **_SCHEMES}},
    }


class _Schemas:
    """The schemas of all messages and parameters."""

    def __init__(self, operations: Iterable[Operation], fields: Mapping[str, str]) -> None:
        operations = list(operations)
        asked = [operation.body for operation in operations]
        asked += [parameter.type for operation in operations for parameter in operation.parameters]
        answered = [*(answer.type for operation in operations for answer in operation.answers), ErrorAnswer]
        types = list({repr(each): each for each in chain(asked, answered) if each is not None}.values())
        schemas, self.components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
        self._schemas = dict(zip(map(repr, types), schemas, strict=True))
        for component in self.components.values():
            component.pop("description", None)  # a docstring
            for name, schema in component["properties"].items():
                if name in fields:
                    schema.setdefault("description", fields[name])
        for kind in answered:
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and not kind.__struct_config__.omit_defaults:
                component = self.components[self.of(kind)["$ref"].rpartition("/")[2]]
                component["required"] = list(component["properties"])  # those with defaults are sent, too

    def of(self, type: object) -> Document:
        return self._schemas[repr(type)]


def _describe(operation: Operation, schemas: _Schemas) -> Document:
    described: Document = {
        "operationId": operation.id,
        "summary": operation.title,
        "description": operation.text,
        "responses": _responses(operation, schemas),
    }
    if operation.parameters:
        in_path = re.findall(r"\{(\w+)\}", operation.path)
        described["parameters"] = [_parameter(each, each.name in in_path, schemas) for each in operation.parameters]
    if operation.body is not None:
        schema = schemas.of(operation.body)
        if operation.media == FORM:
            schema = schema | {"additionalProperties": {"type": "string"}}  # a field sent twice reads as a list
        content = {"schema": schema, "example": operation.example}
        described["requestBody"] = {"required": operation.body_required, "content": {operation.media: content}}
    if operation.security:
        described["security"] = [{name: [] for name in schemes} for schemes in operation.security]
    return described


def _parameter(parameter: Parameter, in_path: bool, schemas: _Schemas) -> Document:
    schema = schemas.of(parameter.type) | ({"minLength": 1} if in_path else {})
    described = {
        "name": parameter.name,
        "in": "path" if in_path else "query",
        "required": in_path,
        "description": parameter.text,
        "schema": schema,
    }
    return described if parameter.example is None else described | {"example": parameter.example}


def _responses(operation: Operation, schemas: _Schemas) -> Document:
    refusals = list(dict.fromkeys(operation.refusals))
    return {
        str(status): _response(
            [answer for answer in operation.answers if answer.status == status],
            [kind for kind in refusals if STATUS[kind] == status],
            schemas,
        )
        for status in sorted({answer.status for answer in operation.answers} | {STATUS[kind] for kind in refusals})
    }


def _response(answers: Sequence[Answer], refusals: Sequence[type[errors.Refusal]], schemas: _Schemas) -> Document:
    """Describe all answers and refusals of one status."""
    alone = len(answers) + len(refusals) == 1
    texts = [answer.text for answer in answers]
    texts += [_REFUSALS[kind][1] if alone else f"`{kind.code}`: {_REFUSALS[kind][1]}" for kind in refusals]
    headers: Document = {}
    alternatives: dict[str, list[Document]] = {}
    examples: dict[str, dict[str, object]] = {}
    for number, answer in enumerate(answers, 1):
        headers |= {name: {"schema": {"type": "string"}, "description": it} for name, it in answer.headers.items()}
        if answer.type is not None:
            alternatives.setdefault(answer.media, []).append(schemas.of(answer.type))
            examples.setdefault(answer.media, {})[f"answer {number}"] = answer.example
        elif answer.media != JSON:
            alternatives[answer.media] = []
    for kind in refusals:
        refusal = _REFUSALS[kind][0]
        headers |= _headers(refusal)
        examples.setdefault(JSON, {})[refusal.code] = refusal_document(refusal)
    if refusals:
        codes = sorted({kind.code for kind in refusals})
        schema = {"allOf": [schemas.of(ErrorAnswer), {"properties": {"error": {"enum": codes}}}]}
        alternatives.setdefault(JSON, []).append(schema)
    texts = list(dict.fromkeys(texts))
    described: Document = {"description": texts[0] if len(texts) == 1 else "\n".join(f"- {text}" for text in texts)}
    if headers:
        described["headers"] = headers
    if alternatives:
        described["content"] = {
            media: _content(found, examples.get(media, {})) for media, found in alternatives.items()
        }
    return described


def _content(schemas: Sequence[Document], examples: Mapping[str, object]) -> Document:
    content: Document = {}
    if schemas:
        content["schema"] = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    if len(examples) == 1:
        [content["example"]] = examples.values()
    elif examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return content


def _headers(refusal: errors.Refusal) -> Document:
    if isinstance(refusal, errors.RetryLater | errors.NoFreeToken):
        return {"Retry-After": _SECONDS}
    if isinstance(refusal, errors.InsufficientScope) or STATUS[type(refusal)] == 401:
        return {"WWW-Authenticate": _CHALLENGE}
    return {}
