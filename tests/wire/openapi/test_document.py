"""The document is OpenAPI 3.1, and has what the service serves: nothing less, nothing else."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.types import Receive, Scope, Send

from tests.support.servers import worker, write_config
from tests.wire.openapi.configurations import APART, speaking
from tests.wire.openapi.conformance import Documented
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.web.app import find_routes
from tokenauth.web.openapi import describe
from tokenauth.web.routing import Route

CONFIGURATIONS = {
    "no_dialects": "",
    "all_dialects": speaking(**APART),
    "with_tokens": speaking("require_token = true", **APART),
    "one_without_prefix": speaking(token_pool=""),
    "similar_prefixes": speaking(random_token_generator="/p-1", token_management_service="/p_1"),
    "deep_prefix": speaking(simple_token_implement="/a/b.c/d~e"),
    "issuer": '[oauth]\nissuer = "https://auth.example.com"',
    "issuer_with_a_path": '[oauth]\nissuer = "https://example.com/auth/one"',
}


class Served(NamedTuple):
    """A configuration, and the document that a server with it gives out."""

    config: Path
    documented: Documented

    @property
    def addresses(self) -> list[tuple[str, str]]:
        """All that the service answers at."""
        routes = find_routes(create_service(loader.load(self.config)))
        return [(method, route.template) for route in routes for method in route.handlers]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Ask a server of each configuration for its document."""
    config = write_config(tmp_path_factory.mktemp(request.param), CONFIGURATIONS[request.param])
    with worker(config) as server:
        answer = httpx.get(f"{server.url}/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    return Served(config, Documented(answer.json()))


def test_the_document_is_valid_openapi(served: Served) -> None:
    document = served.documented.document
    assert document["openapi"] == "3.1.0"
    assert [error.message for error in OpenAPIV31SpecValidator(dict(document)).iter_errors()] == []


def test_the_document_has_exactly_what_is_served(served: Served) -> None:
    described = [(operation.method, operation.path) for operation in served.documented]
    assert sorted(described) == sorted(served.addresses)


def test_each_operation_says_what_it_does_under_a_name_of_its_own(served: Served) -> None:
    tags = [tag["name"] for tag in served.documented.document["tags"]]
    for _, _, described in served.documented:
        assert described["summary"]
        assert [tag for tag in described["tags"] if tag in tags]
        assert [status for status in described["responses"] if status.startswith("2")]
        assert all(answer["description"] for answer in described["responses"].values())
    names = Counter(operation.described["operationId"] for operation in served.documented)
    assert [name for name, count in names.items() if count > 1] == []


def test_whoever_must_say_who_he_is_learns_how(served: Served) -> None:
    """Each way that an operation names is one that the document explains; a guarded one documents its refusal."""
    explained = served.documented.document["components"]["securitySchemes"]
    for operation in served.documented:
        assert set().union(*operation.schemes) <= set(explained)
        if set() not in operation.schemes:
            assert "401" in operation.described["responses"], operation


def test_every_path_parameter_is_described(served: Served) -> None:
    for operation in served.documented:
        named = {each["name"] for each in operation.described.get("parameters", ()) if each["in"] == "path"}
        assert named == {part[1:-1] for part in operation.path.split("/") if part.startswith("{")}


def test_the_server_of_the_document_is_the_issuer_or_wherever_it_came_from(served: Served) -> None:
    issuer = loader.load(served.config).oauth.issuer
    assert served.documented.document["servers"] == [{"url": issuer or "/"}]


def test_an_operation_that_is_missing_or_too_many_is_noticed(tmp_path: Path) -> None:
    """The comparison that the tests above make, with a fault in either side of it."""
    service = create_service(loader.load(write_config(tmp_path)))
    routes = find_routes(service)
    document = describe(routes, "")
    routes.append(Route("/more", {"GET": routes[0].handlers["GET"]}))
    described = {(operation.method, operation.path) for operation in Documented(document)}
    served = {(method, route.template) for route in routes for method in route.handlers}
    assert served - described == {("GET", "/more")}
    assert ("GET", "/more") in {(each.method, each.path) for each in Documented(describe(routes, ""))}


async def _undescribed(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer nothing."""


def test_a_handler_that_does_not_say_what_it_takes_and_answers_is_noticed() -> None:
    with pytest.raises(AttributeError, match="operation"):
        describe([Route("/more", {"GET": _undescribed})], "")


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/docs/start.js", "/docs/swagger-ui.css"])
def test_without_docs_there_is_no_document_and_no_page(undocumented: httpx.Client, path: str) -> None:
    answer = undocumented.get(path)
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


def test_without_docs_everything_else_is_there(undocumented: httpx.Client, tmp_path: Path) -> None:
    def others(more: str) -> set[str]:
        config = write_config(tmp_path, f"[server]\n{more}")
        return {route.template for route in find_routes(create_service(loader.load(config)))}

    assert others("docs = true") - others("docs = false") == {"/openapi.json", "/docs", "/docs/{file}"}
    assert undocumented.get("/healthz").status_code == 200


@pytest.fixture(scope="module")
def undocumented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Connect to a server that shows no documents."""
    config = write_config(tmp_path_factory.mktemp("undocumented"), "[server]\ndocs = false")
    with worker(config) as server, server.client() as connected:
        yield connected


def test_the_schemas_of_answers_are_used_and_none_is_missing(served: Served) -> None:
    """Each reference leads somewhere, and no schema is left over."""
    document = dict(served.documented.document)
    assert set(_references(document)) == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)
