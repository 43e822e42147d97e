"""RouteIndex: what it answers ahead of the router, and what it leaves to the router."""

import pytest
from starlette.types import Receive, Scope, Send

from tokenauth.web.route_index import RouteIndex
from tokenauth.web.routing import Endpoint, Route


class Answer(Endpoint):
    """Notes which route it answers, and the parameters of its path."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["found"] = scope["route"].path, scope.get("path_params", {})

    def at_once(self, scope: Scope) -> None:
        """Answer nothing at once."""


async def router(scope: Scope, receive: Receive, send: Send) -> None:
    assert not scope.keys() & {"route", "path_params"}
    scope["found"] = "router", {}


PATHS = ("/here", "/pools/{pool}", "/pools/{pool}/leases", "/pools/{pool}/leases/{token}", "/{any}/at/{all}")
INDEX = RouteIndex(
    router,
    [Route("/pools/{pool}/requests/{id:path}", {"GET": Answer()}), *(Route(path, {"GET": Answer()}) for path in PATHS)],
)


async def receive() -> dict[str, object]:
    raise AssertionError


async def send(message: object) -> None:
    raise AssertionError


async def find(path: str, method: str = "GET") -> tuple[str, dict[str, str]]:
    scope = {"type": "http", "method": method, "path": path}
    await INDEX(scope, receive, send)
    found: tuple[str, dict[str, str]] = scope["found"]  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("path", "route", "parameters"),
    [
        ("/here", "/here", {}),
        ("/pools/one", "/pools/{pool}", {"pool": "one"}),
        ("/pools/one/leases", "/pools/{pool}/leases", {"pool": "one"}),
        ("/pools/one/leases/a\nb", "/pools/{pool}/leases/{token}", {"pool": "one", "token": "a\nb"}),
        ("/pools/at/two", "/{any}/at/{all}", {"any": "pools", "all": "two"}),
    ],
)
async def test_a_path_and_its_parameters_are_found(path: str, route: str, parameters: dict[str, str]) -> None:
    assert await find(path) == (route, parameters)


@pytest.mark.parametrize(
    "path", ["/", "/here/", "/pools/", "/pools//leases", "/pools/one/leases/", "/pools/one/requests/a/b", "/pools/a/b"]
)
async def test_any_other_path_is_left_to_the_router(path: str) -> None:
    assert await find(path) == ("router", {})


async def test_other_methods_are_left_to_the_router() -> None:
    assert await find("/pools/one/leases", "PUT") == ("router", {})
