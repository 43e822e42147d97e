"""The code in docs/clients.md is that of the examples, or runs here."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.servers import ROOT, USERS, Server, log_in, worker, write_config
from tokenauth.client import TokenAuth

TEXT = (ROOT / "docs/clients.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
EXAMPLES = [(ROOT / f"examples/{name}_app.py").read_text() for name in ("fastapi", "starlette")]


def in_an_example(snippet: str) -> bool:
    """Return whether an example has each part of this snippet."""
    return any(all(part in example for part in snippet.split("\n\n\n")) for example in EXAMPLES)


def run(word: str, url: str = "") -> dict[str, Any]:
    """Run the one snippet that has this word and is not in an example."""
    (snippet,) = [snippet for snippet in SNIPPETS if word in snippet and not in_an_example(snippet)]
    names: dict[str, Any] = {}
    exec(snippet.replace("http://127.0.0.1:8000", url), names)  # noqa: S102
    return names


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a worker whose user ann has the scope `reports`."""
    users = USERS.replace('"read"', '"reports"')
    with worker(write_config(tmp_path_factory.mktemp("server"), users=users)) as running:
        yield running


def test_other_snippets_are_from_the_examples() -> None:
    assert len(SNIPPETS) == 7
    assert [in_an_example(snippet) for snippet in SNIPPETS].count(False) == 6


@pytest.mark.parametrize("text", [TEXT, *EXAMPLES], ids=["clients.md", "fastapi", "starlette"])
def test_each_uvicorn_command_chooses_h11(text: str) -> None:
    commands = re.findall(r"uvicorn (?:--http|examples\.).*", text)
    assert commands
    assert [command for command in commands if "--http h11" not in command] == []


async def test_the_starlette_service_is_complete(server: Server) -> None:
    app = run("async def greeting", server.url)["app"]
    with server.client() as client:
        tokens = {
            name: log_in(client, name, password) for name, password in (("admin", "admin"), ("ann", "ann-secret"))
        }
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as inside,
    ):
        assert [(await inside.get(path)).status_code for path in ("/greeting", "/healthz")] == [401, 200]
        greeted = await inside.get("/greeting", headers={"X-Token": tokens["ann"]})
        assert greeted.json() == {"hello": "ann"}
        reports = [await inside.get("/report", headers={"X-Token": token}) for token in tokens.values()]
        assert [report.status_code for report in reports] == [200, 403]


async def test_the_fastapi_dependency_passes_the_user_on(server: Server) -> None:
    app = run("FastAPI", server.url)["app"]
    with server.client() as client:
        token = log_in(client, "ann", "ann-secret")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as inside,
    ):
        assert (await inside.get("/orders")).status_code == 401
        assert (await inside.get("/orders", headers={"X-Token": token})).json() == {"for": "ann"}
        schema = (await inside.get("/openapi.json")).json()
    assert schema["paths"]["/orders"]["get"]["security"] == [{"APIKeyHeader": []}], "/docs has the button"


async def test_cors_outside_answers_preflight_and_marks_401() -> None:
    names = run("CORSMiddleware")
    page = {"Origin": "https://app.example.com"}
    preflight = {**page, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "X-Token"}
    async with (
        names["tokens"],
        httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://app") as client,
    ):
        assert (await client.options("/", headers=preflight)).status_code == 200
        refused = await client.get("/", headers=page)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == page["Origin"]


async def test_the_documented_client_is_created() -> None:
    names = run("TokenAuth")
    auth: TokenAuth = names["auth"]
    await names["stock"].aclose()
    assert next(auth.sync_auth_flow(httpx.Request("GET", "https://stock.example.com/x"))).url.host == "auth.example.com"


def test_the_function_for_any_language_works(server: Server) -> None:
    token_is_valid = run("urllib", server.url)["token_is_valid"]
    with server.client() as client:
        token = log_in(client)
    assert token_is_valid(token)
    assert not token_is_valid(token[::-1])
    assert not token_is_valid("a\r\nb")


async def test_an_app_on_the_same_database_is_guarded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENAUTH_CONFIG", str(server.log.parent / "config.toml"))
    names = run("create_service")
    app = names["app"]
    with server.client() as client:
        tokens = [log_in(client), log_in(client, "ann", "ann-secret")]
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as inside,
        ):

            async def status(token: str) -> int:
                return (await inside.get("/reports", headers={"X-Token": token})).status_code

            assert [await status(token) for token in tokens] == [403, 200]
            await asyncio.to_thread(client.delete, "/api/token", headers={"X-Token": tokens[1]})
            assert await status(tokens[1]) == 401
