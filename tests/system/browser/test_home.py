"""The page at / of a service without a login page, in a browser."""

from playwright.sync_api import BrowserContext, expect

from tests.support.servers import Server
from tests.system.browser.test_login_page import violations


def test_the_start_page_is_accessible_small_and_correct(context: BrowserContext, server: Server) -> None:
    """In both color schemes axe finds nothing. It fits into 320 pixels, and does not break its own policy."""
    problems: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.set_viewport_size({"width": 320, "height": 480})
    page.goto(server.url)
    expect(page.get_by_role("heading")).to_have_text("tokenauth")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.emulate_media(color_scheme="dark")
    assert violations(page, "color-contrast") == []
    page.emulate_media(color_scheme="light")
    assert violations(page) == []
    assert problems == []
    page.get_by_role("link", name="API documentation").click()
    expect(page).to_have_title("tokenauth API")
    page.close()
