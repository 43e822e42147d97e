"""A browser is sent only to listed origins: addresses that open-redirect attacks use are refused."""

import pytest

from tokenauth.settings.model import BrowserSettings
from tokenauth.web.return_to import MAX_LENGTH, ReturnTo

WILD = ReturnTo(
    BrowserSettings(
        url="https://auth.example.com",
        domain="example.com",
        return_to=("https://*.example.com", "https://other.example.com:8443"),
    )
)
LOCAL = ReturnTo(BrowserSettings(url="http://localhost:8000", return_to=("http://localhost:8080",)))
ONE = ReturnTo(BrowserSettings(url="https://app.example.com"))

REFUSED = [
    "",
    "/",
    "/path",
    "path",
    "//evil.example",
    "///evil.example",
    "////evil.example",
    "//app.example.com",
    "/\\evil.example",
    "\\/evil.example",
    "\\\\evil.example",
    "/%2f/evil.example",
    "/%5cevil.example",
    "%2f%2fevil.example",
    "/\t/evil.example",
    "/\n/evil.example",
    ".evil.example",
    "@evil.example",
    "?https://app.example.com/",
    "#https://app.example.com/",
    "https:evil.example",
    "https:/evil.example",
    "https:///evil.example",
    "https:app.example.com/",
    "https:/app.example.com/",
    "https:///app.example.com/",
    "https:\\\\app.example.com/",
    "https://",
    "https:///",
    "https://evil.example",
    "https://evil.example/app.example.com",
    "https://evil.example/https://app.example.com/",
    "https://evil.example?app.example.com",
    "https://evil.example#.app.example.com",
    "https://evil.example\\.app.example.com/",
    "https://evil.example%2f.app.example.com/",
    "https://evil.example%5c.app.example.com/",
    "https://evil.example%23.app.example.com/",
    "https://evil.example%3f.app.example.com/",
    "https://evil.example%00.app.example.com/",
    "https://evil.example\x00.app.example.com/",
    "https://evil.example;.app.example.com/",
    "https://app.example.com@evil.example/",
    "https://app.example.com:443@evil.example/",
    "https://app.example.com:pw@evil.example/",
    "https://app@app.example.com/",
    "https://app:pw@app.example.com/",
    "https://@app.example.com/",
    "https://app.example.com%40evil.example/",
    "https://app.example.com%2f@evil.example/",
    "https://app.example.com\\@evil.example/",
    "https://app.example.com/\\evil.example",
    "https://app.example.com\\evil",
    "https://app.example.com.evil.example/",
    "https://app.example.com.",
    "https://app.example.com./",
    "https://app.example.com../",
    "https://app..example.com/",
    "https://.example.com/",
    "https://evilexample.com/",
    "https://example.com/",  # "*." is one or more labels
    "https://example.com.evil.example/",
    "https://app-example.com/",
    "https://app.example.co/",
    "https://app.example.comm/",
    "https://app.example.com:80/",
    "https://app.example.com:8443/",
    "https://app.example.com:0443/",
    "https://app.example.com:/",
    "https://app.example.com:443:443/",
    "https://app.example.com:443x/",
    "https://app.example.com:99999/",
    "https://app.example.com:-443/",
    "https://other.example.com:8444/",
    "https://*.example.com/",
    "https://app.example.com?x=1",  # browsers always send a slash before the query
    "https://app.example.com#x",
    "http://app.example.com/",
    "http://app.example.com:443/",
    "ftp://app.example.com/",
    "ws://app.example.com/",
    "wss://app.example.com/",
    "file://app.example.com/",
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    "javascript://app.example.com/%0aalert(1)",
    "java\nscript:alert(1)",
    "data:text/html,x",
    "data://app.example.com/,x",
    "vbscript:x",
    "blob:https://app.example.com/x",
    "view-source:https://app.example.com/",
    " https://app.example.com/",
    "https://app.example.com/ ",
    "https://app.example.com/a b",
    "https://app.example .com/",
    "\thttps://app.example.com/",
    "https://app.example.com/\t",
    "https://app.exa\tmple.com/",
    "https://app.example.com/a\nb",
    "https://app.example.com/\r\nSet-Cookie: x=1",
    "https://app.example.com\r\n/",
    "https://app.example.com/\n",
    "ht\ntps://app.example.com/",
    "https://app.example.com/\x7f",
    "https://app.example.com/\x00",
    "https://app.example.com/\u2028",
    "https://app.example.com/ä",
    "https://äpp.example.com/",
    "https://app.exаmple.com/",  # noqa: RUF001 - a Cyrillic letter
    "https://app。example。com/",
    "https://ａpp.example.com/",  # noqa: RUF001 - a fullwidth letter, which browsers read as "a"
    "https://evil.example／.app.example.com/",  # noqa: RUF001
    "https://app.example.com\ufeff/",
    "https://[::1]/",
    "https://[app.example.com]/",
    "https://[::1].example.com/",
    "https://2130706433/",
    "https://0x7f.0.0.1/",
    "https://app.example.com/" + "a" * MAX_LENGTH,
]

ALLOWED = {
    "https://app.example.com": "https://app.example.com/",
    "https://app.example.com/": "https://app.example.com/",
    "https://app.example.com/a/b?c=d&e=%2F#f": "https://app.example.com/a/b?c=d&e=%2F#f",
    "https://a.b.c.example.com/": "https://a.b.c.example.com/",
    "https://app.example.com:443/x": "https://app.example.com/x",
    "HTTPS://APP.Example.Com/Path": "https://app.example.com/Path",
    "https://other.example.com:8443/": "https://other.example.com:8443/",
    "https://xn--pp-via.example.com/": "https://xn--pp-via.example.com/",
    "https://app.example.com//evil.example": "https://app.example.com//evil.example",
    "https://app.example.com/@evil": "https://app.example.com/@evil",
    "https://app.example.com/?rd=https://evil.example": "https://app.example.com/?rd=https://evil.example",
    "https://app.example.com/%0d%0aX:%201": "https://app.example.com/%0d%0aX:%201",
    "https://auth.example.com/logout": "https://auth.example.com/logout",
}


@pytest.mark.parametrize("address", REFUSED, ids=lambda address: repr(address)[:60])
@pytest.mark.parametrize("return_to", [WILD, LOCAL, ONE], ids=["wildcard", "local", "one host"])
def test_no_unlisted_address_is_allowed(return_to: ReturnTo, address: str) -> None:
    assert return_to.allowed(address) is None


@pytest.mark.parametrize("address", ALLOWED)
def test_a_listed_address_is_allowed_in_lower_case(address: str) -> None:
    assert WILD.allowed(address) == ALLOWED[address]


def test_local_addresses_keep_their_port() -> None:
    assert LOCAL.allowed("http://localhost:8080/x?y") == "http://localhost:8080/x?y"
    assert LOCAL.allowed("http://localhost:8000/") == "http://localhost:8000/"
    for other in ("http://localhost/", "http://localhost:8081/", "http://127.0.0.1:8080/", "https://localhost:8080/"):
        assert LOCAL.allowed(other) is None


def test_the_origin_of_the_login_page_is_allowed() -> None:
    assert ONE.allowed("https://app.example.com/x") == "https://app.example.com/x"
    assert ONE.allowed("https://auth.app.example.com/x") is None


@pytest.mark.parametrize(
    "origin", ["null", "", "https://evil.example", "https://app.example.com/", "https://*.example.com"]
)
def test_an_unlisted_origin_is_refused(origin: str) -> None:
    assert not WILD.allows_origin(origin)


def test_a_listed_origin_is_allowed() -> None:
    assert WILD.allows_origin("https://app.example.com")
    assert WILD.allows_origin("https://auth.example.com")


def test_the_policy_names_where_a_form_may_lead() -> None:
    assert WILD.form_action() == "'self' https://*.example.com https://other.example.com:8443"
    six = ReturnTo(BrowserSettings(url="http://[::1]:8000", return_to=("http://[::1]:8080",)))
    assert six.form_action() == "'self' http:", "a policy cannot name an IPv6 address"
