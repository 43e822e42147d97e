"""The module for web pages: any page may load it, browsers keep it, and it costs nothing when it has not changed."""

from pathlib import Path

import httpx
import pytest

import tokenauth.web

LISTED, OTHER = "https://app.example.com", "https://other.example"
MEDIA_TYPES = {"/tokenauth.js": "text/javascript; charset=utf-8", "/tokenauth.d.ts": "text/plain; charset=utf-8"}


@pytest.fixture(scope="module")
def settings() -> str:
    """Allow one origin to call the API, and switch off what can be."""
    return f'[server]\ncors_origins = ["{LISTED}"]\ndocs = false'


@pytest.fixture(params=MEDIA_TYPES)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_shipped_file_is_sent_with_its_type(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA_TYPES[path])
    assert answer.content == (Path(tokenauth.web.__path__[0]) / "pages" / path[1:]).read_bytes()


@pytest.mark.parametrize("origin", ["", LISTED, OTHER, "null"])
def test_pages_of_any_origin_may_load_it(client: httpx.Client, path: str, origin: str) -> None:
    """Also while another browser, of another origin, has put its answer into a shared cache."""
    answer = client.get(path, headers={"Origin": origin} if origin else {})
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert answer.headers["cache-control"] == "public, max-age=300"
    assert not {"vary", "access-control-allow-credentials", "set-cookie"} & set(answer.headers)


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', '"other" , W/{}'])
def test_a_browser_that_has_it_gets_304(client: httpx.Client, path: str, form: str) -> None:
    complete = client.get(path)
    answer = client.get(path, headers={"If-None-Match": form.format(complete.headers["etag"])})
    assert (answer.status_code, answer.content) == (304, b"")
    for name in ("etag", "cache-control", "access-control-allow-origin", "cross-origin-resource-policy"):
        assert answer.headers[name] == complete.headers[name]


@pytest.mark.parametrize("condition", ['"other"', "", "x" * 1000, ",,,", '"'])
def test_a_browser_with_another_version_gets_it_whole(client: httpx.Client, path: str, condition: str) -> None:
    assert client.get(path, headers={"If-None-Match": condition}).content == client.get(path).content


def test_the_two_files_have_different_etags(client: httpx.Client) -> None:
    assert len({client.get(path).headers["etag"] for path in MEDIA_TYPES}) == 2


def test_head_has_the_headers_and_no_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert {**head.headers, "date": ""} == {**get.headers, "date": ""}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_405(client: httpx.Client, path: str, method: str) -> None:
    answer = client.request(method, path, headers={"Origin": LISTED, "Access-Control-Request-Method": "GET"})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/tokenauth.js/", "/tokenauth.j", "/tokenauth.mjs", "/pages/tokenauth.js"])
def test_there_is_no_other_file(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_no_other_answer_allows_all_origins(client: httpx.Client) -> None:
    for path in ("/api/token?token=x", "/api/me", "/healthz", "/tokenauth.txt"):
        for origin in (LISTED, OTHER):
            assert client.get(path, headers={"Origin": origin}).headers.get("access-control-allow-origin") != "*"
