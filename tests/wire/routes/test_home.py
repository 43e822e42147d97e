"""GET /: a page for browsers, and JSON for all others."""

import re
from pathlib import Path

import httpx
import pytest

from tests.support.browsing import text_of
from tests.support.servers import worker, write_config

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_programs_get_json(client: httpx.Client, accept: str) -> None:
    answer = client.get("/", headers={"Accept": accept})
    assert answer.headers["content-type"] == "application/json"
    assert answer.text.endswith("}\n")
    document = answer.json()
    assert document.pop("service") == "tokenauth"
    assert document == {"docs": "/docs", "openapi": "/openapi.json", "health": "/readyz", "console": "/console"}
    assert [client.get(path).status_code for path in document.values()] == [200] * 4


def test_browsers_get_a_page_with_links_that_work(client: httpx.Client) -> None:
    answer = client.get("/", headers=BROWSER)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "This service logs users in" in text_of(answer.text)
    assert "$" not in text_of(answer.text)
    links = re.findall(r'<a [^>]*href="([^"]*)"', answer.text)
    assert links == ["console", "docs", "openapi.json", "readyz"]
    assert [client.get(f"/{link}").status_code for link in links] == [200] * 4


def test_without_docs_nothing_leads_to_them(tmp_path: Path) -> None:
    with worker(write_config(tmp_path, "[server]\ndocs = false")) as server, server.client() as client:
        page, document = client.get("/", headers=BROWSER), client.get("/")
    assert re.findall(r'href="([^"]*)"', page.text) == ["data:,", "console", "readyz"]
    assert document.json() == {"service": "tokenauth", "health": "/readyz", "console": "/console"}


def test_programs_are_told_the_login_page(tmp_path: Path) -> None:
    login = '[browser]\nurl = "http://localhost:8000"'
    with worker(write_config(tmp_path, login)) as server, server.client() as client:
        assert client.get("/").json()["login"] == "http://localhost:8000/login"
        assert client.get("/", headers=BROWSER).headers["location"] == "/login"
