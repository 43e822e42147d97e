"""Pictures of the console for docs/console.md. `make pictures` writes them to docs/images."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.support.ports import free_port
from tests.support.servers import ROOT, Server, log_in, serve, write_config

pytestmark = pytest.mark.faults  # nothing is tested that test_console.py does not test; they take long

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:150.0) Gecko/20100101 Firefox/150.0"
IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 19_0 like Mac OS X) AppleWebKit/605.1.15 Version/19.0 Mobile Safari/604.1"

SETTINGS = """
[server]
trusted_proxies = ["127.0.0.1"]
[pools.licences]
capacity = 3
prefill = true
lease_ttl = "10m"
[pools.phones]
lease_ttl = "30m"
lease_max = "8h"
[[pools.phones.members]]
name = "pixel-8"
labels = ["android", "arm"]
note = "shelf 3"
[[pools.phones.members]]
name = "iphone-15"
labels = ["ios", "arm"]
[[pools.phones.members]]
name = "iphone-16"
labels = ["ios", "arm"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    with serve(write_config(tmp_path_factory.mktemp("pictures"), SETTINGS), "--port", str(port)) as running:
        yield running


@pytest.fixture(scope="module")
def _busy(server: Server) -> None:
    """Have people and programs use the service."""
    with server.client() as client:
        admin = {"X-Token": log_in(client)}
        ann = {"X-Token": log_in(client, "ann", "ann-secret", headers={"User-Agent": FIREFOX, **_from("203.0.113.7")})}
        log_in(client, "ann", "ann-secret", headers={"User-Agent": IPHONE, **_from("198.51.100.23")})
        bob = {"X-Token": log_in(client, "bob", "bob-secret", headers={"User-Agent": "curl/8.14.1"})}
        for name, scopes in (("nightly-backup", ["read"]), ("dashboard", ["read", "write"])):
            client.post("/api/tokens", json={"name": name, "scopes": scopes, "ttl": "90d"}, headers=ann)
        for user, holder in ((ann, "ci-7"), (ann, "ci-8"), (bob, "laptop")):
            client.post("/api/pools/licences/leases", json={"holder": holder}, headers=user)
        for user, holder in ((bob, "ci-12"), (ann, "ci-9")):
            wish = {"holder": holder, "wait": 0, "request": holder}
            client.post("/api/pools/licences/leases", json=wish, headers=user)
        client.post("/api/pools/phones/leases", json={"holder": "ci-9", "labels": ["android"]}, headers=ann)
        swap = {"until": "2h", "note": "battery swap"}
        client.put("/api/pools/phones/members/iphone-15/reservation", json=swap, headers=admin)


def _from(address: str) -> dict[str, str]:
    return {"X-Forwarded-For": address}


def _with_an_hour(route: Route) -> None:
    """Add an hour of numbers to the status of a service that has just started."""
    status = route.fetch().json()
    minutes = range(60)
    status["store"]["live_tokens"] = 1240
    status["started_at"] = int(time.time()) - 9 * 86_400
    status["history"] |= {
        "logins": [6 + each * 7 % 11 for each in minutes],
        "failures": [each % 3 + (40 if 34 <= each < 41 else 0) for each in minutes],
        "validations": [1500 + 13 * (each * 37 % 61) for each in minutes],
        "leases": [min(4, each // 9) for each in minutes],
        "waiting": [0 if each < 45 else (each - 39) // 7 for each in minutes],
    }
    route.fulfill(body=json.dumps(status), content_type="application/json")


@pytest.mark.usefixtures("_busy")
@pytest.mark.parametrize(
    ("picture", "user", "view", "width", "scheme"),
    [
        ("mine", "ann", "mine", 1280, "light"),
        ("mine-small", "ann", "mine", 360, "light"),
        ("pool", "admin", "pools/phones", 1280, "dark"),
        ("health", "admin", "health", 1280, "light"),
    ],
)
def test_the_pictures_of_the_guide_can_be_made(
    browser: Browser, server: Server, tmp_path: Path, picture: str, user: str, view: str, width: int, scheme: str
) -> None:
    folder = Path(os.environ.get("PICTURES") or tmp_path)
    page = browser.new_page(
        viewport={"width": width, "height": 740 if width < 500 else 945},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.route("**/api/status", _with_an_hour)
    page.goto(f"{server.url}/console#{view}")
    page.get_by_label("User name").fill(user)
    page.get_by_label("Password").fill({"admin": "admin"}.get(user, f"{user}-secret"))
    page.get_by_role("button", name="Log in").click()
    _wait(page)
    page.screenshot(path=folder / f"console-{picture}.png")
    page.close()
    assert 10_000 < (folder / f"console-{picture}.png").stat().st_size < 150_000
    assert f"images/console-{picture}.png" in (ROOT / "docs" / "console.md").read_text()


def _wait(page: Page) -> None:
    """Wait until everything of the view is shown."""
    expect(page.get_by_role("navigation")).to_be_visible()
    expect(page.get_by_role("table").first).to_be_visible()
    expect(page.get_by_text("Loading…")).to_have_count(0)
    if page.get_by_role("heading", name="Health").count():
        expect(page.locator("canvas")).to_have_count(5)
    page.mouse.move(1, 1)
