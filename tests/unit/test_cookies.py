"""The cookies: their names and attributes in each configuration, and that deleting them undoes setting them."""

import pytest

from tests.support.browsing import Cookie
from tokenauth.settings.model import BrowserSettings
from tokenauth.web.cookies import Cookies, Header, new_form_value

DOMAIN = Cookies(BrowserSettings(url="https://auth.example.com", domain="example.com"))
HOST = Cookies(BrowserSettings(url="https://a.b.example.com:8443"))
LOCAL = Cookies(BrowserSettings(url="http://localhost:8000"))
ADDRESS = Cookies(BrowserSettings(url="https://192.0.2.1"))
ALL = {"domain": DOMAIN, "host": HOST, "local": LOCAL, "address": ADDRESS}

FIXED = {"Path=/", "HttpOnly", "SameSite=Lax"}


def read(header: Header) -> Cookie:
    assert header[0] == b"set-cookie"
    pair, *attributes = header[1].decode().split("; ")
    name, _, value = pair.partition("=")
    return Cookie(name, value, frozenset(attributes))


def scope(*headers: str) -> dict[str, object]:
    return {"headers": [(b"cookie", header.encode()) for header in headers]}


@pytest.mark.parametrize(
    ("cookies", "name", "attributes"),
    [
        (DOMAIN, "__Secure-tokenauth", {"Secure", "Domain=example.com"}),
        (HOST, "__Host-tokenauth", {"Secure"}),
        (LOCAL, "tokenauth", set()),
        (ADDRESS, "__Host-tokenauth", {"Secure"}),
    ],
    ids=ALL,
)
def test_each_configuration_has_its_name(cookies: Cookies, name: str, attributes: set[str]) -> None:
    first = read(cookies.log_in("T", None)[0])
    assert (first.name, first.value, set(first.attributes)) == (name, "T", FIXED | attributes)
    kept = read(cookies.log_in("T", 3600)[0])
    assert set(kept.attributes) == FIXED | attributes | {"Max-Age=3600"}


@pytest.mark.parametrize("name", ALL)
def test_deleting_has_the_attributes_of_setting(name: str) -> None:
    """Browsers ignore a deletion with another Domain or Path."""
    made, deleted = read(ALL[name].log_in("T", 3600)[0]), read(ALL[name].log_out()[0])
    assert (deleted.name, deleted.value) == (made.name, "")
    assert deleted.attributes - {"Max-Age=0"} == made.attributes - {"Max-Age=3600"}
    assert deleted.deletes


@pytest.mark.parametrize(
    ("cookies", "others"),
    [
        (DOMAIN, {("__Host-tokenauth", ""), ("__Secure-tokenauth", ""), ("__Secure-tokenauth", "auth.example.com")}),
        (
            HOST,
            {
                ("__Secure-tokenauth", ""),
                ("__Secure-tokenauth", "a.b.example.com"),
                ("__Secure-tokenauth", "b.example.com"),
                ("__Secure-tokenauth", "example.com"),
            },
        ),
        (LOCAL, set()),
        (ADDRESS, {("__Secure-tokenauth", "")}),
    ],
    ids=ALL,
)
def test_variants_of_other_configurations_are_deleted(cookies: Cookies, others: set[tuple[str, str]]) -> None:
    for headers in (cookies.log_in("T", None), cookies.log_out()):
        found = set()
        for cookie in map(read, headers[1:]):
            assert cookie.deletes
            domains = [one.removeprefix("Domain=") for one in cookie.attributes if one.startswith("Domain=")]
            found.add((cookie.name, "".join(domains)))
        assert found == others


@pytest.mark.parametrize("name", ALL)
def test_a_prefix_of_a_name_keeps_its_rules(name: str) -> None:
    """Otherwise browsers refuse the cookie (RFC 6265bis, section 4.1.3)."""
    cookies = ALL[name]
    for header in [*cookies.log_in("T", 1), *cookies.log_out(), cookies.set_form_value(new_form_value())]:
        cookie = read(header)
        assert cookie.attributes >= FIXED
        if cookie.name.startswith("__"):
            assert "Secure" in cookie.attributes
        if cookie.name.startswith("__Host-"):
            assert not [one for one in cookie.attributes if one.startswith("Domain")]


def test_only_the_own_name_is_read() -> None:
    sent = scope("tokenauth=1; __Host-tokenauth=2; __Secure-tokenauth=3; x__Host-tokenauth=4; __Host-tokenauth-form=5")
    assert DOMAIN.login_values(sent) == [b"3"]
    assert HOST.login_values(sent) == [b"2"]
    assert LOCAL.login_values(sent) == [b"1"]
    assert sorted(HOST.all_login_values(sent)) == [b"2", b"3"]
    assert LOCAL.all_login_values(sent) == [b"1"]


def test_several_values_are_all_found_and_equal_ones_once() -> None:
    assert HOST.login_values(
        scope("__Host-tokenauth=a; __Host-tokenauth=b", "__Host-tokenauth=c;__Host-tokenauth=a")
    ) == [
        b"a",
        b"b",
        b"c",
    ]
    assert HOST.login_values(scope("a=b")) == HOST.login_values(scope()) == []


def test_a_form_value_is_random_and_none_other_is_taken() -> None:
    value = new_form_value()
    assert value != new_form_value()
    assert HOST.form_values(scope(f"__Host-tokenauth-form={value}")) == [value]
    for cookie in ("", "x", f"{value}x", f"{value}; __Host-tokenauth-form=x", '"><script>alert(1)</script>'):
        assert not HOST.form_values(scope(f"__Host-tokenauth-form={cookie}"))
