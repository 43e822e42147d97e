"""What `docs/clients.md` shows is what the examples do, or it works as it stands there."""

import re
from typing import Any

import httpx
import pytest

from tests.support.servers import ROOT
from tokenauth.client import TokenAuth

TEXT = (ROOT / "docs/clients.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
EXAMPLES = [(ROOT / f"examples/{name}_app.py").read_text() for name in ("fastapi", "starlette")]


def taken(snippet: str) -> bool:
    """Whether an example has this snippet, part by part."""
    return any(all(part in example for part in snippet.split("\n\n\n")) for example in EXAMPLES)


def run(word: str) -> dict[str, Any]:
    """Run the one snippet that has a word and is not taken from an example."""
    (snippet,) = [snippet for snippet in SNIPPETS if word in snippet and not taken(snippet)]
    names: dict[str, Any] = {}
    exec(snippet, names)  # noqa: S102
    return names


def test_all_snippets_but_those_that_run_here_are_taken_from_the_examples() -> None:
    assert len(SNIPPETS) == 6
    assert [taken(snippet) for snippet in SNIPPETS].count(False) == 2


async def test_the_order_of_the_middlewares_lets_a_page_ask_and_read_a_refusal() -> None:
    names = run("CORSMiddleware")
    page = {"Origin": "https://app.example.com"}
    asks = {**page, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "X-Token"}
    async with (
        names["tokens"],
        httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://app") as client,
    ):
        assert (await client.options("/", headers=asks)).status_code == 200
        refused = await client.get("/", headers=page)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == page["Origin"]


async def test_the_client_of_another_service_is_made_as_it_says() -> None:
    names = run("TokenAuth")
    auth: TokenAuth = names["auth"]
    await names["stock"].aclose()
    assert next(auth.sync_auth_flow(httpx.Request("GET", "https://stock.example.com/x"))).url.host == "auth.example.com"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)#]+)", TEXT))
def test_a_link_leads_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()
