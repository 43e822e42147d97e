"""The route table: each path has at most one route. Colliding routes are a configuration error."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.responses import Response
from starlette.routing import Match

from tests.support.servers import worker, write_config
from tokenauth.errors import ConfigError
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.web.app import build_app
from tokenauth.web.exceptions import MethodNotAllowed
from tokenauth.web.requests import Request
from tokenauth.web.routing import Handlers, Methods, Route, refuse_collisions


async def anything(request: Request) -> Response:
    """Answer with nothing."""
    return Response()


def handlers_for(*methods: str) -> Handlers:
    """Return handlers for the given methods."""
    return dict.fromkeys(methods, anything)


def table(templates: Iterable[str]) -> Sequence[Route]:
    return [Route(template, handlers_for("GET")) for template in templates]


def found(routes: Iterable[Route], path: str) -> tuple[str, Mapping[str, str]] | None:
    """Return the template of the route of a path, and its parameters."""
    for route in routes:
        match, scope = route.matches({"type": "http", "method": "GET", "path": path})
        if match is Match.FULL:
            return route.path, scope["path_params"]
    return None


NATIVE = table(
    [
        "/api/pools", "/api/pools/{pool}", "/api/pools/{pool}/tokens", "/api/pools/{pool}/tokens/{token}",
        "/api/pools/{pool}/leases", "/api/pools/{pool}/leases/{token}", "/api/tokens", "/api/tokens/{id}",
        "/v1.2/keep-alive", "/v1.2/keep-alive/{token}", "/~x_y/tokens/{token}/", "/{whole}",
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "template", "parameters"),
    [
        ("/api/pools", "/api/pools", {}),
        ("/api/pools/gpus", "/api/pools/{pool}", {"pool": "gpus"}),
        ("/api/pools/tokens", "/api/pools/{pool}", {"pool": "tokens"}),
        ("/api/pools/leases/leases", "/api/pools/{pool}/leases", {"pool": "leases"}),
        ("/api/pools/a/leases/b", "/api/pools/{pool}/leases/{token}", {"pool": "a", "token": "b"}),
        ("/api/pools/a/tokens/tokens", "/api/pools/{pool}/tokens/{token}", {"pool": "a", "token": "tokens"}),
        ("/api/tokens/0", "/api/tokens/{id}", {"id": "0"}),
        ("/v1.2/keep-alive", "/v1.2/keep-alive", {}),
        ("/v1.2/keep-alive/x", "/v1.2/keep-alive/{token}", {"token": "x"}),
        ("/~x_y/tokens/x/", "/~x_y/tokens/{token}/", {"token": "x"}),
        ("/anything", "/{whole}", {"whole": "anything"}),
        # unusual parameters
        ("/api/pools/.", "/api/pools/{pool}", {"pool": "."}),
        ("/api/pools/ ", "/api/pools/{pool}", {"pool": " "}),
        ("/api/pools/{pool}", "/api/pools/{pool}", {"pool": "{pool}"}),
        ("/api/pools/a\nb\0", "/api/pools/{pool}", {"pool": "a\nb\0"}),
        ("/api/pools/\U0001f511|.*", "/api/pools/{pool}", {"pool": "\U0001f511|.*"}),
        ("/api/pools/" + "x" * 16_000, "/api/pools/{pool}", {"pool": "x" * 16_000}),
    ],
)
def test_a_path_has_one_route_and_its_parameters(path: str, template: str, parameters: Mapping[str, str]) -> None:
    assert found(NATIVE, path) == (template, parameters)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "*", "api/pools", "//api/pools", "/api/pools/", "/api//pools", "/api/pools//tokens", "/api/pools/a/",
        "/api/pools/a/tokens/", "/api/pools/a/tokens/b/", "/api/pools/a/b", "/api/pools/a/tokens/b/c", "/API/pools",
        "/api/pools\n/x", "/api/tokens/0/1", "/x/api/pools/a/tokens",
        "/api/pools\n", "/api/tokens/0\n/",
        "/v1x2/keep-alive/x", "/v1.2/keep-alive/", "/~x_y/tokens/x",
    ],
)  # fmt: skip
def test_any_other_path_has_no_route(path: str) -> None:
    """A parameter is not empty, a trailing slash matters, and a dot matches only a dot."""
    assert found(NATIVE, path) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/a", "/a"),
        ("/a/{x}", "/a/{y}"),
        ("/a/{x}", "/a/b"),
        ("/{x}/b", "/a/{y}"),
        ("/{x}", "/a"),
        ("/a/{x}/", "/a/b/"),
        ("/{a}/{b}/c", "/x/{y}/{z}"),
    ],
)
def test_ambiguous_routes_are_an_error_that_names_both(one: str, other: str) -> None:
    for first, second in ((one, other), (other, one)):
        owners = {"dialects.first": table([f"/p{first}"]), "dialects.second": table([f"/p{second}"])}
        with pytest.raises(ConfigError) as refusal:
            refuse_collisions(owners)
        message = str(refusal.value)
        assert message == f"dialects.second and dialects.first: both answer /p{second}; give them other prefixes"


@pytest.mark.parametrize(
    ("one", "other"),
    [("/a", "/a/"), ("/a/{x}", "/a/"), ("/a/{x}", "/a"), ("/a/{x}", "/b/c"), ("/a/{x}/y", "/a/b/z"), ("/A", "/a")],
)
def test_routes_without_a_common_path_are_allowed(one: str, other: str) -> None:
    routes = table([one, other])
    refuse_collisions({"one": routes})
    for template in (one, other):
        path = template.replace("{x}", "1")
        assert found(routes, path) == (template, {"x": "1"} if path != template else {})


@pytest.mark.parametrize(
    ("methods", "allowed"),
    [
        (("GET",), ("GET", "HEAD")),
        (("POST",), ("POST",)),
        (("PUT", "DELETE"), ("PUT", "DELETE")),
    ],
)
async def test_a_route_with_get_also_answers_head(methods: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    answered = []

    async def note(request: Request) -> Response:
        answered.append(request.method)
        return Response()

    async def nothing(*_: object) -> Any:
        """Neither receive nor send."""

    app = Methods(dict.fromkeys(methods, note))
    for method in allowed:
        await app({"type": "http", "method": method}, nothing, nothing)
    assert tuple(answered) == allowed
    with pytest.raises(MethodNotAllowed) as refusal:
        await app({"method": "PATCH"}, nothing, nothing)
    assert refusal.value.allowed == allowed


async def test_a_route_with_get_and_post_refuses_head() -> None:
    app = Methods(handlers_for("GET", "POST"))
    with pytest.raises(MethodNotAllowed) as refused:
        await app({"method": "HEAD"}, cast(Any, None), cast(Any, None))
    assert refused.value.allowed == ("GET", "POST")


RTG, TMS, POOL, PERMITS = "random-token-generator", "token-management-service", "token-pool", "simple-token-implement"
COLLISIONS = {
    "two dialects with one prefix": ({RTG: "/x", TMS: "/x"}, f"dialects.{TMS} and dialects.{RTG}", "/x/keep-alive"),
    "two dialects without a prefix": ({RTG: "", TMS: ""}, f"dialects.{TMS} and dialects.{RTG}", "/keep-alive"),
    "a dialect and a native route": ({PERMITS: "/api"}, f"dialects.{PERMITS} and tokenauth itself", "/api/tokens"),
    "a dialect and our pools": ({RTG: "/api/pools"}, f"dialects.{RTG} and tokenauth itself", "/api/pools/generate"),
    "a dialect inside another": (
        {POOL: "", RTG: "/api/keep_alive"}, f"dialects.{RTG} and dialects.{POOL}", "/api/keep_alive/generate",
    ),
}  # fmt: skip


def dialect_settings(prefixes: Mapping[str, str]) -> str:
    """Return settings that enable dialects under these prefixes, each with its own pool."""
    pools = "".join(f"[pools.{name}]\ncapacity = 1\nprefill = {str(name == PERMITS).lower()}\n" for name in prefixes)
    password = {PERMITS: 'password = "x"\n'}
    return pools + "".join(
        f'[dialects.{name}]\npool = "{name}"\nprefix = "{prefix}"\n{password.get(name, "")}'
        for name, prefix in prefixes.items()
    )


@pytest.mark.parametrize("case", COLLISIONS)
def test_colliding_routes_are_a_configuration_error(case: str) -> None:
    prefixes, names, address = COLLISIONS[case]
    with pytest.raises(ConfigError) as refusal:
        build_app(create_service(loader.parse(dialect_settings(prefixes), {})))
    assert str(refusal.value) == f"{names}: both answer {address}; give them other prefixes"


def test_dialects_without_a_collision_need_no_prefix(tmp_path: Path) -> None:
    config = write_config(tmp_path, dialect_settings({POOL: "", RTG: "", PERMITS: "", TMS: "/v1.2"}))
    with worker(config) as server, server.client() as client:
        expected = {
            ("POST", "/generate"): 200,
            ("POST", "/v1.2/generate-token"): 201,
            ("POST", "/v1x2/generate-token"): 404,
            ("POST", "/api/token_pool"): 200,
            ("POST", "/api/token_pool//"): 404,
            ("GET", "/tokens"): 401,
            ("GET", "/api/tokens"): 401,
            ("GET", "/generate"): 405,
            ("GET", "/issue_token"): 401,
            ("HEAD", "/issue_token"): 405,
        }
        assert {each: client.request(*each).status_code for each in expected} == expected
        assert client.get("/generate").headers["allow"] == "POST"
        assert client.delete("/issue_token").headers["allow"] == "GET, POST"
