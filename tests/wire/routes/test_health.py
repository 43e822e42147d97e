"""The health routes need no token and ignore an invalid one."""

import httpx
import pytest

ROUTES = {"/healthz": {"status": "ok"}, "/readyz": {"status": "ready"}}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("headers", [{}, {"X-Token": "not a token"}, {"X-Token": "a", "Authorization": "Bearer b"}])
def test_a_server_that_can_serve_is_ready(client: httpx.Client, route: str, headers: dict[str, str]) -> None:
    answer = client.get(route, headers=headers)
    assert (answer.status_code, answer.json()) == (200, ROUTES[route])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("route", ROUTES)
def test_head_is_get_without_the_body(client: httpx.Client, route: str) -> None:
    head, get = client.head(route), client.get(route)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_405_with_an_allow_header(client: httpx.Client, route: str, method: str) -> None:
    answer = client.request(method, route)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert answer.json()["error"] == "method_not_allowed"
