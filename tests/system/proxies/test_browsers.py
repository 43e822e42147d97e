"""A person uses an application behind each proxy, in a real Chromium over TLS, at the host names of the document."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.support.ports import free_port
from tests.support.servers import serve, worker, write_config
from tests.system.browser.conftest import FLAGS, chromium_path
from tests.system.proxies import test_one_host as one_host
from tests.system.proxies.conftest import FIRST
from tests.system.proxies.peers import Arrived, Relay
from tests.system.proxies.running import PRODUCTS, Proxy, running
from tests.system.proxies.test_cookies import COOKIE, KEEP_COOKIES

APP = "https://app.example.com"
AUTH = "https://auth.example.com"

_FETCH = """([path, init]) => fetch(path, init).then(
  async (answer) => [answer.status, answer.headers.get("X-Auth-Login"), await answer.text()]
)"""

_WEBSOCKET = """(path) => new Promise((done) => {
  const socket = new WebSocket(new URL(path, location).href.replace("http", "ws"));
  socket.onopen = () => socket.send("hello");
  socket.onmessage = (message) => { socket.close(); done(message.data); };
  socket.onerror = () => done("refused");
})"""


@pytest.fixture(scope="module")
def port_443() -> Iterator[Relay]:
    """Listen in place of port 443 of all hosts of example.com. It leads to one proxy at a time."""
    with Relay(0) as relay:
        yield relay


@pytest.fixture(scope="module")
def browser(port_443: Relay) -> Iterator[Browser]:
    address = f"127.0.0.1:{port_443.port}"
    flags = [*FLAGS, f"--host-resolver-rules=MAP *.example.com {address}"]
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=chromium_path(),
            args=flags,
            ignore_default_args=["--disable-back-forward-cache"],  # people's browsers have it, too
        ) as chromium,
    ):
        yield chromium


@pytest.fixture
def context(browser: Browser, proxy: Proxy, port_443: Relay) -> Iterator[BrowserContext]:
    """Open a browser without cookies, whose requests go to the proxy."""
    with port_443.leading_to(proxy.tls_port), browser.new_context(ignore_https_errors=True) as opened:
        yield opened


@pytest.mark.parametrize(
    "proxy",
    [name if name == FIRST else pytest.param(name, marks=pytest.mark.faults) for name in PRODUCTS],
    indirect=True,
)
def test_a_person_uses_an_application(context: BrowserContext, proxy: Proxy) -> None:
    """From the first visit to the log-out. Fetches of someone who is not logged in get 401, not a login page."""
    with context.new_page() as page:
        proxy.upstream.take()
        address = f"{APP}/dash/a%20b?year=2026&q=a+b%2Fc#part"
        page.goto(address)
        assert page.url.startswith(f"{AUTH}/login?rd=")
        log_in(page)
        expect(page).to_have_url(address)
        expect(page.get_by_role("heading")).to_have_text("Private page of ann")
        [request] = _take(proxy)
        assert request.target == b"/dash/a%20b?year=2026&q=a+b%2Fc"

        context.add_cookies([{"name": "own", "value": "kept", "domain": "app.example.com", "path": "/"}])
        assert page.evaluate(_FETCH, ["/x?y=z", {}]) == [200, None, "in"]
        assert page.evaluate(_FETCH, ["/x", {"method": "POST", "body": "text"}]) == [200, None, "in"]
        assert page.evaluate(_FETCH, ["/reports/x", {"method": "DELETE"}]) == [200, None, "in"]
        assert page.evaluate(_WEBSOCKET, "/ws/x?y=z") == "hello"
        assert page.evaluate(_WEBSOCKET, "/x") == "refused"
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("heading")).to_have_text("Private page of ann")
        requests = _take(proxy)
        targets = [(request.method + b" " + request.target).decode() for request in requests]
        assert targets[:4] == ["GET /x?y=z", "POST /x", "DELETE /reports/x", "GET /ws/x?y=z"]
        assert targets[-1] == "POST /posted"
        assert [request.body for request in requests if request.method == b"POST"] == [b"text", b"x=y"]
        [token] = [str(each.get("value")) for each in context.cookies(AUTH) if each.get("name") == COOKIE]
        for request in requests:
            assert request.values("X-Auth-User") == [b"ann"], request
            assert request.values("X-Forwarded-Proto") in ([b"https"], [b"wss"]), request
            sent = b"; ".join(request.values("Cookie"))
            assert b"own=kept" in sent
            assert (token.encode() in sent) is (proxy.name in KEEP_COOKIES)

        with context.new_page() as other:
            other.goto(f"{AUTH}/logout")
            other.get_by_role("button", name="Log out").click()
            expect(other.get_by_role("heading")).to_have_text("You are logged out")
        status, login_page, _ = page.evaluate(_FETCH, ["/x", {}])
        assert (status, login_page.partition("?rd=")[0]) == (401, f"{AUTH}/login")
        assert page.evaluate(_WEBSOCKET, "/ws") == "refused"
        page.goto(f"{APP}/x")
        expect(page.get_by_role("heading")).to_have_text("Log in")
        assert _take(proxy) == []
        context.add_cookies([{"name": COOKIE, "value": token, "domain": ".example.com", "path": "/", "secure": True}])
        page.goto(f"{APP}/x")
        expect(page.get_by_role("heading")).to_have_text("Log in")
        assert _take(proxy) == []


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.faults) for name in PRODUCTS if name != FIRST)]
)
def test_it_can_be_tried_on_this_machine(browser: Browser, tmp_path: Path, name: str) -> None:
    """Over http, at localhost, as docs/browser-login.md says."""
    port, own = free_port(), free_port()
    settings = f"""
[server]
trusted_proxies = ["127.0.0.1"]
[browser]
url = "http://localhost:{own}"
return_to = ["http://localhost:{port}"]
"""
    with serve(write_config(tmp_path, settings), "--port", str(own)) as issuer:
        assert issuer.port == own
        with running(name, tmp_path / name, own, port=port) as proxy, browser.new_context() as context:
            page = context.new_page()
            address = f"http://localhost:{port}/x?y=z#part"
            page.goto(address)
            log_in(page)
            expect(page).to_have_url(address)
            expect(page.get_by_role("heading")).to_have_text("Private page of ann")
            page.get_by_role("button", name="Send").click()
            expect(page.get_by_role("heading")).to_have_text("Private page of ann")
            for target in ("/y", "/z"):
                page.goto(f"http://localhost:{port}{target}")
                expect(page.get_by_role("heading")).to_have_text("Private page of ann")
            page.goto(f"http://localhost:{own}/logout")
            page.get_by_role("button", name="Log out").click()
            expect(page.get_by_role("heading")).to_have_text("You are logged out")
            _take(proxy)
            page.go_back()
            expect(page.get_by_role("heading")).to_have_text("Not logged in")
            for _ in ("/z", "/y"):
                page.go_back()
                expect(page.get_by_role("heading")).to_have_text("Log in")
            page.reload()
            expect(page.get_by_role("heading")).to_have_text("Log in")
            page.goto(address)
            expect(page.get_by_role("heading")).to_have_text("Log in")
            assert _take(proxy) == []


@pytest.mark.faults
def test_login_page_and_application_share_a_host(browser: Browser, port_443: Relay, tmp_path: Path) -> None:
    """With nginx, and a cookie that no other host can set."""
    settings = f'[server]\ntrusted_proxies = ["127.0.0.1"]\n[browser]\nurl = "{APP}"'
    with (
        worker(write_config(tmp_path, settings)) as issuer,
        running("nginx", tmp_path / "nginx", issuer.port, one_host.files()) as proxy,
        port_443.leading_to(proxy.tls_port),
        browser.new_context(ignore_https_errors=True) as context,
    ):
        page = context.new_page()
        for target in ("/x?y=z#part", "/login-x"):
            page.goto(APP + target)
            log_in(page)
            expect(page).to_have_url(APP + target)
            [request] = _take(proxy)
            assert request.values("X-Auth-User") == [b"ann"]
            assert b"tokenauth=" not in b"".join(request.values("Cookie"))
            assert "__Host-tokenauth" in {cookie.get("name") for cookie in context.cookies()}
            page.goto(f"{APP}/logout")
            page.get_by_role("button", name="Log out").click()
            expect(page.get_by_role("heading")).to_have_text("You are logged out")
            assert _take(proxy) == []


def log_in(page: Page) -> None:
    page.get_by_label("User name").fill("ann")
    page.get_by_label("Password").fill("ann-secret")
    page.get_by_role("button", name="Log in").click()


def _take(proxy: Proxy) -> list[Arrived]:
    return [request for request in proxy.upstream.take() if request.target != b"/favicon.ico"]
