"""A page of an allowed origin logs in, calls and logs out. One of another origin can read and do nothing."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Error, Frame, Page

from tests.support.servers import Server, log_in, probe
from tests.system.browser.conftest import Sites
from tests.system.browser.sites import REFUSED, ask

LOG_IN = "([username, password]) => logIn(username, password)"
WHO_AM_I = "(token) => whoAmI(token)"
LOG_OUT = "async (token) => { const answer = await logOut(token); return [answer.status, await answer.json()]; }"

LOGIN = '{"username": "admin", "password": "admin"}'
FORMS = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")

_SEND = """async ([text, type]) => {
  const body = new Blob([text], { type });
  const answer = await fetch(`${API}/api/token`, { method: "POST", mode: "no-cors", body });
  return [answer.type, await answer.text()];
}"""

_SUBMIT = """([name, value]) => {
  const form = document.createElement("form");
  Object.assign(form, { method: "POST", action: `${API}/api/token`, enctype: "text/plain" });
  form.append(Object.assign(document.createElement("input"), { name, value }));
  document.body.append(form);
  form.submit();
}"""


@pytest.fixture(scope="module")
def tab(context: BrowserContext) -> Page:
    """Open one page for all tests. Each test navigates it."""
    return context.new_page()


@pytest.fixture
def page(tab: Page) -> Page:
    """Return the page without cookies."""
    tab.context.clear_cookies()
    return tab


@pytest.fixture(params=["by_address", "by_name"])
def listed(request: pytest.FixtureRequest, sites: Sites, page: Page) -> Page:
    """Open the page under each allowed origin."""
    page.goto(sites.listed[request.param])
    return page


@pytest.fixture
def allowed(sites: Sites, page: Page) -> Page:
    """Open the page under one allowed origin."""
    page.goto(sites.listed["by_address"])
    return page


@pytest.fixture(params=["another_name", "another_port", "file", "sandbox"])
def foreign(request: pytest.FixtureRequest, page: Page, sites: Sites, tmp_path: Path) -> Frame:
    """Open the page under an origin that is not allowed, or is "null"."""
    if request.param == "sandbox":
        page.goto(f"{sites.listed['by_address']}/framed")
        return page.main_frame.child_frames[0]
    if request.param == "file":
        path = tmp_path / "page.html"
        path.write_text(sites.one.page)
        page.goto(path.as_uri())
    else:
        page.goto(sites.unlisted[request.param])
    return page.main_frame


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


def message(page: Page, username: object, password: object) -> str:
    """Try to log in, and return the message of the error that the script throws."""
    with pytest.raises(Error) as caught:
        page.evaluate(LOG_IN, [username, password])
    found = re.search(r"Error: (.+)", caught.value.message)
    assert found is not None
    return found[1]


def served(server: Server, client: httpx.Client) -> list[tuple[str, str]]:
    """List the requests in the log. The request sent here ensures that all earlier ones are logged."""
    assert client.get("/healthz").status_code == 200
    logged = ((line["method"], line["route"]) for line in server.events("request"))
    return [line for line in logged if line[1] != "/healthz"]


def attempts(server: Server) -> int:
    """Count the login attempts, successful or not."""
    return sum(len(server.events(name)) for name in ("token_issued", "login_failed", "login_refused"))


def test_a_page_logs_in_calls_probes_and_logs_out(listed: Page, server: Server) -> None:
    token = listed.evaluate(LOG_IN, ["ann", "ann-secret"])
    assert re.fullmatch("[A-Za-z0-9]{64}", token)
    me = listed.evaluate(WHO_AM_I, token)
    assert (me["username"], me["scopes"]) == ("ann", ["read", "write"])
    probed = ask(listed.main_frame, "/api/token", headers={"X-Token": token})
    assert (probed["status"], probed["body"]) == (200, f'{{"valid":true,"expiry_time":{me["expiry_time"]}}}\n')
    with server.client() as client:
        assert probe(client, token)
        assert listed.evaluate(LOG_OUT, token) == [200, {"valid": False, "expiry_time": None}]
        assert not probe(client, token)
    assert listed.evaluate(WHO_AM_I, token) is None
    assert '"valid":false' in ask(listed.main_frame, "/api/token", headers={"X-Token": token})["body"]


def test_a_page_leases_from_a_pool_and_ends_its_logins(allowed: Page) -> None:
    token, another = (allowed.evaluate(LOG_IN, ["ann", "ann-secret"]) for _ in range(2))
    bearer = {"Authorization": f"Bearer {token}"}
    sending = {**bearer, "Content-Type": "application/json"}
    lease = ask(allowed.main_frame, "/api/pools/permits/leases", method="POST", headers=sending, body='{"holder": "p"}')
    assert lease["status"] == 201
    leased = re.findall(r'"token":"(.+?)"', lease["body"])[0]
    done = [
        ask(allowed.main_frame, path, method=method, headers=headers)["status"]
        for method, path, headers in [
            ("PUT", f"/api/pools/permits/leases/{leased}", bearer),
            ("DELETE", f"/api/pools/permits/leases/{leased}", {"X-Token": token}),
            ("DELETE", f"/api/pools/permits/leases/{leased}", bearer),
            ("DELETE", "/api/tokens?keep=current", {"X-Token": token}),
            ("GET", "/api/me", {"X-Token": another}),
            ("GET", "/api/me", bearer),
        ]
    ]
    assert done == [200, 204, 409, 200, 401, 200]


def test_a_page_reads_a_wrong_password_and_the_wait(allowed: Page, server: Server) -> None:
    messages = [message(allowed, "ann", f"wrong {number}") for number in range(6)]
    with server.client() as client:
        refused = client.post("/api/token", json={"username": "ann", "password": "ann-secret"})
    assert refused.status_code == 429
    assert "password" in message(allowed, "ann", 7), "must name the invalid field"
    assert messages == ["Wrong name or password."] * 5 + [f"Try again in {refused.headers['Retry-After']} seconds."]


def test_a_page_reads_the_wait_while_the_store_is_down(allowed: Page, server: Server, directory: Path) -> None:
    with closing(sqlite3.connect(directory / "tokenauth.db", isolation_level=None)) as database:
        database.execute("ALTER TABLE tokens RENAME TO elsewhere")
        try:
            shown = message(allowed, "ann", "ann-secret")
        finally:
            database.execute("ALTER TABLE elsewhere RENAME TO tokens")
    assert re.fullmatch(r"Try again in \d+ seconds\.", shown)


def test_a_page_can_read_why_it_is_refused(allowed: Page) -> None:
    answers = [ask(allowed.main_frame, "/api/me", headers=headers) for headers in ({}, {"X-Token": "x" * 64})]
    assert [answer["status"] for answer in answers] == [401, 401]
    assert [answer["headers"]["www-authenticate"] for answer in answers] == [
        'Bearer realm="tokenauth"',
        'Bearer realm="tokenauth", error="invalid_token"',
    ]


def test_a_page_may_send_only_what_the_service_uses(allowed: Page) -> None:
    """The browser refuses cookies, other headers and other methods."""
    surplus: list[dict[str, Any]] = [{"credentials": "include"}, {"headers": {"X-Other": "x"}}, {"method": "PATCH"}]
    assert [ask(allowed.main_frame, "/api/token?token=x", **init) for init in surplus] == [REFUSED] * 3
    assert ask(allowed.main_frame, "/api/token?token=x")["status"] == 200


def test_a_page_of_the_same_origin_needs_no_cors(page: Page, sites: Sites) -> None:
    """Also no cookie is set. The browser would store it here, unlike for a page of another origin."""
    page.goto(f"{sites.unlisted['another_port']}/behind")
    token = page.evaluate(LOG_IN, ["ann", "ann-secret"])
    assert page.evaluate(WHO_AM_I, token)["username"] == "ann"
    assert page.evaluate(LOG_OUT, token)[0] == 200
    assert page.evaluate(WHO_AM_I, token) is None
    assert message(page, "ann", "wrong") == "Wrong name or password."
    assert page.context.cookies() == []


def refusal(frame: Frame, path: str, **init: Any) -> str:
    """Fetch from a page something that the browser blocks. Return its message on the console."""

    def is_refusal(message: ConsoleMessage) -> bool:
        return message.text.startswith("Access to fetch")

    with frame.page.expect_console_message(is_refusal) as console:
        assert ask(frame, path, **init) == REFUSED, path
    return console.value.text


def test_a_foreign_page_reads_no_answer(foreign: Frame, sites: Sites, client: httpx.Client) -> None:
    """It cannot even distinguish a valid token. It can read what allows any origin."""
    token = log_in(client)
    for path in (f"/api/token?token={token}", "/api/token?token=x", "/api/token", "/api/me", "/healthz", "/nothing"):
        assert "blocked by CORS policy: No 'Access-Control-Allow-Origin' header" in refusal(foreign, path)
    assert ask(foreign, f"{sites.one.origin('127.0.0.1')}/open")["body"] == "open"


def test_no_preflighted_foreign_request_is_sent(foreign: Frame, server: Server, client: httpx.Client) -> None:
    token = log_in(client, "ann", "ann-secret")
    mine = {"X-Token": token}
    lease = client.post("/api/pools/permits/leases", headers=mine).json()["token"]
    before = served(server, client)
    sent: list[tuple[str, str, dict[str, str], str | None]] = [
        ("POST", "/api/token", {"Content-Type": "application/json"}, LOGIN),
        ("GET", "/api/token", mine, None),
        ("GET", "/api/me", mine, None),
        ("GET", "/api/me", {"Authorization": f"Bearer {token}"}, None),
        ("POST", "/api/pools/permits/leases", mine, None),
        ("PUT", f"/api/pools/permits/leases/{lease}", mine, None),
        ("DELETE", f"/api/pools/permits/leases/{lease}", mine, None),
        ("DELETE", "/api/tokens", mine, None),
        ("DELETE", "/api/token", {}, token),
        ("DELETE", f"/api/token?token={token}", {}, None),
    ]
    for method, path, headers, body in sent:
        init = {"method": method, "headers": headers} | ({} if body is None else {"body": body})
        assert "blocked by CORS policy: Response to preflight request" in refusal(foreign, path, **init)
    after = served(server, client)
    assert after[: len(before)] == before
    assert {method for method, _ in after[len(before) :]} == {"OPTIONS"}
    assert probe(client, token)
    assert len(client.get("/api/tokens", headers=mine).json()["tokens"]) == 1
    assert client.delete(f"/api/pools/permits/leases/{lease}", headers=mine).status_code == 204


def test_a_foreign_login_without_preflight_is_not_tried(page: Page, sites: Sites, server: Server) -> None:
    """Browsers send bodies of these types, or without a type, without a preflight. They drop other types."""
    page.goto(sites.unlisted["another_name"])
    counts = {}
    for kind in (*FORMS, "application/json", ""):
        before = attempts(server)
        assert page.evaluate(_SEND, [LOGIN, kind]) == ["opaque", ""]
        counts[kind] = attempts(server) - before
    assert counts == dict.fromkeys(counts, 0)


def test_no_form_of_a_foreign_page_logs_in(page: Page, sites: Sites, server: Server) -> None:
    """Browsers send forms to any origin, and a form of type text/plain can contain JSON."""
    page.goto(sites.unlisted["another_name"])
    before = attempts(server)
    with page.expect_navigation() as navigation:
        page.evaluate(_SUBMIT, [LOGIN[:-1] + ', "more": "', '"}'])
    assert navigation.value is not None
    assert (navigation.value.url, navigation.value.status) == (f"{server.url}/api/token", 415)
    assert attempts(server) == before
