"""The login page: a login sets a cookie with a token, and leads back to the page that asked for it."""

import re

import httpx
import pytest

from tests.support.browsing import Visitor, cookies_of, hidden, text_of
from tests.support.servers import HandClock, log_in, probe

APP = "http://localhost:8080"
DAY = 24 * 3600


@pytest.fixture(scope="module")
def settings() -> str:
    proxies = '[server]\ntrusted_proxies = ["192.0.2.1"]'
    return f'{proxies}\n[browser]\nurl = "http://localhost:8000"\nreturn_to = ["{APP}"]'


@pytest.fixture
def visitor(client: httpx.Client) -> Visitor:
    return Visitor(client)


def test_a_login_sets_the_cookie_and_leads_back(client: httpx.Client, visitor: Visitor) -> None:
    answer = visitor.log_in(rd=f"{APP}/reports?year=2026")
    assert (answer.status_code, answer.headers["location"]) == (303, f"{APP}/reports?year=2026")
    [cookie] = cookies_of(answer)
    assert (cookie.name, set(cookie.attributes)) == ("tokenauth", {"Path=/", "HttpOnly", "SameSite=Lax"})
    assert probe(client, cookie.value)


def test_a_login_with_remember_lives_longer(client: httpx.Client, visitor: Visitor, clock: HandClock) -> None:
    short, remembered = visitor.log_in(), Visitor(client).log_in(remember="yes")
    [cookie] = cookies_of(remembered)
    assert f"Max-Age={30 * DAY}" in cookie.attributes
    clock.advance(29 * DAY)
    assert probe(client, cookie.value)
    assert not probe(client, cookies_of(short)[0].value)


def test_a_wrong_name_and_password_get_one_page(client: httpx.Client) -> None:
    pages = []
    for username in ("ann", "nobody"):
        answer = Visitor(client).log_in(username, "wrong", rd=f"{APP}/x")
        assert answer.status_code == 401
        assert "The user name or the password is wrong." in text_of(answer.text)
        assert hidden(answer.text, "rd") == f"{APP}/x"
        pages.append(re.sub('value="[^"]*"', "", answer.text))
    assert pages[0] == pages[1]


def test_a_throttled_login_says_when_to_try_again(client: httpx.Client) -> None:
    for _ in range(6):
        Visitor(client).log_in("carl", "wrong")
    answer = Visitor(client).log_in("carl", "wrong")
    assert answer.status_code == 429
    seconds = int(answer.headers["retry-after"])
    assert f"Try again in {seconds} second" in text_of(answer.text)


def test_log_out_ends_the_token_and_clears_the_cookie(client: httpx.Client, visitor: Visitor) -> None:
    visitor.log_in()
    token = visitor.cookies["tokenauth"]
    answer = visitor.log_out()
    assert (answer.status_code, answer.headers["location"]) == (303, "/logout?done=1")
    assert "tokenauth" not in visitor.cookies
    assert not probe(client, token)
    assert "You are logged out" in text_of(visitor.get("/logout?done=1").text)


def test_a_login_replaces_the_token_of_the_cookie(client: httpx.Client, visitor: Visitor) -> None:
    """No session fixation: the token of a cookie that was planted is not used, and ends."""
    planted = log_in(client, "bob", "bob-secret")
    page = visitor.get("/login").text
    visitor.cookies["tokenauth"] = planted
    form = {"csrf": hidden(page, "csrf"), "username": "ann", "password": "ann-secret"}
    assert visitor.post("/login", form).status_code == 303
    assert visitor.cookies["tokenauth"] != planted
    assert probe(client, visitor.cookies["tokenauth"])
    assert not probe(client, planted)


FORMS = {
    "a page of this service": ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, True, 303),
    "an old browser": ({}, True, 303),
    "an old browser that sends Origin": ({"Origin": "http://localhost:8000"}, True, 303),
    "an address of this machine": ({"Sec-Fetch-Site": "same-origin", "Host": "127.0.0.1:8000"}, True, 303),
    "a rebound name": ({"Sec-Fetch-Site": "same-origin", "Origin": "null", "Host": "evil.example:8000"}, True, 403),
    "a foreign page": ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, True, 403),
    "a sibling": ({"Sec-Fetch-Site": "same-site", "Origin": APP}, True, 403),
    "a foreign page, old browser": ({"Origin": "https://evil.example"}, True, 403),
    "a foreign page, very old browser": ({}, False, 403),
    "a foreign frame, old browser": ({"Origin": "null"}, False, 403),
}


@pytest.mark.parametrize("case", FORMS)
def test_only_a_form_of_this_service_logs_in(visitor: Visitor, case: str) -> None:
    headers, has_cookie, status = FORMS[case]
    csrf = hidden(visitor.get("/login").text, "csrf")
    if not has_cookie:
        visitor.cookies.clear()
    sent = {"csrf": csrf, "username": "ann", "password": "ann-secret"}
    answer = visitor.post("/login", sent, **headers)
    assert answer.status_code == status
    assert ("tokenauth" in visitor.cookies) is (status == 303)


def test_two_cookies_of_one_name_are_not_used(client: httpx.Client) -> None:
    """A sibling host has set one of them (cookie tossing)."""
    ann, bob = log_in(client, "ann", "ann-secret"), log_in(client, "bob", "bob-secret")
    for first, second in ((ann, bob), (bob, ann), (ann, "x")):
        answer = client.get("/login", headers={"Cookie": f"tokenauth={first}; tokenauth={second}"})
        assert "two different login cookies" in text_of(answer.text)
        assert any(cookie.name == "tokenauth" and cookie.deletes for cookie in cookies_of(answer))
        assert "ann" not in text_of(answer.text)


def test_one_call_ends_the_cookie_and_a_script_token(client: httpx.Client, visitor: Visitor) -> None:
    """Both are ordinary tokens: each lists and ends the other."""
    visitor.log_in()
    cookie, script = visitor.cookies["tokenauth"], log_in(client, "ann", "ann-secret")
    me = {"X-Token": script}
    assert len(client.get("/api/tokens", headers=me).json()["tokens"]) == 2
    assert client.get("/auth?cookie", headers={"Cookie": f"tokenauth={cookie}"}).headers["x-auth-user"] == "ann"
    assert client.delete("/api/tokens", headers=me).json() == {"revoked": 2}
    assert client.get("/auth?cookie", headers={"Cookie": f"tokenauth={cookie}"}).status_code == 401
    assert not probe(client, script)
    assert "password" in visitor.get("/login").text


@pytest.mark.parametrize("query", ["note=cookies", "rd=http%3A%2F%2Flocalhost%3A8080%2F&note=cookies"])
def test_the_page_says_that_auth_saw_two_cookies(visitor: Visitor, query: str) -> None:
    assert "two different login cookies" in text_of(visitor.get(f"/login?{query}").text)
    visitor.log_in()
    assert "two different login cookies" in text_of(visitor.get(f"/login?{query}").text)
    assert "two different" not in text_of(visitor.get("/login?note=text+of+others&xnote=cookies").text)


def test_another_port_cannot_block_the_form(client: httpx.Client) -> None:
    """Over http, cookies of one name come from any port of this machine."""
    mine, other = "A" * 22, "B" * 22
    form = {"csrf": mine, "username": "ann", "password": "ann-secret"}
    for cookies in ((other, mine), (mine, other), ("x", mine)):
        header = "; ".join(f"tokenauth-form={cookie}" for cookie in cookies)
        page = client.get("/login", headers={"Cookie": header})
        answer = client.post("/login", data=form, headers={"Cookie": header})
        assert answer.status_code == 303, page.text
    answer = client.post("/login", data=form, headers={"Cookie": "tokenauth-form=x"})
    assert answer.status_code == 403
    assert "a cookie that another site set" in text_of(answer.text)


def test_a_login_address_that_is_too_long_gets_a_page(client: httpx.Client) -> None:
    for method in ("GET", "POST"):
        for path in ("/login", "/logout"):
            answer = client.request(method, f"{path}?rd={'x' * 9000}", data={"csrf": "x"})
            assert answer.headers["content-type"] == "text/html; charset=utf-8", (method, path)
