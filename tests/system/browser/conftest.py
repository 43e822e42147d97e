"""A real browser, a service, and two sites whose pages call it."""

import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from tests.support.lacking import lack
from tests.support.servers import HandClock, Server
from tests.system.browser.sites import Site, put, running, shown

# Without these it talks to its maker; playwright gives it a new profile each time.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Sites(NamedTuple):
    """One is known to the service by its address, the other by its name: under the other name each is a stranger."""

    one: Site
    other: Site

    @property
    def listed(self) -> dict[str, str]:
        """The origins whose pages may call."""
        return {"by_address": self.one.origin("127.0.0.1"), "by_name": self.other.origin("localhost")}

    @property
    def strangers(self) -> dict[str, str]:
        """Origins whose pages may not: nearly the same as those that may."""
        return {"another_name": self.one.origin("localhost"), "another_port": self.other.origin("127.0.0.1")}


# Not for the whole session: while it runs, this thread has an event loop, and no other test could run one.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Run one Chromium for all tests of this package."""
    path = shutil.which("chromium")
    if path is None:
        lack("chromium", "apt-get install chromium")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=_FLAGS) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Have one visitor for all tests of a module: another costs as much as most of them."""
    with browser.new_context() as made:
        yield made


@pytest.fixture(scope="module")
def sites() -> Iterator[Sites]:
    """Run both sites; they know the service once it runs."""
    with running(Site()) as one, running(Site()) as other:
        yield Sites(one, other)


@pytest.fixture(scope="module")
def settings(sites: Sites) -> str:
    """Let the pages of both sites call, as README.md says it is done."""
    origins = ", ".join(f'"{origin}"' for origin in sites.listed.values())
    server = put(shown("toml"), '"https://app.example.com"', origins)
    return f"{server}\naccess_log = true\n[pools.permits]\ncapacity = 2\nprefill = true"


@pytest.fixture(scope="module", autouse=True)
def _sites_call(sites: Sites, server: Server) -> None:
    for site in sites:
        site.call(server.url)


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Let every token expire and every failed login be forgotten, so that tests do not meet."""
    clock.advance(25 * 3600)
