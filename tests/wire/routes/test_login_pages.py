"""The pages for people: what they show, to whom, and that nothing a client sends can break or forge them."""

import html
import re
from collections.abc import Mapping
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.browsing import Visitor, cookies_of, hidden, text_of
from tests.support.journal import until
from tests.support.servers import HandClock, Server, log_in, probe
from tests.unit.test_return_to import REFUSED
from tokenauth.user_agents import short_name

APP = "http://localhost:8080"


@pytest.fixture(scope="module", name="settings")
def _settings() -> str:
    return f'[browser]\nurl = "http://localhost:8000"\nreturn_to = ["{APP}"]\n[tokens]\nper_user = 0'


@pytest.fixture
def visitor(client: httpx.Client) -> Visitor:
    return Visitor(client)


PAGES = ["/login", f"/login?rd={APP}/", "/login?rd=https://evil.example", "/logout", "/"]


@pytest.mark.parametrize("logged_in", [True, False])
@pytest.mark.parametrize("path", PAGES)
def test_every_page_has_its_policy_and_is_not_stored(visitor: Visitor, path: str, logged_in: bool) -> None:
    if logged_in:
        visitor.log_in()
    answer = visitor.get(path)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    if answer.status_code == 303:
        return
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"].split("; ")
    assert [one for one in policy if not one.startswith("style-src 'sha256-")] == [
        "default-src 'none'",
        "img-src data:",
        f"form-action 'self' {APP}",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ]
    assert "<script" not in answer.text
    assert " style=" not in answer.text


def test_password_managers_recognize_the_form(visitor: Visitor) -> None:
    fields = re.findall(r"<input [^>]+>", visitor.get("/login").text)
    assert sum('name="username"' in field and 'autocomplete="username"' in field for field in fields) == 1
    password = 'type="password"', 'autocomplete="current-password"'
    assert sum(all(word in field for word in password) for field in fields) == 1


def test_home_shows_where_i_am_logged_in_and_no_one_else(client: httpx.Client, visitor: Visitor) -> None:
    log_in(client, "ann", "ann-secret", headers={"User-Agent": "Ann's phone"})
    log_in(client, "bob", "bob-secret", headers={"User-Agent": "Bob's phone"})
    visitor.log_in()
    text = text_of(visitor.get("/").text)
    assert "Logged in as ann at localhost:8000" in text
    assert "This browser" in text
    assert "Ann's phone" in text
    assert "Bob" not in text


def test_home_lists_named_tokens_and_their_last_use(client: httpx.Client, visitor: Visitor, clock: HandClock) -> None:
    header = {"X-Token": log_in(client, "bob", "bob-secret")}
    made = client.post("/api/tokens", json={"name": "nightly"}, headers=header).json()["token"]
    client.post("/api/tokens", json={"name": "spare"}, headers=header)
    visitor.log_in("bob", "bob-secret")
    assert "nightly no use noted, until" in text_of(visitor.get("/").text)
    clock.advance(7200)
    assert probe(client, made)
    until(lambda: "nightly last used" in text_of(visitor.get("/").text), "the use is written")
    assert "spare no use noted, until" in text_of(visitor.get("/").text)


def test_log_out_everywhere_ends_logins_and_no_named_token(client: httpx.Client, visitor: Visitor) -> None:
    other, of_bob = log_in(client, "ann", "ann-secret"), log_in(client, "bob", "bob-secret")
    named = client.post("/api/tokens", json={"name": "kept"}, headers={"X-Token": other}).json()["token"]
    visitor.log_in()
    page = visitor.get("/").text
    assert "Log out everywhere" in text_of(page)
    mine = visitor.cookies["tokenauth"]
    form = {"csrf": hidden(page, "csrf"), "everywhere": hidden(page, "everywhere")}
    assert visitor.post("/logout", {**form, "csrf": "x"}).status_code == 403
    assert visitor.post("/logout", form, Sec_Fetch_Site="cross-site").status_code == 403
    assert probe(client, other)
    answer = visitor.post("/logout", form)
    assert (answer.status_code, answer.headers["location"]) == (303, "/logout?done=1")
    assert "tokenauth" not in visitor.cookies
    assert [probe(client, token) for token in (mine, other, named, of_bob)] == [False, False, True, True]


def test_log_out_everywhere_without_a_login_says_that_none_ended(client: httpx.Client, visitor: Visitor) -> None:
    visitor.log_in()
    page, other = visitor.get("/").text, log_in(client, "ann", "ann-secret")
    client.delete("/api/token", headers={"X-Token": visitor.cookies["tokenauth"]})
    answer = visitor.post("/logout", {"csrf": hidden(page, "csrf"), "everywhere": "1"})
    assert answer.status_code == 200
    assert "could not end your other logins" in text_of(answer.text)
    assert probe(client, other)


def test_a_log_out_page_without_a_cookie_claims_nothing(client: httpx.Client, visitor: Visitor) -> None:
    """A proxy may have removed the cookie."""
    assert "This browser is not logged in here." in text_of(visitor.get("/logout").text)
    csrf = hidden(visitor.get("/login").text, "csrf")
    assert visitor.post("/logout", {"csrf": csrf}).headers["location"] == "/logout"


_CHROME = "AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36"


@pytest.mark.parametrize(
    ("user_agent", "name"),
    [
        (f"Mozilla/5.0 (X11; Linux x86_64) {_CHROME}", "Chrome on Linux"),
        (f"Mozilla/5.0 (Linux; Android 10; K) {_CHROME}", "Chrome on Android"),
        (f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {_CHROME} Edg/120.0", "Edge on Windows"),
        ("Mozilla/5.0 (X11; Linux x86_64; rv:120.0) Gecko/20100101 Firefox/120.0", "Firefox on Linux"),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) AppleWebKit/605 Version/17.0 Safari/604.1",
            "Safari on iPhone",
        ),
        ("curl/8.5.0", "curl/8.5.0"),
        ("Mozilla/5.0 (Plan 9) " + "x" * 60, "Mozilla/5.0 (Plan 9) xxxxxxxxxxxxxxxxxx…"),
        ("", ""),
    ],
)
def test_a_browser_has_a_short_name(user_agent: str, name: str) -> None:
    assert short_name(user_agent) == name


def test_home_leads_to_the_login_page_without_a_login(visitor: Visitor) -> None:
    answer = visitor.get("/")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")


def test_home_lists_twenty_logins_at_most(client: httpx.Client, visitor: Visitor) -> None:
    for _ in range(25):
        log_in(client, "ann", "ann-secret")
    visitor.log_in()
    text = text_of(visitor.get("/").text)
    assert text.count("since") == 20
    assert "and 6 more" in text
    assert "This browser" in text


def test_one_who_is_logged_in_gets_a_way_on_and_no_form(visitor: Visitor) -> None:
    visitor.log_in()
    page = visitor.get(f"/login?rd={quote(f'{APP}/x?y=1&z=2')}").text
    assert f'href="{html.escape(f"{APP}/x?y=1&z=2")}"' in page
    assert "password" not in page
    assert "You are logged in as ann" in text_of(page)
    refused = visitor.get("/login?rd=https://evil.example/").text
    assert "evil.example" not in refused
    assert "You will not be sent back" in text_of(refused)


@pytest.mark.parametrize("address", REFUSED[1:], ids=lambda address: repr(address)[:60])
def test_no_login_and_no_log_out_leads_elsewhere(client: httpx.Client, address: str) -> None:
    """Whether the address is in the query of the page, in the form, or in both."""
    visitor = Visitor(client)
    for number in range(2):
        page = visitor.get("/login", rd=address)
        assert "You will not be sent back" in text_of(page.text)
        assert hidden(page.text, "rd") == ""
        csrf = hidden(page.text, "csrf")
        form = {"username": "ann", "password": "ann-secret", "csrf": csrf, **({"rd": address} if number else {})}
        answer = visitor.post("/login", form, rd=address)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        answer = visitor.post("/logout", {"csrf": csrf, **({"rd": address} if number else {})}, rd=address)
        assert (answer.status_code, answer.headers["location"]) == (303, "/logout?done=1")


def test_a_log_out_can_lead_back(visitor: Visitor) -> None:
    visitor.log_in()
    page = visitor.get("/logout", rd=f"{APP}/bye").text
    answer = visitor.post("/logout", {"csrf": hidden(page, "csrf"), "rd": hidden(page, "rd")})
    assert (answer.status_code, answer.headers["location"]) == (303, f"{APP}/bye")


def test_two_targets_are_none(visitor: Visitor) -> None:
    page = visitor.get(f"/login?rd={APP}/&rd=https://evil.example/").text
    assert "You will not be sent back" in text_of(page)
    assert "Log in at localhost:8000" in text_of(visitor.get(f"/login?rd={APP}/&rd={APP}/").text)


def test_a_log_out_ends_every_token_of_the_browser(client: httpx.Client, visitor: Visitor) -> None:
    """Two cookies are not used, but both end."""
    one, other = log_in(client, "ann", "ann-secret"), log_in(client, "bob", "bob-secret")
    page = visitor.get("/logout", Cookie=f"tokenauth={one}; tokenauth={other}").text
    cookies = f"tokenauth={one}; tokenauth={other}; tokenauth-form={hidden(page, 'csrf')}"
    answer = visitor.post("/logout", {"csrf": hidden(page, "csrf")}, Cookie=cookies)
    assert answer.status_code == 303
    assert not probe(client, one)
    assert not probe(client, other)


def test_a_cookie_that_is_not_valid_is_deleted_by_each_page(client: httpx.Client, clock: HandClock) -> None:
    expired = log_in(client, "ann", "ann-secret")
    clock.advance(24 * 3600)
    for path in ("/login", "/logout", "/"):
        for value in (expired, "x", "A" * 64):
            answer = client.get(path, headers={"Accept": "text/html", "Cookie": f"tokenauth={value}"})
            assert [cookie.name for cookie in cookies_of(answer) if cookie.deletes] == ["tokenauth"], path
            client.cookies.clear()


EVIL = ['"><script>alert(1)</script>', "'><img src=x onerror=alert(1)>", "{{ 7*7 }}", "{% raw %}", "</style>", "&lt;"]


@pytest.mark.parametrize("text", EVIL)
def test_no_text_of_a_client_becomes_markup(client: httpx.Client, visitor: Visitor, text: str) -> None:
    log_in(client, "ann", "ann-secret", headers={"User-Agent": text})
    pages = [
        visitor.get("/login", rd=text).text,
        visitor.get("/login", rd=f"{APP}/{text.replace(' ', '')}").text,
        visitor.log_in(text, "wrong").text,
    ]
    visitor.log_in()
    pages += [visitor.get("/").text, visitor.get("/login", rd=f"{APP}/{text.replace(' ', '')}").text]
    for page in pages:
        assert "<script>" not in page
        assert "<img" not in page
        assert "49" not in text_of(page)
        assert page.count("</style>") == 1


INPUTS: Mapping[str, tuple[dict[str, str], int]] = {
    "no name": ({"password": "x"}, 401),
    "no password": ({"username": "ann"}, 401),
    "a long name": ({"username": "a" * 257, "password": "x"}, 400),
    "a long password": ({"username": "ann", "password": "a" * 1025}, 400),
    "a NUL in the name": ({"username": "a\0", "password": "x"}, 400),
    "a NUL in the password": ({"username": "ann", "password": "a\0"}, 400),
    "a wrong form value": ({"username": "ann", "password": "ann-secret", "csrf": "x"}, 403),
    "a form value outside ASCII": ({"username": "ann", "password": "ann-secret", "csrf": "ä"}, 403),
    "no form value": ({"username": "ann", "password": "ann-secret", "csrf": ""}, 403),
}


@pytest.mark.parametrize("case", INPUTS)
def test_a_form_that_cannot_be_right_shows_the_page(visitor: Visitor, case: str) -> None:
    fields, status = INPUTS[case]
    csrf = hidden(visitor.get("/login").text, "csrf")
    answer = visitor.post("/login", {"csrf": csrf, **fields})
    assert answer.status_code == status
    assert 'role="alert"' in answer.text
    assert hidden(answer.text, "csrf") == csrf
    assert fields.get("password", "?") not in answer.text or fields["password"] == "x"


def test_no_form_makes_a_5xx(client: httpx.Client) -> None:
    csrf = hidden(Visitor(client).get("/login").text, "csrf")
    names = st.sampled_from(["username", "password", "csrf", "rd", "remember", "x"])
    values = st.one_of(st.binary(max_size=20), st.sampled_from([csrf.encode(), b"ann", b"%", b"%zz", b"\xff", b"+"]))
    fields = st.lists(st.tuples(names, values), max_size=8)

    @settings(max_examples=150, derandomize=True)
    @given(fields, st.sampled_from(["/login", "/logout"]), st.sampled_from(["", "?rd=%ff", "?rd", "?" + "a&" * 99]))
    def check(sent: list[tuple[str, bytes]], path: str, query: str) -> None:
        body = b"&".join(name.encode() + b"=" + value for name, value in sent)
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": f"tokenauth-form={csrf}"}
        assert client.post(path + query, content=body, headers=headers).status_code < 500
        client.cookies.clear()

    check()


@pytest.mark.parametrize("path", ["/login", "/logout", "/"])
def test_other_methods_are_405_and_change_nothing(client: httpx.Client, path: str) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, path).status_code == 405
    assert client.head(path).status_code in {200, 303}


def test_a_log_names_no_password_cookie_or_form_value(server: Server, visitor: Visitor) -> None:
    answer = visitor.log_in("ann", "ann-secret", rd=f"{APP}/secret-path")
    assert answer.status_code == 303
    visitor.post("/login", {"csrf": "wrong-value", "username": "ann", "password": "ann-secret"})
    written = server.log.read_text()
    assert '"form_refused"' in written
    for secret in ("ann-secret", "secret-path", "wrong-value", *visitor.cookies.values()):
        assert secret not in written
