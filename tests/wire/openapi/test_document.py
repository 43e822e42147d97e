"""The document is valid OpenAPI 3.1 and describes exactly the routes that are served."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from tests.support.servers import ROOT, worker, write_config
from tests.wire.openapi.configurations import ALL_DIALECTS, with_dialects
from tests.wire.openapi.conformance import Documented
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.settings.model import Settings
from tokenauth.web.api_documentation import LogInForm, LogOutForm, describe
from tokenauth.web.app import find_routes
from tokenauth.web.routes.health import HealthRoutes
from tokenauth.web.routing import Route

CONFIGURATIONS = {
    "no_dialects": "",
    "all_dialects": with_dialects(**ALL_DIALECTS),
    "with_tokens": with_dialects("require_token = true", **ALL_DIALECTS),
    "one_without_prefix": with_dialects(token_pool=""),
    "similar_prefixes": with_dialects(random_token_generator="/p-1", token_management_service="/p_1"),
    "deep_prefix": with_dialects(simple_token_implement="/a/b.c/d~e"),
    "login_page": '[browser]\nurl = "http://localhost:8000"',
    "issuer": '[oauth]\nissuer = "https://auth.example.com"',
    "issuer_with_a_path": '[oauth]\nissuer = "https://example.com/auth/one"',
}


FULLEST = {"with_tokens", "login_page", "issuer"}
"""They contain all that any of the configurations has. The others differ from them in prefixes and URLs."""


class Served(NamedTuple):
    """A configuration, its document, and the methods and paths that the service serves."""

    settings: Settings
    documented: Documented
    routes: list[tuple[str, str]]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Make the document of each configuration; a server sends the same (below)."""
    settings = loader.load(write_config(tmp_path_factory.mktemp(request.param), CONFIGURATIONS[request.param]))
    found = find_routes(create_service(settings))
    routes = [(method, route.path) for route in found for method in route.handlers]
    return Served(settings, Documented(_decoded(describe(settings))), routes)


def _decoded(document: Mapping[str, Any]) -> Any:
    """Return a document as a client decodes it."""
    return json.loads(json.dumps(document))


def test_a_server_sends_the_document_of_its_configuration(tmp_path: Path) -> None:
    config = write_config(tmp_path, CONFIGURATIONS["with_tokens"])
    with worker(config) as server, server.client() as client:
        answer = client.get("/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == _decoded(describe(loader.load(config)))


@pytest.mark.parametrize(
    "served",
    [name if name in FULLEST else pytest.param(name, marks=pytest.mark.faults) for name in CONFIGURATIONS],
    indirect=True,
)
def test_the_document_is_valid_openapi(served: Served) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    document = served.documented.document
    assert document["openapi"] == "3.1.0"
    assert [error.message for error in OpenAPIV31SpecValidator(dict(document)).iter_errors()] == []


def test_the_document_has_exactly_the_served_routes(served: Served) -> None:
    described = [(operation.method, operation.path) for operation in served.documented]
    assert sorted(described) == sorted(served.routes)


def test_each_operation_has_a_summary_and_a_unique_id(served: Served) -> None:
    tags = [tag["name"] for tag in served.documented.document["tags"]]
    for _, _, described in served.documented:
        assert described["summary"]
        assert [tag for tag in described["tags"] if tag in tags]
        assert [status for status in described["responses"] if status[0] in "23"]
        assert all(answer["description"] for answer in described["responses"].values())
    names = Counter(operation.described["operationId"] for operation in served.documented)
    assert [name for name, count in names.items() if count > 1] == []


def test_several_reasons_of_one_status_are_a_list(served: Served) -> None:
    (login,) = [operation.described for operation in served.documented if operation.described["operationId"] == "logIn"]
    assert login["responses"]["401"]["description"] == "The user name or the password is wrong."
    reasons = login["responses"]["503"]["description"].splitlines()
    assert [reason.partition(" The ")[0] for reason in reasons] == ["- `overloaded`:", "- `store_unavailable`:"]


def test_required_authentication_is_documented(served: Served) -> None:
    """Security schemes of operations are defined, and guarded operations document the 401."""
    explained = served.documented.document["components"]["securitySchemes"]
    for operation in served.documented:
        assert set().union(*operation.schemes) <= set(explained)
        if set() not in operation.schemes:
            assert "401" in operation.described["responses"], operation


def test_every_path_parameter_is_described(served: Served) -> None:
    for operation in served.documented:
        named = {each["name"] for each in operation.described.get("parameters", ()) if each["in"] == "path"}
        assert named == {part[1:-1] for part in operation.path.split("/") if part.startswith("{")}


def test_the_documented_server_is_the_issuer_if_set(served: Served) -> None:
    issuer = served.settings.oauth.issuer
    assert served.documented.document["servers"] == [{"url": issuer or "/"}]


def test_a_route_without_documentation_is_detected(tmp_path: Path) -> None:
    """The comparison above fails if a route is only added to the application."""
    config = loader.load(write_config(tmp_path))
    service = create_service(config)
    routes = [
        *find_routes(service),
        Route("/more", {"GET": HealthRoutes(service.ready, service.audit, service.node).alive}),
    ]
    described = {(operation.method, operation.path) for operation in Documented(describe(config))}
    assert {(method, route.path) for route in routes for method in route.handlers} - described == {("GET", "/more")}


def test_texts_name_no_file_and_no_implementation(served: Served) -> None:
    document = json.dumps(served.documented.document)
    assert re.findall(r"[\w/]+\.(?:py|md)\b|hot path|ASGI|handler|docstring", document) == []


def test_ids_and_schemas_have_names_for_generated_code(served: Served) -> None:
    ids = [operation.described["operationId"] for operation in served.documented]
    assert [name for name in ids if not re.fullmatch("[a-z][A-Za-z]+", name)] == []
    schemas = served.documented.document["components"]["schemas"]
    assert [name for name in schemas if not re.fullmatch("[A-Z][A-Za-z]+", name)] == []


def test_the_dialects_are_listed_last(served: Served) -> None:
    tags = [tag["name"] for tag in served.documented.document["tags"]]
    chosen = list(served.settings.dialects)
    assert tags[:4] == ["Token", "My tokens", "Forward-auth", "Pools"]
    assert tags[len(tags) - len(chosen) :] == chosen


def test_each_example_fits_its_schema(served: Served) -> None:
    for operation in served.documented:
        bodies = [operation.described.get("requestBody", {}), *operation.described["responses"].values()]
        for media in (media for body in bodies for media in body.get("content", {}).values()):
            examples = [each["value"] for each in media.get("examples", {}).values()]
            for example in [*examples, *([media["example"]] if "example" in media else [])]:
                assert served.documented.fits(media["schema"], example), (operation.id, example)


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/docs/start.js", "/docs/swagger-ui.css"])
def test_without_docs_there_is_no_document_and_no_page(without_docs: httpx.Client, path: str) -> None:
    answer = without_docs.get(path)
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


def test_without_docs_all_other_routes_exist(without_docs: httpx.Client, tmp_path: Path) -> None:
    def others(more: str) -> set[str]:
        config = write_config(tmp_path, f"[server]\n{more}")
        return {route.path for route in find_routes(create_service(loader.load(config)))}

    assert others("docs = true") - others("docs = false") == {"/openapi.json", "/docs", "/docs/{file}"}
    assert without_docs.get("/healthz").status_code == 200


@pytest.fixture(scope="module")
def without_docs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Connect to a server with `docs = false`."""
    config = write_config(tmp_path_factory.mktemp("without_docs"), "[server]\ndocs = false")
    with worker(config) as server, server.client() as connected:
        yield connected


def test_every_schema_is_defined_and_referenced(served: Served) -> None:
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


def test_what_needs_the_database_can_be_overloaded(served: Served) -> None:
    """Each queue of the database is limited, that of writes and those of threads that read."""
    for operation in served.documented:
        codes = json.dumps(operation.described["responses"].get("503", {}))
        assert ("store_unavailable" in codes) == ("overloaded" in codes), operation


def test_the_forms_of_the_pages_are_documented() -> None:
    sent: dict[type[msgspec.Struct], set[str]] = {LogInForm: set(), LogOutForm: set()}
    for page, form in (("login", LogInForm), ("logout", LogOutForm), ("logins", LogOutForm)):
        text = (ROOT / f"tokenauth/web/pages/{page}.html").read_text()
        sent[form] |= set(re.findall(r'<input[^>]* name="(\w+)"', text))
    assert sent == {form: set(form.__struct_fields__) for form in sent}
