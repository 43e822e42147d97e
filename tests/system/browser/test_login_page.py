"""People log in, use an application and log out, in a real Chromium over TLS. A page of another site can do nothing."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, expect

from tests.support.servers import HandClock
from tests.support.servers import log_in as log_in_by_api
from tests.system.browser.gate import DOMAIN, VISITOR, Gate, make_certificate, running

AUTH, APP, OTHER, SIBLING = (f"{name}.{DOMAIN}" for name in ("auth", "app", "other", "sibling"))
COOKIE = "__Secure-tokenauth"

pytestmark = pytest.mark.usefixtures("_gate_asks")


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """Run the proxy in front of everything."""
    with running(Gate(AUTH, make_certificate(tmp_path_factory.mktemp("tls")))) as started:
        yield started


@pytest.fixture(scope="module")
def settings(gate: Gate) -> str:
    """Serve the login page to two applications of the domain; a sibling host is not listed."""
    listed = ", ".join(f'"{gate.origin(host)}"' for host in (APP, OTHER))
    return f"""
[browser]
url = "{gate.origin(AUTH)}"
domain = "{DOMAIN}"
return_to = [{listed}]
[server]
trusted_proxies = ["127.0.0.1"]
"""


@pytest.fixture(scope="module")
def tab(context: BrowserContext) -> Page:
    """Open one tab for all tests: each further tab starts a process."""
    return context.new_page()


@pytest.fixture
def page(tab: Page, context: BrowserContext, gate: Gate) -> Page:
    """Return the tab, without cookies of other tests."""
    context.clear_cookies()
    gate.served.clear()
    gate.hidden_from.clear()
    return tab


def fill_in(page: Page, username: str = "ann", password: str = "ann-secret", remember: bool = False) -> None:
    """Fill in the form as a person does who finds the fields by their labels."""
    page.get_by_label("User name").fill(username)
    page.get_by_label("Password").fill(password)
    page.get_by_label("Stay logged in").set_checked(remember)
    page.get_by_role("button", name="Log in").click()


def log_in(page: Page, gate: Gate, path: str = "/", **more: Any) -> None:
    """Open an application, and log in on the way."""
    page.goto(gate.origin(APP) + path)
    fill_in(page, **more)
    expect(page.get_by_role("heading")).to_have_text(f"Private page of {more.get('username', 'ann')}")


def use_login(context: BrowserContext, client: httpx.Client) -> None:
    """Give the browser the cookie of a login, for a test that is not about logging in."""
    token = log_in_by_api(client, "ann", "ann-secret")
    context.add_cookies(
        [{"name": COOKIE, "value": token, "domain": f".{DOMAIN}", "path": "/", "secure": True, "httpOnly": True}]
    )


def login_cookie(context: BrowserContext) -> Mapping[str, Any] | None:
    """Return the login cookie as the browser keeps it."""
    found = [cookie for cookie in context.cookies() if cookie.get("name") == COOKIE]
    return found[0] if found else None


def test_a_login_leads_back_with_query_and_fragment(page: Page, context: BrowserContext, gate: Gate) -> None:
    address = f"{gate.origin(APP)}/reports/a%2Fb?year=2026&q=a+b#part"
    page.goto(address)
    assert page.url.startswith(f"{gate.origin(AUTH)}/login?rd=")
    expect(page.locator("main")).to_contain_text(f"to continue to {APP}")
    fill_in(page)
    expect(page).to_have_url(address)
    expect(page.get_by_role("heading")).to_have_text("Private page of ann")
    cookie = login_cookie(context)
    assert cookie is not None
    assert re.fullmatch("[A-Za-z0-9]{64}", cookie["value"])
    assert (cookie["domain"], cookie["path"], cookie["expires"]) == (f".{DOMAIN}", "/", -1)
    assert cookie["httpOnly"]
    assert cookie["secure"]
    assert cookie["sameSite"] == "Lax"


def test_one_login_is_enough_for_all_applications(
    page: Page, context: BrowserContext, gate: Gate, client: httpx.Client
) -> None:
    use_login(context, client)
    page.goto(gate.origin(APP))
    page.goto(f"{gate.origin(OTHER)}/x")
    expect(page.get_by_role("heading")).to_have_text("Private page of ann")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("heading")).to_have_text("Private page of ann")
    assert gate.served == ["GET /", "GET /x", "POST /posted"]


def test_a_wrong_password_shows_the_page_again(page: Page, gate: Gate) -> None:
    page.goto(f"{gate.origin(APP)}/x?y#z")
    fill_in(page, password="wrong")
    expect(page.get_by_role("alert")).to_have_text("The user name or the password is wrong.")
    expect(page.get_by_label("User name")).to_have_value("ann")
    expect(page.get_by_label("Password")).to_have_value("")
    expect(page.get_by_label("Password")).to_be_focused()
    fill_in(page)
    expect(page).to_have_url(f"{gate.origin(APP)}/x?y#z")


def test_a_throttled_login_names_the_time_to_wait(page: Page, gate: Gate, client: httpx.Client) -> None:
    wrong = {"username": "nobody", "password": "wrong"}
    for _ in range(6):
        client.post("/api/token", json=wrong, headers={"X-Forwarded-For": VISITOR})
    page.goto(gate.origin(APP))
    fill_in(page, "nobody", "wrong")
    expect(page.get_by_role("alert")).to_contain_text(re.compile(r"Try again in \d+ seconds?\."))


def test_a_remembered_login_survives_the_browser(page: Page, context: BrowserContext, gate: Gate) -> None:
    log_in(page, gate, remember=True)
    cookie = login_cookie(context)
    assert cookie is not None
    assert cookie["expires"] > 0


def test_a_log_out_ends_the_login_in_all_tabs(
    page: Page, context: BrowserContext, gate: Gate, client: httpx.Client
) -> None:
    use_login(context, client)
    page.goto(gate.origin(APP))
    cookie = login_cookie(context)
    assert cookie is not None
    with context.new_page() as other:
        other.goto(f"{gate.origin(OTHER)}/")
        expect(other.get_by_role("heading")).to_have_text("Private page of ann")
        page.get_by_role("link", name="Log out").click()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading")).to_have_text("You are logged out")
        assert login_cookie(context) is None
        other.reload()
        expect(other.get_by_role("heading")).to_have_text("Log in")
    kept = {"name": COOKIE, "value": cookie["value"], "domain": f".{DOMAIN}", "path": "/", "secure": True}
    context.add_cookies([kept])  # type: ignore[list-item]  # a TypedDict
    page.goto(gate.origin(APP))
    expect(page.get_by_role("heading")).to_have_text("Log in")
    assert login_cookie(context) is None, "a cookie that is not valid is deleted"


def test_back_after_a_log_out_shows_nothing_private(page: Page, gate: Gate) -> None:
    log_in(page, gate)
    page.goto(f"{gate.origin(AUTH)}/")
    expect(page.locator("main")).to_contain_text("This browser")
    page.get_by_role("link", name="Log out").click()
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading")).to_have_text("You are logged out")
    for _ in range(3):
        page.go_back()
        expect(page.get_by_role("heading").first).to_have_text(re.compile("Log in|You are logged out|Not logged in"))


def test_two_tabs_can_log_in_one_after_the_other(page: Page, context: BrowserContext, gate: Gate) -> None:
    page.goto(f"{gate.origin(APP)}/one")
    with context.new_page() as other:
        other.goto(f"{gate.origin(APP)}/two")
        fill_in(page)
        expect(page).to_have_url(f"{gate.origin(APP)}/one")
        first = login_cookie(context)
        fill_in(other)
        expect(other).to_have_url(f"{gate.origin(APP)}/two")
    second = login_cookie(context)
    assert first is not None
    assert second is not None
    assert first["value"] != second["value"]
    page.reload()
    expect(page.get_by_role("heading")).to_have_text("Private page of ann")


def test_a_cookie_that_does_not_arrive_is_named(page: Page, gate: Gate) -> None:
    """No loop of redirects: the page names both hosts and waits."""
    gate.hidden_from.add(APP)
    page.goto(f"{gate.origin(APP)}/x")
    fill_in(page)
    expect(page.get_by_role("heading")).to_have_text("You are logged in")
    text = page.locator("main").inner_text()
    assert f"{APP}:{gate.server_port} sends you back" in text
    assert f"the cookie of {AUTH}:{gate.server_port}" in text.replace("\n", " ")
    gate.hidden_from.clear()
    page.get_by_role("link", name="Continue to").click()
    expect(page).to_have_url(f"{gate.origin(APP)}/x")
    expect(page.get_by_role("heading")).to_have_text("Private page of ann")


def test_a_browser_without_cookies_is_told_so(page: Page, context: BrowserContext, gate: Gate) -> None:
    page.goto(f"{gate.origin(APP)}/x")
    context.clear_cookies()
    fill_in(page)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(f"Your browser did not keep the cookie of {AUTH}")
    expect(alert).to_contain_text(APP)


def test_the_page_is_usable_by_keyboard_alone(page: Page, gate: Gate) -> None:
    page.goto(gate.origin(APP))
    expect(page.get_by_label("User name")).to_be_focused()
    page.keyboard.type("ann")
    page.keyboard.press("Tab")
    page.keyboard.type("ann-secret")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_label("Stay logged in")).to_be_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading")).to_have_text("Private page of ann")
    page.goto(f"{gate.origin(AUTH)}/logout")
    expect(page.get_by_role("button", name="Log out")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading")).to_have_text("You are logged out")


def visit_all(page: Page, gate: Gate) -> Iterator[str]:
    """Open every page, and yield its name."""
    auth = gate.origin(AUTH)
    page.goto(f"{auth}/login?rd=https://unlisted.example/")
    yield "login with a note"
    page.goto(f"{gate.origin(APP)}/")
    fill_in(page, password="wrong")
    expect(page.get_by_role("alert")).to_be_visible()
    yield "login with an error"
    fill_in(page)
    page.wait_for_url(f"{gate.origin(APP)}/")
    page.goto(f"{auth}/login?rd={gate.origin(APP)}/")
    yield "logged in already"
    page.goto(f"{auth}/")
    yield "home"
    page.goto(f"{auth}/logout")
    yield "log out"
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading")).to_have_text("You are logged out")
    yield "logged out"


def violations(page: Page, *rules: str) -> list[str]:
    """Return the rules of axe that the page breaks, of these or of all."""
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    return [violation["id"] for violation in Axe().run(page, options=options).response["violations"]]


def test_every_page_is_accessible_small_and_correct(context: BrowserContext, page: Page, gate: Gate) -> None:
    """In both color schemes axe finds nothing. The pages fit into 320 pixels, and none breaks its own policy."""
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        problems.append(message.text)

    seen = []
    context.on("console", note)
    page.set_viewport_size({"width": 320, "height": 480})
    for name in visit_all(page, gate):
        seen.append(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, name
        page.emulate_media(color_scheme="dark")
        assert violations(page, "color-contrast") == [], name
        page.emulate_media(color_scheme="light")
        assert violations(page) == [], name
    context.remove_listener("console", note)
    assert len(seen) == 6
    assert [problem for problem in problems if "status of 401" not in problem] == []
    assert len(problems) >= 1, "the console is recorded: the wrong password was a 401"


def test_axe_would_find_a_mistake(page: Page, gate: Gate) -> None:
    page.goto(f"{gate.origin(AUTH)}/login")
    page.evaluate("document.querySelector('label').remove()")
    assert violations(page) == ["label"]
    page.evaluate("Object.assign(document.querySelector('h1').style, { color: '#777', background: '#888' })")
    assert violations(page, "color-contrast") == ["color-contrast"]


def test_only_navigations_are_redirected(page: Page, context: BrowserContext, gate: Gate, client: httpx.Client) -> None:
    use_login(context, client)
    page.goto(gate.origin(APP))
    context.clear_cookies()
    answer = page.evaluate("fetch('/x').then((answer) => [answer.status, answer.headers.get('x-auth-login')])")
    assert answer[0] == 401
    assert answer[1].startswith(f"{gate.origin(AUTH)}/login?rd=")


_SUBMIT = """([action, fields]) => {
  const form = document.createElement("form");
  Object.assign(form, { method: "POST", action });
  for (const [name, value] of Object.entries(fields))
    form.append(Object.assign(document.createElement("input"), { name, value }));
  document.body.append(form);
  form.submit();
}"""


@pytest.mark.parametrize("action", ["/login", "/logout"])
def test_a_form_of_a_sibling_host_is_refused(
    page: Page, context: BrowserContext, gate: Gate, client: httpx.Client, action: str
) -> None:
    """It is of the same site, so the browser sends the cookies. The login stays valid."""
    use_login(context, client)
    before = login_cookie(context)
    page.goto(f"{gate.origin(SIBLING)}/")
    form = {"username": "bob", "password": "bob-secret", "csrf": "x", "rd": gate.origin(APP)}
    with page.expect_navigation():
        page.evaluate(_SUBMIT, [gate.origin(AUTH) + action, form])
    expect(page.get_by_role("alert")).to_contain_text("another site")
    assert login_cookie(context) == before
    page.goto(gate.origin(APP))
    expect(page.get_by_role("heading")).to_have_text("Private page of ann")


def test_a_form_of_another_site_cannot_use_the_login(page: Page, gate: Gate, tmp_path: Path) -> None:
    """SameSite keeps the cookie back, so the application does not get the request."""
    log_in(page, gate)
    gate.served.clear()
    foreign = tmp_path / "page.html"
    foreign.write_text("<!doctype html><title>foreign</title>")
    page.goto(foreign.as_uri())
    with page.expect_navigation():
        page.evaluate(_SUBMIT, [f"{gate.origin(APP)}/posted", {"x": "y"}])
    expect(page.get_by_role("heading")).to_have_text(re.compile("Log in|You are logged in"))
    assert gate.served == []


def test_a_cookie_tossed_by_a_sibling_is_not_used(
    page: Page, context: BrowserContext, gate: Gate, client: httpx.Client
) -> None:
    """A sibling host can set a second cookie for some path. No one is logged in as the sibling's user there."""
    use_login(context, client)
    page.goto(f"{gate.origin(SIBLING)}/")
    page.evaluate(f"document.cookie = '{COOKIE}=tossed; Domain={DOMAIN}; Path=/login; Secure'")
    assert len([cookie for cookie in context.cookies() if cookie.get("name") == COOKIE]) == 2
    page.goto(f"{gate.origin(AUTH)}/login")
    expect(page.locator(".note")).to_contain_text("two different login cookies")
    expect(page.get_by_role("heading")).to_have_text("Log in")


def test_no_page_can_frame_the_login(page: Page, context: BrowserContext, gate: Gate, client: httpx.Client) -> None:
    use_login(context, client)
    page.goto(gate.origin(APP))
    frame = """(url) => new Promise((done) => {
      const frame = document.createElement("iframe");
      frame.addEventListener("load", () => done());
      frame.src = url;
      document.body.append(frame);
    })"""
    page.evaluate(frame, f"{gate.origin(AUTH)}/logout")
    assert page.frames[-1].url.startswith("chrome-error:")


@pytest.fixture(autouse=True)
def _fresh_time(clock: HandClock) -> None:
    """Expire the failed logins of other tests."""
    clock.advance(25 * 3600)
