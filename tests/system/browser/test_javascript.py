"""tokenauth.js in pages of another origin: logging in and out, fetching, renewing, expiring, and where tokens go."""

import json
import re
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Response, expect

from tests.support.servers import ROOT, HandClock, Server, probe, worker, write_config
from tests.system.browser.conftest import Sites
from tests.system.browser.issuer import IDLE, Issuer, running_issuer
from tokenauth.settings.model import canonical

_OPEN = """async ([module, options]) => {
  if (!globalThis.TokenAuth) {
    globalThis.rejected = [];
    addEventListener("unhandledrejection", (event) => rejected.push(String(event.reason)));
    addEventListener("error", (event) => rejected.push(event.message));
    ({ TokenAuth: globalThis.TokenAuth } = await import(`${module}/tokenauth.js`));
  }
  globalThis.auth?.close();
  const events = (globalThis.events = []);
  globalThis.auth = new TokenAuth(options);
  for (const type of ["login", "logout"]) {
    auth.addEventListener(type, (event) => events.push(event.detail?.reason ?? type));
  }
}"""

_CLOSE = """() => {
  globalThis.auth?.close();
  sessionStorage.clear();
  return globalThis.rejected?.splice(0) ?? [];
}"""

_RUN = """async ([code, ...args]) => {
  try {
    return await (0, eval)(code)(...args);
  } catch (error) {
    return { name: error.name, code: error.code, status: error.status, wait: error.retryAfter, text: error.message };
  }
}"""

LOG_IN = "(name) => auth.login(name, `${name}-secret`)"
LOG_OUT = "() => auth.logout()"
MANY = "(url) => Promise.all([...Array(16)].map(() => auth.fetch(url).then((answer) => answer.status)))"
FETCH = "(url, init) => auth.fetch(url, init).then(async (answer) => [answer.status, await answer.text()])"


class App:
    """A page with a TokenAuth, and all that left the page: its requests and its console."""

    def __init__(self, page: Page, module: str) -> None:
        self.page = page
        self.module = module
        self.left: list[str] = []
        self.tokens: set[str] = set()
        page.on("request", self._note_request)
        page.on("console", self._note_message)
        page.on("response", self._note_response)

    def open(self, **options: object) -> None:
        """Create the TokenAuth. It replaces the one before."""
        self.page.evaluate(_OPEN, [self.module, options])

    def reload(self, **options: object) -> None:
        """Load the page again, and create the TokenAuth."""
        self.page.reload()
        self.open(**options)

    def run(self, code: str, *args: object) -> Any:
        """Run a function in the page. Return its result, or its error as a dictionary."""
        return self.page.evaluate(_RUN, [code, *args])

    def close(self) -> None:
        """Fail if a rejection was not handled, or a token left the page other than in a header."""
        rejected = self.page.evaluate(_CLOSE)
        self.page.remove_listener("request", self._note_request)
        self.page.remove_listener("console", self._note_message)
        self.page.remove_listener("response", self._note_response)
        assert rejected == []
        assert [text for text in self.left for token in self.tokens if token in text] == []

    @property
    def events(self) -> list[str]:
        """The events so far: "login", or the reason of a "logout"."""
        return list(self.page.evaluate("events"))

    def wait_for(self, *events: str) -> None:
        """Wait until these are all events so far."""
        self.page.wait_for_function("(count) => events.length >= count", arg=len(events))
        assert self.events == list(events)

    def _note_request(self, request: Request) -> None:
        self.left.append(request.url)

    def _note_message(self, message: ConsoleMessage) -> None:
        self.left.append(message.text)

    def _note_response(self, response: Response) -> None:
        token = response.request.headers.get("x-token")
        if token:
            self.tokens.add(token)


Opener = Callable[..., App]


@pytest.fixture(scope="module")
def tabs(browser: Browser, clock: HandClock) -> Iterator[BrowserContext]:
    """Open a browser context for all tests. Its tabs share channels, but not what they store for a session."""
    with browser.new_context() as made:
        made.clock.install(time=clock())
        yield made


@pytest.fixture(scope="module")
def tab(tabs: BrowserContext, sites: Sites) -> Page:
    """Open the page of another origin than the service's once: most tests only replace its TokenAuth."""
    page = tabs.new_page()
    page.goto(sites.listed["by_address"])
    return page


@pytest.fixture
def app(tabs: BrowserContext, tab: Page, server: Server, clock: HandClock) -> Iterator[App]:
    """Return the page with a TokenAuth for the service, at the service's time."""
    tabs.clock.set_system_time(clock())
    opened = App(tab, server.url)
    opened.open()
    yield opened
    opened.close()
    assert tabs.cookies() == []


@pytest.fixture
def open_tab(app: App, tabs: BrowserContext, sites: Sites) -> Iterator[Opener]:
    """Return a function that opens another tab."""
    with ExitStack() as opened:

        def opener(origin: str = "", **options: object) -> App:
            more = App(opened.enter_context(tabs.new_page()), app.module)
            opened.callback(more.close)
            more.page.goto(origin or sites.listed["by_address"])
            more.open(**options)
            return more

        yield opener


@pytest.fixture
def ann(app: App) -> App:
    """Log in."""
    assert app.run(LOG_IN, "ann") is None
    return app


@pytest.fixture
def issuer(clock: HandClock) -> Iterator[Issuer]:
    """Run the small issuer, at the service's time."""
    with running_issuer() as running:
        running.now = int(clock())
        yield running


@pytest.fixture(scope="module")
def sliding_server(tmp_path_factory: pytest.TempPathFactory, settings: str, clock: HandClock) -> Iterator[Server]:
    """Run a service whose logins slide, at the same time."""
    config = write_config(tmp_path_factory.mktemp("sliding"), f"{settings}\n[tokens]\nidle = {IDLE}")
    with worker(config, clock) as running:
        yield running


@pytest.fixture
def sliding(app: App, issuer: Issuer) -> App:
    """Log in at the small issuer."""
    app.open(url=issuer.url)
    assert app.run(LOG_IN, "ann") is None
    return app


@contextmanager
def offline(app: App) -> Iterator[None]:
    """Cut the page's network."""
    app.page.context.set_offline(True)
    try:
        yield
    finally:
        app.page.context.set_offline(False)


def advance(app: App, issuer: Issuer, seconds: int) -> None:
    """Move the clocks of the page and of the issuer."""
    issuer.now += seconds
    app.page.clock.fast_forward(seconds * 1000)


def advance_both(app: App, clock: HandClock, seconds: int) -> None:
    """Move the clocks of the page and of the service."""
    clock.advance(seconds)
    app.page.clock.fast_forward(seconds * 1000)


def renewals(server: Server) -> list[int]:
    """Return the statuses with which the service has answered renewals."""
    lines = server.events("request")
    return [line["status"] for line in lines if (line["method"], line["route"]) == ("POST", "/api/token/renew")]


def token_of(app: App) -> str:
    """Return the token of a page, from a request that carried it."""
    with app.page.expect_request(lambda request: "x-token" in request.headers) as sent:
        app.run(FETCH, f"{app.module}/api/me")
    return str(sent.value.headers["x-token"])


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the small issuer or the service sees."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_page_logs_in_fetches_and_logs_out(app: App, server: Server, client: httpx.Client) -> None:
    state = "() => [auth.loggedIn, auth.username, auth.expiresAt?.getTime() ?? null]"
    assert app.run(state) == [False, None, None]
    assert app.run(LOG_IN, "ann") is None
    status, text = app.run(FETCH, f"{server.url}/api/me")
    assert (status, '"username":"ann"' in text) == (200, True)
    (expiry,) = re.findall(r'"expiry_time":(\d+)', text)
    assert app.run(state) == [True, "ann", int(expiry) * 1000]
    token = token_of(app)
    assert probe(client, token)
    assert app.run(LOG_OUT) is None
    assert not probe(client, token)
    assert app.run(state) == [False, None, None]
    assert app.events == ["login", "logout"]
    assert app.run(LOG_OUT) is None
    assert app.events == ["login", "logout"]


def test_a_wrong_password_and_the_wait_are_typed_errors(app: App) -> None:
    wrong = "() => auth.login('ann', 'wrong')"
    error = {"name": "TokenAuthError", "code": "invalid_credentials", "status": 401, "wait": None}
    assert app.run(wrong) == error | {"text": "Wrong user name or password."}
    found = next(found for _ in range(10) if (found := app.run(wrong))["code"] != "invalid_credentials")
    assert (found["code"], found["status"], found["wait"] > 0) == ("too_many_attempts", 429, True)
    assert found["text"] == f"Too many failed logins. Try again in {found['wait']} seconds."
    missing = app.run("() => auth.login('ann')")
    assert (missing["code"], missing["status"]) == ("unexpected_answer", 400)
    assert missing["text"].endswith('answered 400: Missing field "password".')
    assert app.events == []


def test_an_unavailable_store_is_no_logout(ann: App, server: Server, directory: Path) -> None:
    with closing(sqlite3.connect(directory / "tokenauth.db", isolation_level=None)) as database:
        database.execute("ALTER TABLE tokens RENAME TO elsewhere")
        try:
            error = ann.run("() => auth.login('bob', 'bob-secret')")
            assert (error["code"], error["status"], error["wait"] > 0) == ("unavailable", 503, True)
        finally:
            database.execute("ALTER TABLE elsewhere RENAME TO tokens")
    assert ann.run("() => [auth.loggedIn, auth.username]") == [True, "ann"]
    assert ann.run(FETCH, f"{server.url}/api/me")[0] == 200


def test_a_page_of_an_unlisted_origin_is_told_the_setting(open_tab: Opener, sites: Sites) -> None:
    origin = sites.unlisted["another_name"]
    error = open_tab(origin).run(LOG_IN, "ann")
    assert (error["name"], error["code"]) == ("TokenAuthError", "unreachable")
    assert error["text"].endswith(f"its cors_origins must list {origin}.")


NO_LOGINS = [
    *(
        f'{{"token": "{token}", "expiry_time": 2000000000}}'
        for token in ("", "a b", r"a\r\nX-A: 1", r"\u4e2d", r"\u00e9")
    ),
    *(f'{{"token": "a", "expiry_time": {time}}}' for time in ("1e400", "8.64e15", "-1", "null", '"2000000000"')),
]
"""Answers to a login whose token cannot be sent, or whose time no Date can have."""


def test_another_server_is_an_unexpected_answer(app: App, issuer: Issuer) -> None:
    """Single-page applications often answer every path with their page."""
    app.open(url=f"{issuer.url}/base")
    for status, body in ((200, "<!doctype html>"), (200, "null"), (200, '{"token": 1}'), (404, "no")):
        issuer.answer("POST", "/base/api/token", status, body)
        error = app.run(LOG_IN, "ann")
        assert (error["code"], error["status"]) == ("unexpected_answer", status), body
        assert error["text"] == f"{issuer.url}/base/ answered {status}: is this the URL of a tokenauth server?"
    for body in NO_LOGINS:
        issuer.answer("POST", "/base/api/token", 200, body)
        assert app.run(LOG_IN, "ann")["code"] == "unexpected_answer", body
        assert app.run(LOG_OUT) is None, body
    for body in ('{"error_description": {"toString": 1}}', '{"error_description": ["a"]}', '{"error_description": 1}'):
        issuer.answer("POST", "/base/api/token", 400, body)
        error = app.run(LOG_IN, "ann")
        assert error["text"] == f"{issuer.url}/base/ answered 400: is this the URL of a tokenauth server?", body
    issuer.answer("POST", "/base/api/token", 400, '{"error":"invalid_request","error_description":"Because."}')
    assert app.run(LOG_IN, "ann")["text"] == f"{issuer.url}/base/ answered 400: Because."
    assert app.run("() => auth.loggedIn") is False


MISTAKES: list[tuple[dict[str, object], str]] = [
    ({"origins": ["*"]}, "origins: must be an origin such as"),
    ({"origins": ["https://api.example.com/"]}, "origins: must be an origin such as"),
    ({"origins": ["https://API.example.com"]}, "origins: must be an origin such as"),
    ({"origins": ["https://u@api.example.com"]}, "origins: must be an origin such as"),
    ({"origins": ["null"]}, "origins: must be an origin such as"),
    ({"url": "javascript:1"}, "url: must be a URL such as"),
    ({"url": "https://"}, "url: must be a URL such as"),
    ({"storage": "local"}, 'storage: must be "memory" or "session", not "local".'),
    ({"header": "Cookie"}, 'header: must be "X-Token" or "Authorization", not "Cookie".'),
]


def test_a_mistake_in_the_options_is_named(app: App) -> None:
    for options, message in MISTAKES:
        error = app.run("(options) => new TokenAuth(options)", options)
        assert (error["name"], error["code"]) == ("TokenAuthError", "invalid_option"), options
        assert error["text"].startswith(message), options


def test_a_double_click_logs_in_once(app: App, server: Server) -> None:
    before = len(server.events("token_issued"))
    twice = "() => Promise.all([1, 2].map(() => auth.login('ann', 'ann-secret'))).then(() => auth.loggedIn)"
    assert app.run(twice) is True
    assert app.events == ["login"]
    assert len(server.events("token_issued")) == before + 1


def test_another_login_at_the_same_time_is_refused(app: App) -> None:
    code = """() => {
      const first = auth.login("ann", "ann-secret");
      const others = [auth.login("bob", "ann-secret"), auth.login("ann", "bob-secret")];
      return Promise.all(others.map((each) => each.catch((error) => error.code))).finally(() => first);
    }"""
    assert app.run(code) == ["login_pending", "login_pending"]
    app.wait_for("login")
    assert app.run("() => auth.username") == "ann"


def test_a_new_login_revokes_the_token_of_the_old(ann: App, server: Server, client: httpx.Client) -> None:
    old = token_of(ann)
    with ann.page.expect_response(lambda answer: answer.request.method == "DELETE" and answer.ok):
        assert ann.run(LOG_IN, "bob") is None
    assert ann.run("() => auth.username") == "bob"
    assert not probe(client, old)
    assert probe(client, token_of(ann))
    assert ann.events == ["login", "login"]


def test_a_failed_login_keeps_the_one_before(ann: App) -> None:
    assert ann.run("() => auth.login('bob', 'wrong')")["code"] == "invalid_credentials"
    assert ann.run("() => auth.username") == "ann"


HELD = """(name) => {
  globalThis.held = auth.login(name, "x").then(() => "done", (error) => error.code);
}"""


def test_a_logout_does_not_wait_for_a_login(sliding: App, issuer: Issuer, open_tab: Opener) -> None:
    """Neither here nor in other tabs, whose logins it ends, too, also one that has not finished."""
    more, waiting = open_tab(url=issuer.url), open_tab(url=issuer.url)
    assert more.run(LOG_IN, "ann") is None
    gate = issuer.hold("POST", "/api/token")
    sliding.run(HELD, "bob")
    waiting.run(HELD, "ann")
    until(lambda: issuer.count("POST", "/api/token") == 4)
    assert sliding.run(LOG_OUT) is None
    assert sliding.run("() => held") == "logged_out"
    assert sliding.run(FETCH, f"{issuer.url}/data")["code"] == "logged_out"
    more.wait_for("login", "other_tab")
    assert waiting.run("() => held") == "logged_out"
    until(lambda: not issuer.tokens)
    gate.set()
    until(lambda: issuer.count("DELETE", "/api/token") == 4)
    assert (sliding.events, waiting.events, issuer.tokens) == (["login", "logout"], [], {})


def test_a_token_that_comes_after_its_abort_is_revoked(app: App, issuer: Issuer) -> None:
    app.open(url=issuer.url)
    gate = issuer.hold("POST", "/api/token")
    abort = """(name) => {
      const abort = new AbortController();
      globalThis.held = auth.login(name, "x", { signal: abort.signal }).catch((error) => error.name);
      abort.abort();
      return held;
    }"""
    assert app.run(abort, "ann") == "AbortError"
    gate.set()
    until(lambda: issuer.count("DELETE", "/api/token") == 1)
    assert (app.events, issuer.tokens) == ([], {})


def test_who_joins_a_login_can_leave_it(app: App, issuer: Issuer) -> None:
    app.open(url=issuer.url)
    gate = issuer.hold("POST", "/api/token")
    app.run(HELD, "ann")
    join = "() => auth.login('ann', 'x', { signal: AbortSignal.abort() })"
    assert app.run(join)["name"] == "AbortError"
    leave = """() => {
      const abort = new AbortController();
      const joined = auth.login("ann", "x", { signal: abort.signal });
      abort.abort();
      return joined;
    }"""
    assert app.run(leave)["name"] == "AbortError"
    gate.set()
    assert app.run("() => held") == "done"
    assert (app.events, issuer.count("POST", "/api/token")) == (["login"], 1)


def test_an_abort_after_a_login_changes_nothing(app: App, issuer: Issuer) -> None:
    app.open(url=issuer.url)
    code = """() => {
      const abort = new AbortController();
      auth.addEventListener("login", () => abort.abort());
      return auth.login("ann", "x", { signal: abort.signal });
    }"""
    assert app.run(code) is None
    assert app.run("() => auth.username") == "ann"


@pytest.mark.parametrize(("method", "seconds"), [("POST", 30), ("DELETE", 10)])
def test_no_answer_is_waited_for_without_a_limit(app: App, issuer: Issuer, method: str, seconds: int) -> None:
    app.open(url=issuer.url)
    gate = issuer.hold(method, "/api/token")
    if method == "DELETE":
        app.run(LOG_IN, "ann")
    code = "() => { globalThis.held = %s.catch((error) => [error.code, error.message.split(' ').at(-2)]); }"
    app.run(code % ("auth.logout()" if method == "DELETE" else "auth.login('ann', 'x')"))
    until(lambda: issuer.count(method, "/api/token") == 1)
    app.page.clock.fast_forward(seconds * 1000)
    assert app.run("() => held") == ["unreachable", str(seconds)]
    gate.set()
    assert app.run(LOG_IN, "bob") is None
    assert app.run(LOG_OUT) is None


def test_one_failed_revocation_stops_no_other(app: App, issuer: Issuer) -> None:
    app.open(url=issuer.url)
    issuer.answer("DELETE", "/api/token", 503)
    with app.page.expect_response(lambda answer: answer.request.method == "DELETE"):
        for name in ("ann", "bob"):
            app.run(LOG_IN, name)
    assert app.run(LOG_OUT)["code"] == "unavailable"  # as soon as one has failed; the other is under way
    both = {f"{0:064}", f"{1:064}"}
    until(lambda: {each.token for each in issuer.seen if each.method == "DELETE"} == both)
    issuer.answers.clear()
    assert app.run(LOG_OUT) is None
    assert issuer.tokens == {}


def test_an_aborted_login_can_be_repeated(app: App, issuer: Issuer) -> None:
    app.open(url=issuer.url)
    gate = issuer.hold("POST", "/api/token")
    code = """() => {
      globalThis.abort = new AbortController();
      globalThis.first = auth.login("ann", "x", { signal: abort.signal }).catch((error) => error.name);
    }"""
    app.run(code)
    until(lambda: issuer.count("POST", "/api/token") == 1)
    assert app.run("() => { abort.abort(); return first; }") == "AbortError"
    assert app.events == []
    gate.set()
    assert app.run(LOG_IN, "ann") is None
    assert app.events == ["login"]


def test_without_a_login_nothing_is_sent(app: App, issuer: Issuer) -> None:
    app.open(url=issuer.url)
    assert app.run(FETCH, f"{issuer.url}/data")["code"] == "logged_out"
    assert issuer.seen == []


FOREIGN = ["http://localhost:{port}/", "https://127.0.0.1:{port}/", "http://127.0.0.1:1/", "http://127.0.0.2:{port}/",
           "//localhost:{port}/", "/relative", "data:text/plain,x", "\thttp:\\\\localhost:{port}\\"]  # fmt: skip


def test_an_unlisted_origin_gets_no_request(sliding: App, issuer: Issuer) -> None:
    """Not even one without a token: a caller who asked for the token would not notice that it is missing."""
    codes = (FETCH, "(url) => auth.fetch(new Request(url))", "(url) => auth.fetch(new URL(url, location.href))")
    before = len(issuer.seen)
    for url, code in product(FOREIGN, codes):
        error = sliding.run(code, url.format(port=issuer.server_port))
        assert (error["name"], error["code"]) == ("TokenAuthError", "origin_not_listed"), (url, code)
    assert len(issuer.seen) == before


def test_a_listed_origin_gets_the_token(app: App, issuer: Issuer) -> None:
    with running_issuer() as api:
        api.now, api.tokens = issuer.now, issuer.tokens
        app.open(url=issuer.url, origins=[api.url])
        app.run(LOG_IN, "ann")
        assert app.run(FETCH, f"{api.url}/data")[0] == 200
        app.open(url=issuer.url, origins=[api.url], header="Authorization")
        app.run(LOG_IN, "bob")
        assert app.run(FETCH, f"{api.url}/data")[0] == 200
        assert [each.headers.get("x-token") for each in api.seen] == [f"{0:064}", None]
        assert [each.headers.get("authorization") for each in api.seen] == [None, f"Bearer {1:064}"]


def test_a_redirect_takes_no_token_elsewhere(sliding: App, issuer: Issuer) -> None:
    with running_issuer() as thief:
        for status, mode in product((301, 302, 303, 307, 308), ("follow", "manual", "error")):
            path = f"/moved/{status}/{mode}"
            issuer.answer("GET", path, status, Location=f"{thief.url}/stolen")
            error = sliding.run(FETCH, f"{issuer.url}{path}?secret=1", {"redirect": mode})
            found = (error["code"], error["text"].partition(". ")[0])
            assert found == ("redirected", f"{issuer.url}{path} answered with a redirect"), (status, mode)
            assert issuer.count("GET", path) == 1
        assert thief.seen == []


def test_a_request_object_keeps_all_that_it_has(sliding: App, issuer: Issuer) -> None:
    url = f"{issuer.url}/upload"
    code = """async (url) => {
      const headers = { "X-Trace": "7", "Content-Type": "text/csv", "X-Token": "not this one" };
      const init = { method: "PUT", body: "a,b", headers, referrerPolicy: "unsafe-url" };
      await auth.fetch(new Request(url, init));
      await auth.fetch(new Request(url, { ...init, method: "POST" }), { headers: { "X-Trace": "8" } });
      const form = new FormData();
      form.append("file", new Blob(["text"]), "name.txt");
      await auth.fetch(url, { method: "POST", body: form });
      await auth.fetch(new Request(url, { referrerPolicy: "no-referrer" }));
    }"""
    assert sliding.run(code, url) is None
    put_, post, form, get = (each for each in issuer.seen if each.path == "/upload")
    assert (put_.method, put_.body, put_.headers["content-type"]) == ("PUT", b"a,b", "text/csv")
    assert (put_.headers["x-trace"], put_.token) == ("7", f"{0:064}")
    assert put_.headers["referer"] == sliding.page.url
    assert (post.method, post.body, post.headers["x-trace"], post.token) == ("POST", b"a,b", "8", f"{0:064}")
    assert form.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert b"name.txt" in form.body
    assert "referer" not in get.headers


def test_fetch_can_be_passed_on_and_streams(sliding: App, issuer: Issuer) -> None:
    code = """async (url) => {
      const { fetch } = auth;
      const answer = await fetch(url);
      const { value } = await answer.body.getReader().read();
      const stream = new Blob(["text"]).stream();
      const sent = fetch(url, { method: "POST", body: stream, duplex: "half" }).catch((error) => error.message);
      return [answer.status, value.length > 0, await sent];
    }"""
    # Chromium sends streams over HTTP/2 only.
    assert sliding.run(code, f"{issuer.url}/data") == [200, True, "Failed to fetch"]


def test_a_request_without_cors_is_refused(sliding: App, issuer: Issuer) -> None:
    assert sliding.run(FETCH, f"{issuer.url}/data", {"mode": "no-cors"})["code"] == "invalid_request"
    assert issuer.count("GET", "/data") == 0


def test_an_aborted_fetch_rejects_as_fetch_does(sliding: App, issuer: Issuer) -> None:
    issuer.hold("GET", "/slow")
    code = """(url) => {
      globalThis.abort = new AbortController();
      globalThis.slow = auth.fetch(url, { signal: abort.signal }).catch((error) => error);
    }"""
    sliding.run(code, f"{issuer.url}/slow")
    until(lambda: issuer.count("GET", "/slow") == 1)
    assert sliding.run("() => { abort.abort('mine'); return slow; }") == "mine"
    assert sliding.run("(url) => auth.fetch(url, { signal: AbortSignal.abort() })", f"{issuer.url}/x")["name"] == (
        "AbortError"
    )
    assert (issuer.count("GET", "/x"), sliding.events) == (0, ["login"])


def test_without_a_network_the_login_stays(sliding: App, issuer: Issuer) -> None:
    """No request is repeated, either."""
    with offline(sliding):
        error = sliding.run(FETCH, f"{issuer.url}/data", {"method": "POST"})
    assert (error["name"], error["code"]) == ("TypeError", None)
    assert sliding.run(FETCH, f"{issuer.url}/data", {"method": "POST"})[0] == 200
    assert (sliding.events, issuer.count("POST", "/data")) == (["login"], 1)


def test_a_logout_without_a_network_can_be_repeated(sliding: App, issuer: Issuer) -> None:
    with offline(sliding):
        error = sliding.run(LOG_OUT)
    assert (error["name"], error["code"]) == ("TokenAuthError", "unreachable")
    assert error["text"].startswith("This page has logged out, but the token is still valid: try again.")
    assert (sliding.events, sliding.run("() => auth.loggedIn")) == (["login", "logout"], False)
    assert len(issuer.tokens) == 1
    assert sliding.run(LOG_OUT) is None
    assert (sliding.events, issuer.tokens) == (["login", "logout"], {})
    assert sliding.run(LOG_OUT) is None
    assert issuer.count("DELETE", "/api/token") == 1


def test_many_401s_of_a_revoked_token_are_one_event(ann: App, server: Server, client: httpx.Client) -> None:
    client.delete("/api/token", headers={"X-Token": token_of(ann)})
    probes: list[str] = []
    ann.page.on("request", lambda request: probes.append(request.url) if "touch=0" in request.url else None)
    assert ann.run(MANY, f"{server.url}/api/me") == [401] * 16
    assert (ann.events, ann.run("() => auth.loggedIn"), len(probes)) == (["login", "revoked"], False, 1)


def test_a_401_of_an_api_for_other_reasons_ends_nothing(sliding: App, issuer: Issuer) -> None:
    issuer.answer("GET", "/picky", 401, "no")
    assert sliding.run(FETCH, f"{issuer.url}/picky") == [401, "no"]
    issuer.answer("GET", "/api/token", 503)
    assert sliding.run(FETCH, f"{issuer.url}/picky") == [401, "no"]
    assert sliding.events == ["login"]


@pytest.mark.parametrize("held", ["/picky", "/api/token"])
def test_a_late_answer_does_not_end_the_next_login(sliding: App, issuer: Issuer, held: str) -> None:
    """Neither the 401 of an API, nor the answer about the token that is asked for after one."""
    issuer.answer("GET", "/picky", 401, "no")
    issuer.answer("GET", "/api/token", 200, '{"valid": false, "expiry_time": null}')
    gate = issuer.hold("GET", held)
    sliding.run("(url) => { globalThis.old = auth.fetch(url).then((answer) => answer.status); }", f"{issuer.url}/picky")
    until(lambda: issuer.count("GET", held) == 1)
    sliding.run(LOG_OUT)
    sliding.run(LOG_IN, "bob")
    gate.set()
    assert sliding.run("() => old") == 401
    assert sliding.events == ["login", "logout", "login"]


def test_a_fixed_lifetime_ends_with_one_event(ann: App, clock: HandClock) -> None:
    advance_both(ann, clock, 24 * 3600 - 60)
    assert (ann.run("() => auth.loggedIn"), ann.events) == (True, ["login"])
    advance_both(ann, clock, 60)
    ann.wait_for("login", "expired")
    ann.page.clock.fast_forward(600_000)
    assert ann.events == ["login", "expired"]


def test_an_expired_login_ends_without_a_network(ann: App) -> None:
    with offline(ann):
        ann.page.clock.fast_forward(24 * 3600 * 1000)
        ann.wait_for("login", "expired")


def test_a_tab_that_slept_ends_its_login_when_it_is_seen(sliding: App, issuer: Issuer) -> None:
    """While a computer sleeps, timers stop and the clock goes on."""
    sliding.page.clock.pause_at(issuer.now + 60)
    issuer.now += 2 * IDLE
    sliding.page.clock.set_system_time(issuer.now)
    assert sliding.events == ["login"]
    sliding.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    sliding.wait_for("login", "expired")
    sliding.page.clock.resume()


def test_a_page_of_the_back_button_asks_at_once(sliding: App, issuer: Issuer) -> None:
    """Playwright switches Chromium's cache of such pages off, so the event is made by hand."""
    show = "(persisted) => dispatchEvent(new PageTransitionEvent('pageshow', { persisted }))"
    sliding.run(show, False)
    assert sliding.run(FETCH, f"{issuer.url}/data")[0] == 200
    assert issuer.count("GET", "/api/token") == 0
    issuer.tokens.clear()
    sliding.run(show, True)
    sliding.wait_for("login", "revoked")


def test_an_abort_ends_the_wait_for_an_answer(sliding: App, issuer: Issuer) -> None:
    """The API has answered 401, and tokenauth does not answer whether the token is valid."""
    issuer.answer("GET", "/picky", 401, "no")
    issuer.hold("GET", "/api/token")
    code = """(url) => {
      globalThis.abort = new AbortController();
      globalThis.waiting = auth.fetch(url, { signal: abort.signal }).catch((error) => error.name);
    }"""
    sliding.run(code, f"{issuer.url}/picky")
    until(lambda: issuer.count("GET", "/api/token") == 1)
    assert sliding.run("() => { abort.abort(); return waiting; }") == "AbortError"
    assert sliding.events == ["login"]


def test_a_request_after_sleep_is_not_sent(sliding: App, issuer: Issuer) -> None:
    issuer.now += 2 * IDLE
    sliding.page.clock.set_system_time(issuer.now)
    assert sliding.run(FETCH, f"{issuer.url}/data")["code"] == "logged_out"
    assert (sliding.events, issuer.count("GET", "/data")) == (["login", "expired"], 0)


def test_many_requests_share_one_renewal(app: App, sliding_server: Server, clock: HandClock) -> None:
    app.open(url=sliding_server.url)
    assert app.run(LOG_IN, "ann") is None
    data = f"{sliding_server.url}/api/me"
    assert app.run(MANY, data) == [200] * 16
    assert renewals(sliding_server) == []
    advance_both(app, clock, IDLE)
    assert app.run(MANY, data) == [200] * 16
    end = (int(clock()) + IDLE * 5 // 4) * 1000
    app.page.wait_for_function("(end) => auth.expiresAt.getTime() >= end", arg=end)
    assert app.run(MANY, data) == [200] * 16
    assert renewals(sliding_server) == [200]
    assert app.events == ["login"]


def test_no_request_waits_for_a_renewal(sliding: App, issuer: Issuer) -> None:
    advance(sliding, issuer, IDLE)
    gate = issuer.hold("POST", "/api/token/renew")
    assert sliding.run(MANY, f"{issuer.url}/data") == [200] * 16
    gate.set()
    end = (issuer.now + IDLE * 5 // 4) * 1000
    sliding.page.wait_for_function("(end) => auth.expiresAt.getTime() === end", arg=end)


def test_a_login_in_use_lives_until_its_absolute_end(sliding: App, issuer: Issuer) -> None:
    latest = issuer.now + issuer.max_ttl
    for renewals in range(1, 12):
        advance(sliding, issuer, IDLE - 60)
        assert sliding.run(FETCH, f"{issuer.url}/data")[0] == 200
        end = min(issuer.now + IDLE * 5 // 4, latest) * 1000
        sliding.page.wait_for_function("(end) => auth.expiresAt.getTime() === end", arg=end)
        assert issuer.count("POST", "/api/token/renew") == renewals
    advance(sliding, issuer, latest - issuer.now - 60)
    assert sliding.run(FETCH, f"{issuer.url}/data")[0] == 200
    advance(sliding, issuer, 60)
    sliding.wait_for("login", "expired")
    assert issuer.count("POST", "/api/token/renew") == 11, "cannot be renewed beyond its absolute end"


def test_a_fixed_lifetime_is_asked_for_once(ann: App, server: Server, clock: HandClock) -> None:
    before, data = len(renewals(server)), f"{server.url}/api/me"
    advance_both(ann, clock, 19 * 3600)
    with ann.page.expect_response("**/api/token?touch=0") as answered:
        assert ann.run(FETCH, data)[0] == 200
    answered.value.finished()
    assert ann.run(FETCH, data)[0] == 200  # now the page has read the answer, and no timeout is running
    for _ in range(3):
        advance_both(ann, clock, 3600)
        assert ann.run(MANY, data) == [200] * 16
    assert renewals(server)[before:] == [409]
    advance_both(ann, clock, 2 * 3600)
    ann.wait_for("login", "expired")


def test_a_failed_renewal_stops_no_request(sliding: App, issuer: Issuer) -> None:
    for status in (404, 500, 503):
        assert sliding.run(LOG_IN, "ann") is None
        issuer.seen.clear()
        issuer.answer("POST", "/api/token/renew", status, "no")
        advance(sliding, issuer, IDLE)
        for count in (1, 2):
            with sliding.page.expect_response("**/renew"):
                assert sliding.run(MANY, f"{issuer.url}/data") == [200] * 16, status
            assert sliding.run(MANY, f"{issuer.url}/data") == [200] * 16, status
            assert issuer.count("POST", "/api/token/renew") == count, status
            advance(sliding, issuer, 11)
        del issuer.answers["POST", "/api/token/renew"]
        with sliding.page.expect_response("**/renew"):
            assert sliding.run(MANY, f"{issuer.url}/data") == [200] * 16, status
        assert issuer.count("POST", "/api/token/renew") == 3, status
    assert sliding.events == ["login"] * 4


def test_a_renewal_that_is_refused_ends_the_login(sliding: App, issuer: Issuer) -> None:
    issuer.answer("POST", "/api/token/renew", 401, "{}")
    advance(sliding, issuer, IDLE)
    assert sliding.run(FETCH, f"{issuer.url}/data")[0] == 200
    sliding.wait_for("login", "revoked")


def test_a_token_that_was_used_elsewhere_lives_on(sliding: App, issuer: Issuer) -> None:
    """The page hears of it when the end that it knows is reached."""
    issuer.now += IDLE
    issuer.use(f"{0:064}")
    issuer.now += IDLE
    end = issuer.tokens[f"{0:064}"][0] * 1000
    sliding.page.clock.fast_forward(2 * IDLE * 1000)
    sliding.page.wait_for_function("(end) => auth.expiresAt?.getTime() === end", arg=end)
    assert sliding.run(FETCH, f"{issuer.url}/data")[0] == 200
    assert sliding.events == ["login"]


def test_a_wrong_clock_ends_no_login(app: App, issuer: Issuer) -> None:
    for off in (-365 * 86400, -3600, 3600, 365 * 86400):
        app.open(url=issuer.url)
        app.page.clock.set_system_time(issuer.now + off)
        assert app.run(LOG_IN, "ann") is None, off
        for _ in range(5):
            advance(app, issuer, 31)
            assert app.run(FETCH, f"{issuer.url}/data")[0] == 200, off
        assert app.events == ["login"], off
        issuer.tokens.clear()
        assert app.run(FETCH, f"{issuer.url}/data")[0] == 401, off
        assert app.events[0] == "login", off
        assert app.events[1:] in (["revoked"], ["expired"]), off


def test_memory_forgets_at_a_reload(ann: App) -> None:
    assert ann.run("() => [sessionStorage.length, localStorage.length, document.cookie]") == [0, 0, ""]
    ann.reload()
    assert ann.run("() => auth.loggedIn") is False


def test_session_storage_keeps_over_a_reload(app: App, server: Server) -> None:
    app.open(storage="session")
    app.run(LOG_IN, "ann")
    app.reload(storage="session")
    assert app.run("() => [auth.loggedIn, auth.username, localStorage.length]") == [True, "ann", 0]
    assert app.run(FETCH, f"{server.url}/api/me")[0] == 200
    assert app.run(LOG_OUT) is None
    assert app.run("() => sessionStorage.length") == 0
    app.reload(storage="session")
    assert app.run("() => auth.loggedIn") is False


def test_nonsense_in_the_storage_is_no_login(app: App, server: Server) -> None:
    login = '{"username": "ann", "token": "%s", "expiresAt": %s}'
    wrong = [login % each for each in ((r"a\r\nb", "9e14"), ("", "9e14"), ("a", "9e15"), ("a", '"9e14"'))]
    for stored in ("", "{", "null", "7", '"x"', "{}", '{"expiresAt": 1}', '{"expiresAt": 9e14}', *wrong):
        app.run("(key, value) => sessionStorage.setItem(key, value)", f"tokenauth {server.url}/", stored)
        app.open(storage="session")
        assert app.run("() => [auth.loggedIn, sessionStorage.length]") == [False, 0], stored


def test_a_sandboxed_page_keeps_the_login_in_memory(open_tab: Opener, issuer: Issuer, sites: Sites) -> None:
    """Its storage throws, and its origin is null."""
    app = open_tab(f"{sites.listed['by_address']}/framed")
    frame = app.page.main_frame.child_frames[0]
    frame.evaluate(_OPEN, [app.module, {"url": issuer.url, "storage": "session"}])
    assert frame.evaluate("auth.login('ann', 'x').then(() => auth.loggedIn)") is True


@pytest.mark.parametrize("typed", ["ANN", "\uff21nn"])
def test_a_user_is_the_same_however_typed(ann: App, open_tab: Opener, typed: str) -> None:
    other = open_tab()
    assert other.run("(name) => auth.login(name, 'ann-secret')", typed) is None
    assert ann.run(LOG_OUT) is None
    other.wait_for("login", "other_tab")


def test_names_are_the_same_that_the_server_says(app: App) -> None:
    """For every character that this Python knows."""
    code = """async ([module, letters]) => {
      const source = await (await fetch(`${module}/tokenauth.js`)).text();
      const url = URL.createObjectURL(new Blob([source, "export { canonical };"], { type: "text/javascript" }));
      const { canonical } = await import(url);
      return JSON.stringify([...letters].map(canonical));
    }"""
    letters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in {"Cn", "Cs", "Co"}]
    found = json.loads(app.page.evaluate(code, [app.module, "".join(letters)]))  # lists take Playwright seconds
    pairs = {(canonical(letter), name) for letter, name in zip(letters, found, strict=True)}
    assert len(letters) > 100_000
    assert len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs}) == len(pairs)


def test_a_logout_ends_the_other_tabs_of_the_user(ann: App, open_tab: Opener, client: httpx.Client) -> None:
    other, third = (open_tab(storage=storage) for storage in ("session", "memory"))
    for app, name in ((other, "ann"), (third, "bob")):
        app.run(LOG_IN, name)
    token = token_of(other)
    with other.page.expect_response(lambda answer: answer.request.method == "DELETE" and answer.ok):
        assert ann.run(LOG_OUT) is None
    other.wait_for("login", "other_tab")
    assert not probe(client, token)
    assert other.run("() => sessionStorage.length") == 0
    assert ann.events == ["login", "logout"]
    assert (third.run("() => auth.username"), third.events) == ("bob", ["login"])


def test_a_closed_object_does_nothing_more(ann: App, server: Server, clock: HandClock) -> None:
    assert ann.run("() => auth.close()") is None
    clock.advance(24 * 3600)
    ann.page.clock.fast_forward(24 * 3600 * 1000)
    ann.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert (ann.run("() => auth.loggedIn"), ann.events) == (True, ["login"])
    assert ann.run(LOG_OUT) is None
    assert ann.events == ["login", "logout"]


def test_the_token_is_not_a_property(ann: App) -> None:
    code = """() => [JSON.stringify(auth), String(auth), Object.keys(auth).join(), JSON.stringify({ ...auth })]"""
    token = token_of(ann)
    assert token not in "".join(ann.run(code))
    assert ann.run("() => Object.keys(auth)") == ["fetch"]


def test_a_throwing_listener_stops_nothing(app: App) -> None:
    app.run("() => auth.addEventListener('login', () => { throw new Error('mine'); })")
    assert app.run(LOG_IN, "ann") is None
    assert app.run(LOG_OUT) is None
    assert app.events == ["login", "logout"]
    assert app.page.evaluate("rejected.splice(0)") == ["Uncaught Error: mine"]


def shown_page() -> str:
    """Return the page of docs/javascript.md."""
    (page,) = re.findall(r"^```html\n(.*?)^```$", (ROOT / "docs/javascript.md").read_text(), re.MULTILINE | re.DOTALL)
    return str(page)


@pytest.fixture
def documented(
    tabs: BrowserContext, sites: Sites, server: Server, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Page]:
    """Open the page of docs/javascript.md as it is, with the URL of this service."""
    monkeypatch.setattr(sites.one, "page", shown_page().replace("http://localhost:8000", server.url))
    tabs.clock.set_system_time(clock())
    page = tabs.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(error.message))
    page.goto(sites.listed["by_address"])
    yield page
    page.close()
    assert problems == []


def enter(page: Page, password: str) -> None:
    page.get_by_label("Name").fill("ann")
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()


def test_the_documented_page_works(documented: Page, client: httpx.Client, clock: HandClock) -> None:
    page, alert = documented, documented.get_by_role("alert")
    enter(page, "wrong")
    expect(alert).to_have_text("Wrong user name or password.")
    enter(page, "ann-secret")
    expect(page.locator("main")).to_contain_text("ann")
    expect(page.locator("pre")).to_contain_text('"scopes":["read","write"]')
    expect(page.locator("form")).to_be_hidden()
    page.reload()
    expect(page.locator("pre")).to_contain_text('"username":"ann"')
    page.get_by_role("button", name="Log out").click()
    expect(page.locator("form")).to_be_visible()
    expect(page.locator("pre")).to_have_text("")
    enter(page, "ann-secret")
    expect(page.locator("main")).to_be_visible()
    clock.advance(24 * 3600)
    page.clock.fast_forward(24 * 3600 * 1000)
    expect(alert).to_have_text("Your login has expired.")
    expect(page.locator("main")).to_be_hidden()


def test_the_documented_page_waits_for_the_module(
    tabs: BrowserContext, sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the module, the browser itself would send the form, and put the password into the address."""
    monkeypatch.setattr(sites.one, "page", shown_page().replace("http://localhost:8000", "http://127.0.0.1:1"))
    page = tabs.new_page()
    page.goto(sites.listed["by_address"])
    expect(page.get_by_role("status")).to_have_text("The login service has not answered yet.")
    expect(page.locator("form")).to_be_hidden()
    expect(page.locator("form")).to_have_attribute("method", "post")
    page.close()
