"""A real browser, a service, and two sites with pages that call it."""

import shutil
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from tests.support.servers import HandClock, Server
from tests.support.skipping import skip_without
from tests.system.browser.gate import DOMAIN, Gate
from tests.system.browser.sites import Site, put, running, shown

# With the first, closing a tab while a page is loading may never end (microsoft/playwright#42068). The others are
# Playwright's choice, which this list replaces: Chromium asks its vendor, tries HTTPS and delays painting with them.
_DISABLED = (
    "RenderDocument",
    "AvoidUnnecessaryBeforeUnloadCheckSync",
    "HttpsFirstBalancedModeAutoEnable",
    "HttpsUpgrades",
    "MediaRouter",
    "NetworkTimeServiceQuerying",
    "OptimizationHints",
    "PaintHolding",
    "PreconnectToSearch",
)

# Chromium must not connect to its vendor. Playwright gives it a new profile each time.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--disable-features={','.join(_DISABLED)}",
    f"--host-resolver-rules=MAP *.{DOMAIN} 127.0.0.1",
]


expect.set_options(timeout=60_000)  # instead of 5 s: the machine may be busy


def chromium_path() -> str:
    """Return the program. The one without a window takes two thirds of the time."""
    path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    return path or skip_without("chromium", "apt-get install chromium-headless-shell")


class Sites(NamedTuple):
    """Two sites. Each has one origin that the service allows, and one that it does not."""

    one: Site
    other: Site

    @property
    def listed(self) -> dict[str, str]:
        """The allowed origins."""
        return {"by_address": self.one.origin("127.0.0.1"), "by_name": self.other.origin("localhost")}

    @property
    def unlisted(self) -> dict[str, str]:
        """Origins that are not allowed, though they are similar."""
        return {"another_name": self.one.origin("localhost"), "another_port": self.other.origin("127.0.0.1")}


# Not for the whole session: while it runs, this thread has a running event loop, and async tests would fail.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Run one Chromium for all tests of this package."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS) as chromium,
    ):
        yield chromium


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Open one browser context for all tests of a module, since opening one takes as long as a test.

    It trusts the certificate of a Gate.
    """
    with browser.new_context(ignore_https_errors=True) as made:
        yield made


@pytest.fixture(scope="module")
def sites() -> Iterator[Sites]:
    """Run both sites. They get the URL of the service later."""
    with running(Site()) as one, running(Site()) as other:
        yield Sites(one, other)


@pytest.fixture(scope="module")
def settings(sites: Sites) -> str:
    """Allow the origins of both sites, as README.md documents it."""
    origins = ", ".join(f'"{origin}"' for origin in sites.listed.values())
    server = put(shown("toml"), '"https://app.example.com"', origins)
    return f"{server}\naccess_log = true\n[pools.permits]\ncapacity = 2\nprefill = true"


@pytest.fixture(scope="module", autouse=True)
def _sites_call(sites: Sites, server: Server) -> None:
    for site in sites:
        site.call(server.url)


@pytest.fixture(scope="module")
def _gate_asks(gate: Gate, server: Server) -> None:
    """Let the proxy of a module ask the service."""
    gate.backend = server.url


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all tokens and failed logins, so that tests do not affect each other."""
    clock.advance(25 * 3600)
