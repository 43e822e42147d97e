"""Without [browser] there is no login page, and /auth knows no cookie."""

import httpx
import pytest

from tests.support.servers import log_in


@pytest.mark.parametrize("path", ["/login", "/logout"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_pages_do_not_exist(client: httpx.Client, path: str, method: str) -> None:
    assert client.request(method, path).status_code == 404


@pytest.mark.parametrize("query", ["cookie", "cookie&login=redirect", "header=x-token"])
def test_the_words_for_browsers_are_403(client: httpx.Client, query: str) -> None:
    token = log_in(client)
    answer = client.get(f"/auth?{query}", headers={"X-Token": token})
    assert answer.status_code == 403
    assert "browser.url" in answer.json()["error_description"]


@pytest.mark.parametrize("name", ["tokenauth", "__Host-tokenauth", "__Secure-tokenauth"])
def test_no_cookie_is_read(client: httpx.Client, name: str) -> None:
    answer = client.get("/auth?cookie", headers={"Cookie": f"{name}={log_in(client)}"})
    assert answer.status_code == 401
    assert not {"set-cookie", "x-auth-login"} & set(answer.headers)
    console = {"X-Tokenauth-Console": "1", "Sec-Fetch-Site": "same-origin", "Cookie": f"{name}={log_in(client)}"}
    assert client.get("/api/me", headers=console).json()["error"] == "token_required"
