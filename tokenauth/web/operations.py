"""What the handlers take and answer, said beside each of them; the description of the HTTP is made of it."""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import BodyTooLarge, InvalidRequest, Refusal, UnsupportedMediaType
from tokenauth.web import requests
from tokenauth.web.routing import Handlers

H = TypeVar("H", bound=Callable[..., Any])

Refusals = Sequence[type[Refusal]]

JSON_BODY: Refusals = (InvalidRequest, BodyTooLarge, UnsupportedMediaType)
"""What is refused wherever a JSON body is read."""

NO_NUL = r"^[^\u0000]*$"
"""A pattern for texts that are refused with a NUL character."""


def said(**schema: Any) -> msgspec.Meta:
    """Say in the schema of a type what is checked elsewhere."""
    return msgspec.Meta(extra_json_schema=schema)


class Answer(NamedTuple):
    """An answer that is no refusal: its status, the type of its JSON (or several), what it says in words, its headers.

    What is not JSON has a media type only.
    """

    status: int
    type: Any = None
    says: str = ""
    headers: Mapping[str, str] = {}
    media: str = "application/json"


class Operation(NamedTuple):
    """What a handler takes and answers.

    `body` is the type of a JSON body, `form` that of a form; with `empty` no body will do, too. `query` has the types
    of the parameters. `schemes` are the ways in which it asks who calls, each of which is enough; "" is none.
    """

    answers: Sequence[Answer]
    refuses: Refusals
    body: Any = None
    form: Any = None
    empty: bool = False
    query: Mapping[str, Any] = {}
    schemes: Sequence[str] = ()


def operation(
    *answers: Answer,
    refuses: Refusals = (),
    body: Any = None,
    form: Any = None,
    empty: bool = False,
    query: Mapping[str, Any] | None = None,
    schemes: Sequence[str] = (),
) -> Callable[[H], H]:
    """Say of a handler what it takes and answers, in the words of Operation; its docstring says what it does."""

    def attach(handler: H) -> H:
        handler.operation = Operation(answers, refuses, body, form, empty, query or {}, schemes)  # type: ignore[attr-defined]
        return handler

    return attach


def exact(routes: Mapping[str, Handlers]) -> Mapping[str, Handlers]:
    """Have queries refused that have other parameters than the operations name, and bodies where they take none.

    A parameter that is mistyped, or that is in the body in place of the query or the other way round, would be left
    out of what is asked for.
    """
    return {
        path: {method: _exact(handler) for method, handler in handlers.items()} for path, handlers in routes.items()
    }


def whole(handlers: Handlers) -> Handlers:
    """Have handlers that take no body wait for the end of their request: one that is cut off changes nothing."""
    waiting = {handler: _whole(handler) for handler in set(handlers.values())}  # the same ones are the same afterwards
    return {method: waiting[handler] for method, handler in handlers.items()}


def _whole(handler: ASGIApp) -> ASGIApp:
    if len(inspect.signature(handler).parameters) == 1:
        return handler
    described: Operation = handler.operation  # type: ignore[attr-defined]
    if described.body is not None or described.form is not None:
        return handler

    @wraps(handler)
    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        await requests.completed(receive)
        await handler(scope, receive, send)

    return waiting


def _exact(handler: ASGIApp) -> ASGIApp:
    described: Operation = handler.operation  # type: ignore[attr-defined]
    known, takes_body = described.query, described.body is not None

    @wraps(handler)
    def checked(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["query_string"]:
            requests.check_query(scope, known)
        if not takes_body and requests.has_body(scope):
            return without_body(scope, receive, send)
        return handler(scope, receive, send)

    async def without_body(scope: Scope, receive: Receive, send: Send) -> None:
        await requests.refuse_body(receive, known)
        await handler(scope, receive, send)

    return checked
