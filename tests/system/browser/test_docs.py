"""/docs works in a real Chromium, and loads everything from the service."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, ElementHandle, Error, Page, Route, expect

from tests.support.servers import Server
from tests.system.browser.conftest import Sites
from tests.wire.openapi.configurations import ALL_DIALECTS, with_dialects

_HEADING = ".opblock-summary"

_FRAME = """(url) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.addEventListener("load", () => done(frame));
  frame.src = url;
  document.body.append(frame);
})"""


@pytest.fixture(scope="module")
def settings() -> str:
    """Enable all dialects, so that their operations are shown, too."""
    return with_dialects(**ALL_DIALECTS)


class Visit:
    """A page, its requests, and its errors and warnings."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._own = urlsplit(server.url).netloc
        page.route("**/*", self._record)
        page.on("console", self._log)
        page.on("pageerror", self._fail)

    @property
    def foreign_requests(self) -> list[str]:
        """The requests to other hosts."""
        return [url for url in self.requests if self._is_foreign(url)]

    def _is_foreign(self, url: str) -> bool:
        parts = urlsplit(url)
        return parts.scheme != "data" and parts.netloc != self._own

    def _record(self, route: Route) -> None:
        self.requests.append(route.request.url)
        if self._is_foreign(route.request.url):
            route.abort()
        else:
            route.continue_()

    def _log(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.errors.append(message.text)

    def _fail(self, error: Error) -> None:
        self.errors.append(error.message)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """Open a page."""
    with context.new_page() as opened:
        yield opened


@pytest.fixture(scope="module")
def visit(context: BrowserContext, server: Server) -> Visit:
    """Open /docs once, since it is slow. The tests use it in their order, the last of them with all groups open."""
    page = context.new_page()
    visit = Visit(page, server)
    page.goto(f"{server.url}/docs")
    expect(page.locator(_HEADING).first).to_be_visible()
    return visit


def test_the_page_opens_at_the_group_of_the_login(visit: Visit) -> None:
    opened = visit.page.locator(".opblock-tag[data-is-open=true]")
    expect(opened).to_have_count(1)
    expect(opened).to_have_attribute("data-tag", "Token")
    expect(visit.page.locator(_HEADING).first).to_contain_text("Log in")


def test_without_script_the_page_names_its_document(browser: Browser, server: Server) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{server.url}/docs")
        page.get_by_role("link", name="openapi.json").click()
        expect(page.get_by_text('"openapi"')).to_be_visible()


def test_no_lock_is_closed_before_a_login(visit: Visit) -> None:
    locks = visit.page.locator(".opblock-summary .authorization__btn")
    expect(locks.nth(2)).to_be_visible()
    expect(locks.filter(has_not=visit.page.locator(".unlocked"))).to_have_count(0)


def test_the_example_of_a_refusal_is_folded(visit: Visit) -> None:
    summary = visit.page.locator("[id$=logIn] " + _HEADING)
    summary.click()
    codes = visit.page.locator("[id$=logIn] .responses-table > tbody > tr")
    expect(codes.first).to_have_attribute("data-code", "200")
    expect(codes.first.locator("pre").first).to_contain_text("expiry_time")
    refusal = visit.page.locator("[id$=logIn] .responses-table > tbody > tr[data-code='429']")
    expect(refusal).to_contain_text("Too many failed logins.")
    expect(refusal.locator("pre")).to_be_hidden()
    refusal.get_by_text("Example", exact=True).click()
    expect(refusal.locator("pre")).to_contain_text("too_many_attempts")
    summary.click()
    assert visit.errors == []


@pytest.mark.faults  # slow: tests/wire/openapi/test_examples.py sends the same examples without a browser
def test_the_login_example_and_authorize_work_on_the_page(visit: Visit) -> None:
    """Follows the text at the top of the page: log in with the example, and enter the token."""
    page = visit.page
    with page.expect_response("**/api/token") as logged_in:
        _execute(page, "logIn")
    token = logged_in.value.json()["token"]
    page.locator(".btn.authorize").click()
    entry = page.locator(".auth-container", has_text="Paste the token")
    entry.locator("input").fill(token)
    entry.locator("button.authorize").click()
    page.locator(".btn-done").first.click()
    page.locator(".opblock-tag[data-tag='My tokens']").click()
    with page.expect_response("**/api/me") as answered:
        _execute(page, "getMe")
    assert answered.value.request.headers["x-token"] == token
    shown = page.locator("[id$=getMe] .live-responses-table")
    expect(shown.locator(".response-col_status").last).to_have_text("200")
    expect(shown.locator(".response-col_description").last).to_contain_text('"username": "admin"')
    assert visit.foreign_requests == []
    assert visit.errors == []


def test_the_page_shows_every_operation_and_only_this_site(visit: Visit, client: httpx.Client, server: Server) -> None:
    visit.page.evaluate("document.querySelectorAll('.opblock-tag[data-is-open=false]').forEach((tag) => tag.click())")
    document = client.get("/openapi.json").json()
    tags = [tag["name"] for tag in document["tags"]]
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    expect(visit.page.locator(_HEADING)).to_have_count(len(described))
    shown = visit.page.locator(_HEADING).evaluate_all(
        "all => all.map((each) => [each.querySelector('.opblock-summary-method').textContent,"
        " each.querySelector('.opblock-summary-path').dataset.path])"
    )
    assert {(method, path) for method, path in shown} == described
    assert visit.page.locator(".opblock-tag").evaluate_all("all => all.map((tag) => tag.dataset.tag)") == tags
    assert visit.foreign_requests == []
    assert f"{server.url}/openapi.json" in visit.requests
    assert visit.errors == []


def _execute(page: Page, operation: str) -> None:
    """Send the request of an operation with the example values of the page."""
    shown = page.locator(f"[id$={operation}]")
    shown.locator(_HEADING).click()
    shown.locator(".try-out__btn").click()
    shown.locator(".execute").click()


def test_a_request_to_another_host_is_detected(page: Page, server: Server) -> None:
    """The Content-Security-Policy blocks scripts' requests with an error. Navigation, which it allows, is recorded."""
    visit = Visit(page, server)
    page.goto(f"{server.url}/docs/start.js")
    assert page.evaluate("fetch('http://other.example/').catch((error) => error.name)") == "TypeError"
    assert any("Content Security Policy" in error for error in visit.errors)
    with pytest.raises(Error):
        page.goto("http://other.example/page")
    assert visit.foreign_requests == ["http://other.example/page"]


def test_no_page_of_another_origin_can_frame_it(page: Page, sites: Sites, server: Server) -> None:
    """The same page can frame a site that allows it."""
    page.goto(sites.one.origin("127.0.0.1"))
    frame = page.evaluate_handle(_FRAME, sites.other.origin("127.0.0.1") + "/open").as_element()
    assert frame is not None
    assert _text(frame) == "open"
    with page.expect_console_message(lambda message: "frame-ancestors" in message.text) as console:
        page.evaluate_handle(_FRAME, f"{server.url}/docs")
    assert console.value.type == "error"
    assert page.frames[-1].url.startswith("chrome-error:")


def _text(frame: ElementHandle) -> str:
    content = frame.content_frame()
    assert content is not None
    return content.inner_text("body")
