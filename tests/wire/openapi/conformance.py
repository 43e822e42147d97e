"""Checks responses against the OpenAPI document."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import httpx
import jsonschema_rs

_HEADERS = ("www-authenticate", "retry-after", "allow", "x-auth-user", "x-auth-scopes", "x-auth-expires")
"""Headers that clients act on. They must be documented wherever they are sent."""


class Operation(NamedTuple):
    """A method of a path, with its description in the document."""

    method: str
    path: str
    described: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The operation id."""
        return str(self.described["operationId"])

    @property
    def body(self) -> str | None:
        """The media type of the request body, if there is one."""
        return next(iter(self.described.get("requestBody", {}).get("content", ())), None)

    @property
    def schemes(self) -> list[set[str]]:
        """The alternative sets of security schemes. An empty set: no authentication is needed."""
        return [set(scheme) for scheme in self.described.get("security", [{}])]


class Documented:
    """A document against which responses are checked."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._operations = list(self)
        self._validators: dict[int, jsonschema_rs.Draft202012Validator] = {}

    def __iter__(self) -> Iterator[Operation]:
        for path, methods in self.document["paths"].items():
            for method, described in methods.items():
                yield Operation(method.upper(), path, described)

    def find(self, method: str, path: str) -> Operation:
        """Return the operation of a request."""
        (found,) = (each for each in self._operations if each.method == method and _pattern(each.path).fullmatch(path))
        return found

    def check(self, answer: httpx.Response) -> Operation:
        """Return the operation. Fail unless it documents the status, media type, headers and body of the response."""
        operation = self.find(answer.request.method, answer.request.url.path)
        what = f"{operation.method} {operation.path} answered {answer.status_code}"
        described = operation.described["responses"].get(str(answer.status_code))
        assert described is not None, f"{what}, which is not documented: {answer.text}"
        self._check_headers(what, answer, described.get("headers", {}))
        content = described.get("content", {})
        media = answer.headers.get("content-type", "").partition(";")[0]
        if not content:
            assert (media, answer.content) == ("", b""), f"{what} with a body that is not documented"
        elif "*/*" not in content:
            assert media in content, f"{what} as {media!r}, and not as {list(content)}"
            if content[media]:
                body = answer.json() if media == "application/json" else answer.text
                faults = [str(fault) for fault in self._validator(content[media]["schema"]).iter_errors(body)]
                assert not faults, f"{what} with {body!r}: {faults}"
        return operation

    def fits(self, schema: Mapping[str, Any], document: object) -> bool:
        """Return whether a value is valid for a schema of the document."""
        return self._validator(schema).is_valid(document)

    def _check_headers(self, what: str, answer: httpx.Response, headers: Mapping[str, Any]) -> None:
        schemas = {name.lower(): header["schema"] for name, header in headers.items()}
        for name in _HEADERS:
            assert name in schemas or name not in answer.headers, f"{what} with {name}, which is not documented"
        for name, schema in schemas.items():
            if name in answer.headers:
                value = answer.headers[name]
                assert self._validator(schema).is_valid(int(value) if schema["type"] == "integer" else value)

    def _validator(self, schema: Mapping[str, Any]) -> jsonschema_rs.Draft202012Validator:
        """Return the validator of a schema of the document. Making one takes longer than a request."""
        found = self._validators.get(id(schema))
        if found is None:
            found = jsonschema_rs.Draft202012Validator({**schema, "components": self.document["components"]})
            self._validators[id(schema)] = found
        return found


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("[^/]+".join(map(re.escape, re.split(r"\{\w+\}", template))))
