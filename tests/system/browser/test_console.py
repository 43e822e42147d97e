"""The console in a browser, as its users act. On both stores; on PostgreSQL in `make faults`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from playwright.sync_api import APIResponse, BrowserContext, ConsoleMessage, Locator, Page, Route, expect

from tests.support.journal import until
from tests.support.ports import free_port
from tests.support.postgres import Cluster
from tests.support.servers import USERS, Server, log_in, probe, serve, write_config
from tests.system.browser.sites import put
from tests.system.browser.test_login_page import violations
from tests.system.test_cli import output, run
from tests.unit.test_values import VALUE, WRITTEN
from tokenauth.values import find_values, new_named_value

SETTINGS = """
[server]
trusted_proxies = ["0.0.0.0/0"]
accept_risks = ["broad_trusted_proxies"]
[throttle]
delay = "2m"
[pools.licences]
capacity = 2
prefill = true
lease_ttl = "10m"
[pools.phones]
lease_ttl = "10m"
[[pools.phones.members]]
name = "pixel-8"
labels = ["android"]
note = "shelf 3"
[[pools.phones.members]]
name = "iphone-15"
labels = ["ios"]
"""


VIEWS = {
    "mine": "My logins",
    "pools": "phones",
    "pools/phones": "pixel-8",
    "tokens": "nightly",
    "throttle": "Throttled logins",
    "health": "in the last hour",
}
"""The views, and what each of them shows when it is there."""

_NOTE_MESSAGES = """
globalThis.messages = [];
new MutationObserver(() => {
  const message = document.querySelector(".message p");
  if (message) messages.push(message.textContent);
}).observe(document, { childList: true, characterData: true, subtree: true });
"""


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.faults)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a service with a login page, whose clock is that of the browser. bob has the scopes of ann."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    port = free_port()
    users = put(USERS, 'username = "bob"', 'username = "bob"\nscopes = ["read", "write"]')
    config = write_config(directory, f'[browser]\nurl = "http://localhost:{port}"\n{SETTINGS}', users)
    if request.param == "postgres":
        cluster: Cluster = request.getfixturevalue("postgres")
        url = cluster.create(directory.name)
        config.write_text(re.sub('url = ".*"', f'url = "{url}"', config.read_text(), count=1))
    with serve(config, "--port", str(port), "--workers", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def tab(context: BrowserContext) -> Page:
    """Open one tab for all tests: each further tab starts a process."""
    tab = context.new_page()
    tab.add_init_script(_NOTE_MESSAGES)
    return tab


@pytest.fixture
def page(tab: Page, client: httpx.Client) -> Page:
    """Return the tab at its usual size. No cookies, leases, logins and reservations of other tests are left."""
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.context.clear_cookies()
    tab.goto("about:blank")  # another address of the same page would not load it again
    admin = {"X-Token": log_in(client)}
    for pool in ("licences", "phones"):
        for token in client.get(f"/api/pools/{pool}", headers=admin).json()["tokens"]:
            if "holder" in token:
                client.delete(f"/api/pools/{pool}/leases/{token['token']}?force=true", headers=admin)
            if "reservation" in token:
                client.delete(f"/api/pools/{pool}/members/{token['name']}/reservation", headers=admin)
    for name in ("ann", "bob", "admin"):
        client.delete(f"/api/tokens?kind=all&user={name}", headers=admin)
    return tab


def console(server: Server) -> str:
    """Return the address of the console, at the host of the login page."""
    return f"http://localhost:{server.port}/console"


def enter(page: Page, server: Server, username: str = "ann", password: str = "ann-secret", view: str = "") -> None:
    """Open the console and log in, as a person does who finds the fields by their labels."""
    page.goto(f"{console(server)}{view}")
    fill_in(page, username, password)
    expect(page.get_by_role("navigation")).to_be_visible()


def fill_in(page: Page, username: str = "ann", password: str = "ann-secret") -> None:
    """Log in. A key presses the button: it moves when the page knows of the login page, and a click could miss it."""
    page.get_by_label("User name").fill(username)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name=re.compile("^Log in")).press("Enter")


def row(page: Page, table: str, text: str) -> Locator:
    return page.get_by_role("table", name=table).get_by_role("row").filter(has_text=text)


def confirm(page: Page, button: str) -> None:
    """Press the button of the dialog, and wait until it is closed."""
    page.get_by_role("dialog").get_by_role("button", name=button).click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def said(page: Page, message: str) -> None:
    """Wait for a message. It may be gone already: most are shown for 6 seconds."""
    page.wait_for_function("(message) => messages.some((text) => text.includes(message))", arg=message)


def test_the_token_of_a_login_is_kept_nowhere(page: Page, server: Server, client: httpx.Client) -> None:
    """Not in the address, not in a cookie, not in storage, not in the log. A reload asks to log in again."""
    with page.expect_response("**/api/token") as answered:
        enter(page, server)
    token = answered.value.json()["token"]
    kept = page.evaluate(
        "[location.href, document.cookie, {...localStorage}, {...sessionStorage}, document.body.innerHTML]"
    )
    assert token not in repr(kept)
    assert token not in server.log.read_text()
    assert kept[1:4] == ["", {}, {}]
    page.reload()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    assert probe(client, token)


def test_the_login_page_leads_back_to_the_same_place(page: Page, server: Server, client: httpx.Client) -> None:
    """Its cookie survives a reload, and ends with the log-out of the console."""
    page.goto(f"{console(server)}#pools/phones")
    page.get_by_role("link", name="Log in with the login page").click()
    fill_in(page)
    expect(page.get_by_role("heading", name="phones")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="phones")).to_be_visible()
    (token,) = [cookie["value"] for cookie in page.context.cookies() if cookie.get("name") == "tokenauth"]
    assert token not in page.evaluate("document.cookie + document.body.innerHTML")
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(re.compile(r"/logout\?rd="))
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(console(server))
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    assert not probe(client, token)


def test_another_user_of_the_cookie_gets_a_new_page(page: Page, server: Server, client: httpx.Client) -> None:
    """What the user before had opened is gone: it would act for another user than the page shows."""
    page.goto(f"http://localhost:{server.port}/login?rd={quote(console(server))}")
    fill_in(page)
    _show(page, False)
    page.get_by_role("button", name="New named token").click()
    bob = log_in(client, "bob", "bob-secret")
    page.context.add_cookies([{"name": "tokenauth", "value": bob, "url": console(server)}])
    _show(page, True)
    expect(page.get_by_role("banner")).to_contain_text("bob")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_wrong_password_and_a_wrong_token_are_said(page: Page, server: Server, client: httpx.Client) -> None:
    page.goto(f"{console(server)}")
    fill_in(page, password="wrong")
    expect(page.get_by_role("alert")).to_have_text("The user name or the password is wrong.")
    page.get_by_text("Use a token instead").click()
    for value in ("x" * 64, "not a tökén"):
        page.get_by_label("Token").fill(value)
        page.get_by_role("button", name="Use this token").click()
        expect(page.get_by_role("alert")).to_contain_text("not valid")
    page.get_by_label("Token").fill(log_in(client, "bob", "bob-secret"))
    page.get_by_role("button", name="Use this token").click()
    expect(page.get_by_role("banner")).to_contain_text("bob")


def test_one_login_is_ended_and_then_all_others(page: Page, server: Server, client: httpx.Client) -> None:
    enter(page, server)
    mine = client.get("/api/tokens", headers={"X-Token": log_in(client, "ann", "ann-secret")}).json()["tokens"]
    tokens = [log_in(client, "ann", "ann-secret", headers={"User-Agent": f"job-{number}"}) for number in range(3)]
    assert len(mine) == 2
    expect(row(page, "My logins", "job-")).to_have_count(3)
    expect(row(page, "My logins", "job-1")).to_contain_text("none noted")
    row(page, "My logins", "job-1").get_by_role("button").click()
    expect(page.get_by_role("dialog")).to_contain_text("job-1 from 127.0.0.1")
    confirm(page, "End login")
    expect(row(page, "My logins", "job-1")).to_have_count(0)
    assert [probe(client, token) for token in tokens] == [True, False, True]
    page.get_by_role("button", name="End all others").click()
    confirm(page, "End all others")
    expect(page.get_by_role("table", name="My logins").get_by_role("row")).to_have_count(2)
    assert [probe(client, token) for token in tokens] == [False] * 3
    expect(page.get_by_text("this login")).to_be_visible()


def test_a_named_token_is_made_shown_once_and_rotated(page: Page, server: Server, client: httpx.Client) -> None:
    enter(page, server)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="New named token").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("nightly")
    dialog.get_by_label("read").check()
    dialog.get_by_label("Ends in").select_option("30 days")
    dialog.get_by_role("button", name="Make token").click()
    dialog.get_by_role("button", name="Copy").click()
    expect(dialog.get_by_role("status")).to_have_text("Copied.")
    made = page.evaluate("navigator.clipboard.readText()")
    assert re.fullmatch("tkn[A-Za-z0-9]{61}", made)
    expect(dialog.get_by_label("Token nightly")).to_have_value(made)
    for _ in range(2):
        page.keyboard.press("Escape")
    expect(dialog.get_by_label("Token nightly")).to_be_visible()
    confirm(page, "Done")
    assert made not in page.content()
    assert client.get("/api/me", headers={"X-Token": made}).json()["scopes"] == ["read"]
    expect(row(page, "My named tokens", "nightly")).to_contain_text("in 30 days")
    row(page, "My named tokens", "nightly").get_by_role("button", name="Rotate").click()
    dialog.get_by_role("button", name="Rotate").click()
    successor = dialog.get_by_label("New token nightly").input_value()
    confirm(page, "Done")
    assert [probe(client, token) for token in (made, successor)] == [False, True]
    for view in ("Pools", "Mine"):  # until the new list is there, the row is that of the old token
        page.get_by_role("link", name=view, exact=True).click()
        expect(page.get_by_role("heading", name=view, exact=True)).to_be_focused()
    row(page, "My named tokens", "nightly").get_by_role("button", name="End").click()
    confirm(page, "End token")
    expect(page.get_by_text("You have no named tokens.")).to_be_visible()
    assert not probe(client, successor)


def test_the_keyboard_is_enough(page: Page, server: Server, client: httpx.Client) -> None:
    """Tab reaches each button and each time, dialogs keep the focus, and it is never lost."""
    other = log_in(client, "ann", "ann-secret", headers={"User-Agent": "job"})
    page.goto(console(server))
    page.get_by_label("User name").focus()
    page.keyboard.type("ann")
    page.keyboard.press("Tab")
    page.keyboard.type("ann-secret")
    page.keyboard.press("Enter")
    end = row(page, "My logins", "job").get_by_role("button")
    expect(end).to_be_visible()
    page.get_by_role("link", name="To the content").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Mine")).to_be_focused()
    seen = 0
    while not end.evaluate("(button) => button === document.activeElement"):
        page.keyboard.press("Tab")
        seen += page.locator(".exact:visible").count()
        assert seen < 20
    assert seen > 2
    cancel = page.get_by_role("dialog").get_by_role("button", name="Cancel")
    page.keyboard.press("Enter")
    expect(cancel).to_be_focused()
    page.keyboard.press("Escape")
    expect(end).to_be_focused()
    page.keyboard.press("Enter")
    expect(cancel).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    said(page, "The login is ended.")
    expect(page.get_by_role("heading", name="Mine")).to_be_focused()
    assert not probe(client, other)


def test_a_dialog_goes_on_after_a_reading_that_began_later(page: Page, server: Server, client: httpx.Client) -> None:
    """When it closes, what it ended is gone, also if an older list was on its way."""
    log_in(client, "ann", "ann-secret", headers={"User-Agent": "job"})
    enter(page, server)
    asked(page, "api/tokens", 2)  # when the view was opened, and when the events began
    row(page, "My logins", "job").get_by_role("button").click()
    older: list[tuple[Route, APIResponse]] = []

    def hold(route: Route) -> None:
        older.append((route, route.fetch()))

    page.route("**/api/tokens", hold, times=1)
    log_in(client, "ann", "ann-secret", headers={"User-Agent": "cron"})
    while not older:
        page.wait_for_timeout(10)  # lets the route be called
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        page.get_by_role("dialog").get_by_role("button", name="End login").click()
    said(page, "The login is ended.")
    expect(page.get_by_role("dialog")).to_be_visible()
    for route, answer in older:
        route.fulfill(response=answer)
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert row(page, "My logins", "job").count() == 0
    expect(row(page, "My logins", "cron")).to_be_visible()
    assert len(older) == 1


@pytest.mark.parametrize("view", ["mine", "pools/phones", "tokens"])
def test_the_heading_gets_the_focus_of_what_another_ends(
    page: Page, server: Server, client: httpx.Client, view: str
) -> None:
    job = {"X-Token": log_in(client, headers={"User-Agent": "job"})}
    ended = "/api/token"
    if view == "pools/phones":
        leased = client.post("/api/pools/phones/leases", json={"holder": "job"}, headers=job).json()
        ended = f"/api/pools/phones/leases/{leased['token']}?force=true"
    enter(page, server, "admin", "admin", f"#{view}")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_be_focused()  # the form that had the focus is gone
    button = page.get_by_role("row").filter(has_text="job").get_by_role("button", name=re.compile("^(End|Release)"))
    button.focus()
    expect(button).to_be_focused()
    assert client.delete(ended, headers=job).is_success
    expect(button).to_have_count(0)
    expect(heading).to_be_focused()


def test_a_refused_action_keeps_the_focus_and_says_why(page: Page, server: Server) -> None:
    enter(page, server)
    dialog = page.get_by_role("dialog")
    make = dialog.get_by_role("button", name="Make token")
    for button in ("Done", "Cancel"):
        page.get_by_role("button", name="New named token").click()
        dialog.get_by_label("Name").fill("twice")
        make.press("Enter")
        if button == "Cancel":
            expect(dialog.get_by_role("alert")).to_contain_text("You have a token of this name.")
            expect(make).to_be_focused()
        confirm(page, button)
    expect(page.get_by_role("button", name="New named token")).to_be_focused()


def test_a_dialog_stays_until_what_it_sent_is_answered(page: Page, server: Server, client: httpx.Client) -> None:
    """Neither Escape nor Cancel loses a value that is shown only once, and the focus is on it."""
    enter(page, server)
    page.get_by_role("button", name="New named token").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("nightly")
    held: list[tuple[Route, APIResponse]] = []

    def hold(route: Route) -> None:
        if route.request.method == "POST":
            held.append((route, route.fetch()))
        else:
            route.fallback()

    page.route("**/api/tokens", hold)
    with page.expect_request(lambda request: request.method == "POST"):
        dialog.get_by_role("button", name="Make token").press("Enter")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_disabled()
    for _ in range(2):
        page.keyboard.press("Escape")
    dialog.get_by_role("button", name="Cancel").dispatch_event("click")
    for route, answer in held:
        route.fulfill(response=answer)
    expect(dialog.get_by_label("Token nightly")).to_be_focused()
    page.unroute("**/api/tokens")
    assert probe(client, dialog.get_by_label("Token nightly").input_value())
    confirm(page, "Done")


def test_enter_twice_ends_nothing(page: Page, server: Server, client: httpx.Client) -> None:
    ann = {"X-Token": log_in(client, "ann", "ann-secret")}
    client.post("/api/pools/phones/leases", json={"labels": ["android"]}, headers=ann)
    enter(page, server, "admin", "admin", "#pools/phones")
    row(page, "Members", "pixel-8").get_by_role("button", name="End the lease").press("Enter")
    expect(page.get_by_role("dialog")).to_have_accessible_description(re.compile("^ann loses it at once."))
    expect(page.get_by_role("dialog").get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(row(page, "Members", "pixel-8")).to_contain_text("ann")


def test_an_action_without_an_answer_may_have_been_done(page: Page, server: Server, client: httpx.Client) -> None:
    """The dialog says so, and that nothing repeats it."""
    job = log_in(client, "ann", "ann-secret", headers={"User-Agent": "job"})
    enter(page, server)

    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    page.route("**/api/tokens/*", lose)
    row(page, "My logins", "job").get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="End login").click()
    said = "tokenauth did not answer. It may have done what you asked for: look before you try again."
    expect(page.get_by_role("dialog").get_by_role("alert")).to_have_text(said)
    assert not probe(client, job)
    page.unroute("**/api/tokens/*")
    confirm(page, "Cancel")


DISTANCES = {
    0.4: "now",
    -1: "1 second ago",
    59.7: "in 1 minute",
    -90: "2 minutes ago",
    3599: "in 1 hour",
    86_399: "in 1 day",
    90 * 86_400: "in 90 days",
    -400 * 86_400: "1 year ago",
}


def test_times_are_said_as_distances(page: Page, server: Server) -> None:
    say = """async ([address, distances]) => {
      const { fromNow } = await import(address);
      return distances.map((distance) => fromNow(1e9 + distance, 1e9));
    }"""
    assert page_import(page, server, "words.js", say, [*DISTANCES]) == [*DISTANCES.values()]


def page_import(page: Page, server: Server, file: str, function: str, argument: object) -> object:
    """Open the console, and call a function with the address of one of its files, and `argument`."""
    page.goto(console(server))
    module = page.locator("script").get_attribute("src")
    assert module is not None
    found: object = page.evaluate(function, [f"./{module.replace('app.js', file)}", argument])
    return found


def test_a_user_sees_leases_places_and_no_controls(page: Page, server: Server, client: httpx.Client) -> None:
    ann, bob = ({"X-Token": log_in(client, name, f"{name}-secret")} for name in ("ann", "bob"))
    for headers, holder in ((ann, "ci-7"), (bob, "laptop")):
        client.post("/api/pools/licences/leases", json={"holder": holder}, headers=headers)
    client.post("/api/pools/licences/leases", json={"holder": "ci-8", "wait": 0, "request": "r1"}, headers=ann)
    enter(page, server)
    expect(row(page, "My leases", "ci-7")).to_contain_text("licences")
    expect(row(page, "My places in line", "ci-8")).to_contain_text("1 of 1")
    page.get_by_role("link", name="Pools").click()
    expect(page.get_by_role("heading", name="Pools")).to_be_focused()
    page.get_by_role("link", name="licences").click()
    expect(row(page, "Tokens", "bob, laptop")).to_be_visible()
    expect(row(page, "Tokens", "bob, laptop").get_by_role("button")).to_have_count(0)
    row(page, "Tokens", "ann, ci-7").get_by_role("button", name="Release").click()
    confirm(page, "Release")
    expect(row(page, "Tokens", "ann, ci-7")).to_have_count(0)


def test_a_reservation_by_a_command_names_the_operator(page: Page, server: Server) -> None:
    output(run(server.log.parent, "pool", "reserve", "phones", "pixel-8", "--until", "1h"))
    enter(page, server, "admin", "admin", "#pools/phones")
    member = row(page, "Members", "pixel-8")
    expect(member).to_contain_text("by the server's operator")
    member.get_by_role("button", name="End the reservation").click()
    expect(page.get_by_role("dialog")).to_contain_text("It is reserved by the server's operator.")
    confirm(page, "End reservation")
    expect(member).to_contain_text("free")


def test_a_manager_reserves_ends_and_takes_over(page: Page, server: Server, client: httpx.Client) -> None:
    ann = {"X-Token": log_in(client, "ann", "ann-secret")}
    for label in ("android", "ios"):
        client.post("/api/pools/phones/leases", json={"holder": "ci", "labels": [label]}, headers=ann)
    enter(page, server, "admin", "admin", "#pools/phones")
    before = len(server.events("lease_forced"))
    member = row(page, "Members", "pixel-8")
    dialog = page.get_by_role("dialog")
    member.get_by_role("button", name="End the lease").click()
    expect(dialog).to_contain_text("ann, ci loses it at once. It is free then. Is it broken or still in use?")
    confirm(page, "Cancel")
    member.get_by_role("button", name="Reserve").click()
    expect(dialog).to_contain_text(
        "ann's lease goes on until it ends. Then nobody gets pixel-8 until the reservation is over."
    )
    page.get_by_label("Note").fill("battery swap")
    confirm(page, "Reserve")
    expect(member).to_contain_text("battery swap")
    expect(member).to_contain_text("in 2 hours")
    member.get_by_role("button", name="End the lease").click()
    expect(dialog).to_contain_text("ann, ci loses it at once. Nobody gets it then, until the reservation ends.")
    expect(dialog).not_to_contain_text("reserve it first")
    page.get_by_label("Reason").fill("stuck")
    confirm(page, "End lease")
    expect(member.get_by_role("button", name="Release")).to_have_count(0)
    member.get_by_role("button", name="End the reservation").click()
    confirm(page, "End reservation")
    expect(member).to_contain_text("free")
    other = row(page, "Members", "iphone-15")
    other.get_by_role("button", name="Take over").click()
    confirm(page, "Take over")
    expect(other).to_contain_text("admin")
    until(lambda: len(server.events("lease_forced")) == before + 2, "both are logged")
    assert [event.get("reason") for event in server.events("lease_forced")[before:]] == ["stuck", None]


def test_a_late_answer_to_a_log_out_keeps_the_next_login(page: Page, server: Server, client: httpx.Client) -> None:
    enter(page, server)
    held: list[tuple[Route, APIResponse]] = []
    page.route("**/api/token", lambda route: held.append((route, route.fetch())), times=1)
    page.get_by_role("banner").get_by_role("button", name="Log out").click()
    expect(page.get_by_text("Logging out…")).to_be_visible()
    with page.expect_response(lambda answer: answer.request.method == "POST") as answered:
        fill_in(page, "bob", "bob-secret")
    token = answered.value.json()["token"]
    expect(page.get_by_role("banner")).to_contain_text("bob")
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        for route, answer in held:
            route.fulfill(response=answer)
    page.get_by_role("link", name="Pools").click()
    expect(page.get_by_role("link", name="phones")).to_be_visible()
    page.get_by_role("banner").get_by_role("button", name="Log out").click()
    expect(page.get_by_text("You are logged out.")).to_be_visible()
    assert not probe(client, token)


def test_a_login_that_ended_asks_again_at_the_same_place(page: Page, server: Server, client: httpx.Client) -> None:
    enter(page, server, view="#pools/phones")
    expect(row(page, "Members", "pixel-8")).to_be_visible()
    client.delete("/api/tokens?user=ann", headers={"X-Token": log_in(client)})
    expect(page.get_by_text("Your login has ended.")).to_be_visible(timeout=15_000)
    fill_in(page)
    expect(row(page, "Members", "pixel-8")).to_be_visible()


def test_an_outage_is_said_and_what_was_shown_stays(page: Page, server: Server, context: BrowserContext) -> None:
    enter(page, server, view="#pools/phones")
    expect(row(page, "Members", "pixel-8")).to_be_visible()
    context.set_offline(True)
    expect(page.get_by_text("tokenauth does not answer.")).to_be_visible(timeout=15_000)
    expect(row(page, "Members", "pixel-8")).to_be_visible()
    page.route(re.compile("/console$"), lambda route: route.fulfill(body="console/0123456789abcdef/app.js"))
    context.set_offline(False)
    page.evaluate("document.querySelector('.banner button')?.click()")  # unless the page has just tried by itself
    expect(page.get_by_text("tokenauth does not answer.")).to_have_count(0)
    expect(page.get_by_text("tokenauth has been upgraded.")).to_be_visible()
    page.unroute(re.compile("/console$"))
    page.get_by_role("button", name="Reload this page").click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()


def test_a_page_older_than_the_service_is_reloaded(page: Page, server: Server) -> None:
    """It does not understand the answers, and only the banner says so."""
    enter(page, server, "admin", "admin")
    expect(page.get_by_role("heading", name="My logins")).to_be_visible()
    page.route("**/api/throttle", lambda route: route.fulfill(json={"renamed": []}))
    page.get_by_role("link", name="Throttle").click()
    expect(page.get_by_text("This page has failed.")).to_be_visible()
    page.get_by_role("link", name="Mine").click()
    page.route(re.compile("/console$"), lambda route: route.fulfill(body="console/0123456789abcdef/app.js"))
    page.get_by_role("link", name="Throttle").click()
    expect(page.get_by_text("tokenauth has been upgraded.")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    for routed in (re.compile("/console$"), "**/api/throttle"):
        page.unroute(routed)
    page.get_by_role("button", name="Reload this page").click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()


def test_old_numbers_are_gray_and_have_a_time(page: Page, tmp_path: Path) -> None:
    """While the database is away, also for who opens the view then. The card of the store says how it is now."""
    logs = tmp_path / "logs"
    config = write_config(tmp_path, f'[audit]\nfile = "{logs}/audit.jsonl"\n')
    with serve(config, "--workers", "1") as server:
        page.goto(f"{server.url}/console#health")
        fill_in(page, "admin", "admin")
        main = page.get_by_role("main")
        expect(main).to_contain_text("Storeup")
        expect(main).to_contain_text(re.compile(r"Audit log\W*Problem: not writableacts are held"), timeout=15_000)
        logs.mkdir()
        expect(main).to_contain_text("Audit logupno act is missing", timeout=15_000)
        moved = [file.rename(tmp_path / f"moved-{file.name}") for file in tmp_path.glob("tokenauth.db*")]
        assert moved
        for _ in range(2):
            expect(main).to_contain_text(re.compile(r"Store\W*Problem: unavailablenow: "), timeout=15_000)
            expect(main).to_contain_text(re.compile(r"As of \d\d:\d\d:\d\d"))
            expect(main).not_to_contain_text("Storeup")
            expect(page.locator(".old .value").first).to_be_visible()
            page.emulate_media(color_scheme="dark")
            assert violations(page, "color-contrast") == []
            page.emulate_media(color_scheme="light")
            assert violations(page) == []
            page.get_by_role("link", name="Pools").click()
            expect(page.get_by_role("alert")).to_be_visible()
            page.get_by_role("link", name="Health").click()


@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (200, "text/html", "<p>Accept the terms"),
        (401, "text/html", "<h1>Authorization Required</h1>"),
        (502, "application/json", '{"message": "Bad gateway"}'),
    ],
    ids=str,
)
def test_the_answer_of_a_proxy_is_an_outage(
    page: Page, server: Server, status: int, content_type: str, body: str
) -> None:
    """It neither ends the login nor says that a password is wrong."""
    enter(page, server)
    page.route("**/api/**", lambda route: route.fulfill(status=status, content_type=content_type, body=body))
    page.get_by_role("link", name="Pools").click()
    expect(page.get_by_role("alert")).to_contain_text("tokenauth does not answer.")
    page.unroute("**/api/**")
    expect(page.get_by_role("link", name="phones")).to_be_visible()


def test_one_address_that_fails_is_not_asked_all_the_time(page: Page, server: Server) -> None:
    """The others that answer do not say that the service is back."""
    page.route("**/api/leases", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    enter(page, server)
    times = asked(page, "api/leases", 4)
    assert times[3] - times[0] > 3_000
    banner = page.get_by_text("tokenauth does not answer.", exact=True)
    expect(banner).to_be_visible()
    page.unroute("**/api/leases")
    expect(banner).to_have_count(0)


def asked(page: Page, address: str, number: int) -> list[float]:
    """Wait until the page has asked for an address this often, and return when it did, in milliseconds."""
    found = """([address, number]) => {
      const times = performance.getEntriesByType("resource").filter(({ name }) => name.includes(address));
      return times.length >= number && times.map(({ startTime }) => startTime);
    }"""
    times: list[float] = page.wait_for_function(found, arg=[address, number]).json_value()
    return times


def test_it_works_below_a_prefix_of_a_proxy(page: Page, server: Server) -> None:
    def forward(route: Route) -> None:
        if route.request.url.endswith("/api/events"):  # a stream, which `fetch` would read to its end
            route.abort()
            return
        route.fulfill(response=route.fetch(url=route.request.url.replace("/prefix/", "/")))

    page.route("**/prefix/**", forward)
    page.goto(console(server).replace("/console", "/prefix/console"))
    fill_in(page)
    page.get_by_role("link", name="Pools").click()
    page.get_by_role("link", name="phones").click()
    expect(row(page, "Members", "pixel-8")).to_be_visible()
    page.goto("about:blank")
    page.unroute_all(behavior="wait")


def test_markup_in_names_is_text(page: Page, server: Server, client: httpx.Client) -> None:
    """Also the browser would refuse to make HTML of text: the page requires Trusted Types."""
    ann = {"X-Token": log_in(client, "ann", "ann-secret", headers={"User-Agent": "<img src=x onerror=alert(1)>"})}
    client.post("/api/tokens", json={"name": "<b>x</b>"}, headers=ann)
    enter(page, server)
    expect(row(page, "My named tokens", "<b>x</b>")).to_be_visible()
    expect(row(page, "My logins", "<img src=x onerror=alert(1)>")).to_be_visible()
    assert page.evaluate("document.querySelectorAll('img, b').length") == 0
    assert (
        page.evaluate("try { document.body.innerHTML = '<b>x</b>'; 'written' } catch (error) { error.name }")
        == "TypeError"
    )


def test_an_admin_finds_and_ends_tokens_of_a_user(page: Page, server: Server, client: httpx.Client) -> None:
    bob = [log_in(client, "bob", "bob-secret", headers={"User-Agent": f"job-{number}"}) for number in range(2)]
    ann = log_in(client, "ann", "ann-secret")
    client.post("/api/tokens", json={"name": "bobs-helper", "scopes": ["read", "write"]}, headers={"X-Token": ann})
    enter(page, server, "admin", "admin", "#tokens")
    expect(row(page, "Tokens", "job-")).to_have_count(2)
    page.get_by_label("Search").fill("JOB-1")
    expect(row(page, "Tokens", "job-")).to_have_count(1)
    row(page, "Tokens", "job-1").get_by_role("button", name="End job-1 of bob").click()
    confirm(page, "End token")
    expect(page.get_by_text('No live token matches "JOB-1".')).to_be_visible()
    assert [probe(client, token) for token in bob] == [True, False]
    page.get_by_label("Search").fill("bob")
    expect(row(page, "Tokens", "bobs-helper")).to_contain_text("scopes: read, write")
    wish = {"holder": "ci", "labels": ["android"]}
    client.post("/api/pools/phones/leases", json=wish, headers={"X-Token": bob[0]})
    page.get_by_role("button", name="End all tokens of bob").click()
    confirm(page, "End all")
    expect(row(page, "Tokens", "job-")).to_have_count(0)
    assert [probe(client, token) for token in (bob[0], ann)] == [False, True]
    said(page, "1 token of bob ended. bob still has 1 lease: phones/pixel-8.")
    page.get_by_role("link", name="phones/pixel-8").click()
    expect(row(page, "Members", "bob, ci")).to_be_visible()


def test_a_search_says_nothing_of_the_one_before(page: Page, server: Server, client: httpx.Client) -> None:
    log_in(client, "bob", "bob-secret")
    enter(page, server, "admin", "admin", "#tokens")
    page.get_by_label("Search").fill("zed")
    expect(page.get_by_text('No live token matches "zed".')).to_be_visible()
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/api/tokens?*search=bob*", hold, times=1)
    with page.expect_request("**/api/tokens?*search=bob*"):
        page.get_by_label("Search").fill("bob")
    expect(page.get_by_text('No live token matches "zed".')).to_be_visible()
    for route in held:
        route.continue_()
    expect(row(page, "Tokens", "bob")).to_be_visible()


def test_leaked_tokens_are_shown_and_then_ended(page: Page, server: Server, client: httpx.Client) -> None:
    """The text is not sent. Whose a token is, is shown before it ends. The list is read again at once."""
    bob = log_in(client, "bob", "bob-secret", headers={"User-Agent": "job-1"})
    ann = {"X-Token": log_in(client, "ann", "ann-secret", headers={"User-Agent": "job-2"})}
    named = client.post("/api/tokens", json={"name": "nightly"}, headers=ann).json()["token"]
    enter(page, server, "admin", "admin", "#tokens")
    expect(row(page, "Tokens", "nightly")).to_be_visible()
    sent: list[str] = []
    page.on("request", lambda request: sent.append(f"{request.url} {request.post_data}"))
    dialog = page.get_by_role("dialog")
    for text, said in (
        ("secret words", "No live token in the text."),
        (f"secret {'x' * 64}", "No live token in the text. 1 word has the form of a token."),
    ):
        find_leaked(page, text)
        expect(dialog.get_by_role("status")).to_have_text(said)
        confirm(page, "Done")
    find_leaked(page, f"secret GET /?token={bob}\n> {named[:30]}\n> {named[30:]}\n")
    expect(dialog).to_contain_text("2 live tokens are in the text.")
    assert violations(page) == []
    for each in ("bob: job-1", "ann: nightly", "from 127.0.0.1", "none noted"):
        expect(dialog).to_contain_text(each)
    assert [probe(client, token) for token in (bob, named)] == [True, True]
    dialog.get_by_role("button", name="End them").click()
    expect(dialog.get_by_role("status")).to_have_text(re.compile(r"2 tokens ended: .*\bbob \(job-1\)"))
    expect(dialog.get_by_role("status")).to_contain_text("ann (nightly)")
    confirm(page, "Done")
    expect(row(page, "Tokens", "nightly")).to_have_count(0)
    assert [probe(client, token) for token in (bob, named, ann["X-Token"])] == [False, False, True]
    assert [request for request in sent if "secret" in request] == []


def test_what_the_database_cannot_take_is_held(page: Page, server: Server, client: httpx.Client) -> None:
    bob = log_in(client, "bob", "bob-secret")
    enter(page, server, "admin", "admin", "#tokens")
    full = {"error": "store_unavailable", "error_description": "The disk is full."}
    page.route("**/api/tokens/*", lambda route: route.fulfill(status=503, json=full))
    find_leaked(page, bob)
    page.get_by_role("dialog").get_by_role("button", name="End it").click()
    expect(page.get_by_role("dialog")).to_contain_text("held in memory until the database can be written")
    page.unroute("**/api/tokens/*")
    confirm(page, "Done")
    assert not probe(client, bob)


def find_leaked(page: Page, text: str) -> None:
    page.get_by_role("button", name="End leaked tokens").click()
    page.get_by_label("Text").fill(text)
    page.get_by_role("dialog").get_by_role("button", name="Find tokens").click()


def test_a_text_has_the_tokens_that_a_log_out_finds(page: Page, server: Server) -> None:
    named = new_named_value()
    value = VALUE.decode()
    texts = [text.decode() for text in WRITTEN.values()]
    texts += [value, f"{value}1", f"m{named}1", f"tkn{named}{named}", f"{value[:40]}=\n{value[40:]}", "\0".join(value)]
    texts += [quote("".join(f"%{byte:02x}" for byte in VALUE)), json.dumps(json.dumps(f"a\n{named}\t"))]
    find = "async ([address, texts]) => texts.map((await import(address)).findValues)"
    found = page_import(page, server, "leaks.js", find, texts)
    assert found == [[value.decode() for value in find_values(text.encode())] for text in texts]


def test_an_admin_clears_a_user_at_one_address(page: Page, server: Server, client: httpx.Client) -> None:
    """The dialog and the message say at which one, and from where the user still has to wait."""
    right = {"username": "bob", "password": "bob-secret"}
    attacker, home = ({"X-Forwarded-For": address} for address in ("198.51.100.7", "203.0.113.9"))
    for number in range(7):
        for headers in (attacker, home):
            client.post("/api/token", json={"username": "bob", "password": f"guess {number}"}, headers=headers)
    assert client.post("/api/token", json=right, headers=home).status_code == 429
    enter(page, server, "admin", "admin", "#throttle")
    row(page, "Throttled logins", "203.0.113.9").get_by_role("button", name="Clear bob from 203.0.113.9").click()
    expect(page.get_by_role("dialog")).to_contain_text("Clear the failed logins of bob from 203.0.113.9?")
    expect(page.get_by_role("dialog")).to_contain_text("bob is also throttled from 198.51.100.7, and stays so.")
    confirm(page, "Clear")
    said(page, "bob can log in from 203.0.113.9 again; still throttled from 198.51.100.7.")
    assert [client.post("/api/token", json=right, headers=who).status_code for who in (home, attacker)] == [200, 429]
    row(page, "Throttled logins", "198.51.100.7").get_by_role("button").click()
    confirm(page, "Clear")
    said(page, "bob can log in from 198.51.100.7 again.")
    expect(page.get_by_text("Nobody has to wait.")).to_be_visible()
    assert client.post("/api/token", json=right, headers=attacker).status_code == 200


def test_the_health_view_shows_what_happens(page: Page, server: Server, client: httpx.Client) -> None:
    enter(page, server, "admin", "admin", "#health")
    main = page.get_by_role("main")
    expect(main).to_contain_text("Workers1 of 1")
    expect(main).to_contain_text("Storeup")
    expect(main).to_contain_text("Audit logoff")
    expect(main).to_contain_text("broad_trusted_proxies")
    expect(page.get_by_role("img", name=re.compile(r"^Logins: \d+ in the last hour"))).to_be_visible()
    expect(page.locator("canvas")).to_have_count(5)
    before = page.get_by_role("img", name=re.compile("^Logins:")).get_attribute("aria-label")
    log_in(client, "ann", "ann-secret")
    expect(page.get_by_role("img", name=before or "", exact=True)).to_have_count(0, timeout=15_000)


def test_a_chart_in_other_colors_has_the_same_values(page: Page, server: Server, client: httpx.Client) -> None:
    answer = client.get("/api/status", headers={"X-Token": log_in(client)}).json()
    logins = [0] * len(answer["history"]["logins"])
    answer["history"]["logins"] = logins
    page.route("**/api/status", lambda route: route.fulfill(json=answer))
    enter(page, server, "admin", "admin", "#health")
    expect(page.get_by_role("img", name=re.compile("^Logins: 0 "))).to_be_visible()
    expect(page.locator("canvas")).to_have_count(5)
    logins[-10:] = [9] * 10
    page.wait_for_function(HAS_BARS)
    page.route("**/api/status", lambda route: None)  # nothing newer comes
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(HAS_BARS)
    page.emulate_media(color_scheme="light")
    page.unroute("**/api/status")


HAS_BARS = """() => {
  const canvas = document.querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const color = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim().slice(1);
  const accent = parseInt(color, 16);
  let found = 0;
  for (let at = 0; at < data.length; at += 4) {
    found += ((data[at] << 16) | (data[at + 1] << 8) | data[at + 2]) === accent && data[at + 3] === 255;
  }
  return found > 500;
}"""
"""Whether the first chart has bars, in the color of now."""


def test_what_changes_before_the_events_begin_is_shown(page: Page, server: Server, client: httpx.Client) -> None:
    """They are of what changes after the stream has begun, which may take a while."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/api/events", hold, times=1)
    enter(page, server, view="#pools/phones")
    asked(page, "api/pools/phones?", 2)
    bob = {"X-Token": log_in(client, "bob", "bob-secret")}
    client.post("/api/pools/phones/leases", json={"holder": "ci-9", "labels": ["android"]}, headers=bob)
    for route in held:
        route.continue_()
    expect(row(page, "Members", "ci-9")).to_be_visible(timeout=15_000)


def test_news_are_shown_at_once(page: Page, server: Server, client: httpx.Client) -> None:
    """Well before everything is read again, which is after 30 seconds. A tab in the background follows nothing."""
    with page.expect_response("**/api/events"):
        enter(page, server, view="#pools/phones")
    member = row(page, "Members", "pixel-8")
    expect(member).to_contain_text("free")
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/events")):
        _show(page, False)
    ann = {"X-Token": log_in(client, "ann", "ann-secret")}
    wish = {"holder": "ci-7", "labels": ["android"]}
    lease = client.post("/api/pools/phones/leases", json=wish, headers=ann).json()["token"]
    with page.expect_response("**/api/events"):
        _show(page, True)
    expect(member).to_contain_text("ci-7")
    client.delete(f"/api/pools/phones/leases/{lease}", headers=ann)
    expect(member).to_contain_text("free", timeout=20_000)


def _show(page: Page, shown: bool) -> None:
    """Do as if the tab came to the front, or went to the back."""
    page.evaluate(
        """(hidden) => {
          Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        not shown,
    )


def test_who_lacks_a_scope_sees_no_view_of_it(page: Page, server: Server) -> None:
    enter(page, server, view="#tokens")
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["Mine", "Pools"])
    expect(page.get_by_text("There is no such view")).to_be_visible()


def test_forced_colors_mark_only_the_current_view(page: Page, server: Server) -> None:
    page.emulate_media(forced_colors="active")
    enter(page, server)
    lines = "(links) => links.map((link) => getComputedStyle(link).borderBottomColor)"
    mine, pools = page.get_by_role("navigation").get_by_role("link").evaluate_all(lines)
    assert mine != pools == page.evaluate("getComputedStyle(document.querySelector('header')).backgroundColor")
    page.emulate_media(forced_colors="none")


def test_every_view_is_accessible_and_fits(page: Page, server: Server, client: httpx.Client) -> None:
    """In both color schemes axe finds nothing. The views fit into any width, and none breaks the page's policy."""
    ann = {"X-Token": log_in(client, "ann", "ann-secret")}
    client.post("/api/tokens", json={"name": "nightly"}, headers=ann)
    client.post("/api/pools/phones/leases", json={"labels": ["android"]}, headers=ann)
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        problems.append(message.text)

    page.on("console", note)
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"{console(server)}")
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    assert violations(page) == []
    enter(page, server, "admin", "admin")
    for view, there in VIEWS.items():
        page.evaluate("(view) => { location.hash = view }", view)
        expect(page.get_by_text(there).first).to_be_visible()
        for width in (3840, 1280, 360):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (view, width)
        page.emulate_media(color_scheme="dark")
        assert violations(page, "color-contrast") == [], view
        page.emulate_media(color_scheme="light")
        assert violations(page) == [], view
    page.evaluate("location.hash = 'pools/phones'")
    page.get_by_role("button", name="Reserve pixel-8").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert violations(page) == []
    page.remove_listener("console", note)
    assert [text for text in problems if "status of 40" not in text] == []
