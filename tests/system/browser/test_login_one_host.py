"""The login page and the application at one host: over TLS without a domain, and over http on this machine."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.system.browser.gate import DOMAIN, Gate, make_certificate, running

HOSTS = {f"app.{DOMAIN}": "__Host-tokenauth", "localhost": "tokenauth"}
"""The cookie at each host. tests/system/proxies/test_browsers.py uses localhost, too: here it is for `make faults`."""

pytestmark = pytest.mark.usefixtures("_gate_asks")


@pytest.fixture(scope="module", params=[f"app.{DOMAIN}", pytest.param("localhost", marks=pytest.mark.faults)])
def gate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """Run the proxy. Paths below /app are the application's."""
    secure = request.param != "localhost"
    certificate = make_certificate(tmp_path_factory.mktemp("tls")) if secure else None
    with running(Gate(request.param, certificate)) as started:
        yield started


@pytest.fixture(scope="module")
def settings(gate: Gate) -> str:
    return f'[browser]\nurl = "{gate.origin(gate.auth)}"\n[server]\ntrusted_proxies = ["127.0.0.1"]'


def test_a_person_logs_in_and_out_at_one_host(context: BrowserContext, gate: Gate) -> None:
    with context.new_page() as page:
        address = f"{gate.origin(gate.auth)}/app/x?y#z"
        page.goto(address)
        _fill_in(page)
        expect(page).to_have_url(address)
        expect(page.get_by_role("heading")).to_have_text("Private page of ann")
        [cookie] = [cookie for cookie in context.cookies() if not str(cookie.get("name")).endswith("-form")]
        assert (cookie["name"], cookie["domain"]) == (HOSTS[gate.auth], gate.auth)
        assert cookie["secure"] is (gate.scheme == "https")
        page.goto(f"{gate.origin(gate.auth)}/logout")
        page.get_by_role("button", name="Log out").click()
        page.goto(address)
        expect(page.get_by_role("heading")).to_have_text("Log in")
        assert gate.served == ["GET /app/x?y"]


def _fill_in(page: Page) -> None:
    page.get_by_label("User name").fill("ann")
    page.get_by_label("Password").fill("ann-secret")
    page.get_by_role("button", name="Log in").click()
