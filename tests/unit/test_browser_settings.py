"""[browser]: every mistake is named with its key and a hint, so that no login ends in a loop of redirects."""

import pytest

from tokenauth.errors import ConfigError
from tokenauth.risks import find_risks
from tokenauth.service import create_service
from tokenauth.settings import loader
from tokenauth.settings.model import BrowserSettings, Settings

URL = 'url = "https://auth.example.com"\n'
DOMAIN = f'{URL}domain = "example.com"\n'
LOCAL = 'url = "http://localhost:8000"\n'


def parsed(text: str, more: str = "") -> Settings:
    return loader.parse(f"{more}\n[browser]\n{text}", {})


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ('domain = "example.com"', "url", "is missing"),
        ('return_to = ["https://app.example.com"]', "url", "is missing"),
        ('url = "auth.example.com"', "url", "write 'https://auth.example.com'"),
        ('url = "https://auth.example.com/"', "url", "without the slash"),
        ('url = "https://auth.example.com/login"', "url", "without the slash"),
        ('url = "https://ann:secret@auth.example.com"', "url", "no user and no password"),
        ('url = "https://auth.example.com:0"', "url", "an origin"),
        ('url = "https://auth.example.com:65536"', "url", "an origin"),
        ('url = "https://*.example.com"', "url", "one host"),
        ('url = "https://äuth.example.com"', "url", "xn--"),
        ('url = "https://auth.example.com."', "url", "an origin"),
        ('url = "ftp://auth.example.com"', "url", "an origin"),
        ('url = "http://auth.example.com"', "url", "must begin with https"),
        ('url = "http://localhost.example.com"', "url", "must begin with https"),
        ('url = "http://127.0.0.2"', "url", "must begin with https"),
        (f'{URL}domain = ".example.com"', "domain", "write 'example.com'"),
        (f'{URL}domain = "com"', "domain", "a domain"),
        (f'{URL}domain = "Example.com"', "domain", "a domain"),
        (f'{URL}domain = "https://example.com"', "domain", "a domain"),
        (f'{URL}domain = "ample.com"', "domain", "'auth.example.com' is not in"),
        (f'{URL}domain = "app.example.com"', "domain", "'auth.example.com' is not in"),
        ('url = "https://192.0.2.1"\ndomain = "192.0.2.1"', "domain", "a domain"),
        (f'{LOCAL}domain = "example.com"', "domain", "needs an https url"),
        (f'{URL}return_to = "https://app.example.com"', "return_to", "must be an array"),
        (f'{URL}return_to = ["https://app.example.com"]', "return_to[0]", "set browser.domain"),
        (f'{URL}return_to = ["https://*.example.com"]', "return_to[0]", "set browser.domain"),
        (f'{DOMAIN}return_to = ["https://app.example.com", "https://app.example.org"]', "return_to[1]", "not in"),
        (f'{DOMAIN}return_to = ["https://badexample.com"]', "return_to[0]", "not in"),
        (f'{DOMAIN}return_to = ["https://app.example.com/path"]', "return_to[0]", "without the slash"),
        (f'{DOMAIN}return_to = ["https://*.com"]', "return_to[0]", "needs a domain"),
        (f'{DOMAIN}return_to = ["https://*"]', "return_to[0]", "in front of a host"),
        (f'{DOMAIN}return_to = ["https://app*.example.com"]', "return_to[0]", "in front of a host"),
        (f'{DOMAIN}return_to = ["https://a.*.example.com"]', "return_to[0]", "in front of a host"),
        (f'{DOMAIN}return_to = ["http://app.example.com"]', "return_to[0]", "must begin with https"),
        (f'{DOMAIN}return_to = ["http://localhost:8080"]', "return_to[0]", "as url does"),
        (f'{LOCAL}return_to = ["https://localhost:8080"]', "return_to[0]", "as url does"),
        (f'{LOCAL}return_to = ["http://127.0.0.1:8080"]', "return_to[0]", "use the host of url"),
        (f'{URL}remember_ttl = "1h"', "remember_ttl", "not be less than tokens.ttl"),
        (f'{URL}remember_ttl = "never"', "remember_ttl", "a duration"),
        (f'{URL}remember = "30d"', "remember", "did you mean remember_ttl"),
    ],
)
def test_each_mistake_is_named_with_a_hint(text: str, key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parsed(text)
    assert str(refusal.value).startswith(f"browser.{key}: ")
    assert hint in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        URL,
        DOMAIN,
        f'{DOMAIN}return_to = ["https://*.example.com", "https://example.com", "https://app.example.com:8443"]',
        'url = "https://AUTH.example.com:8443"\ndomain = "auth.example.com"',
        f'{URL}return_to = ["https://auth.example.com:8443"]',
        f'{LOCAL}return_to = ["http://localhost:8080", "http://localhost"]',
        'url = "http://[::1]:8000"\nreturn_to = ["http://[::1]:8080"]',
        'url = "https://192.0.2.1"',
        'url = "https://auth"',
    ],
)
def test_what_fits_together_is_accepted(text: str) -> None:
    settings = parsed(text)
    assert settings.browser.return_origins is not None


def test_a_remembered_login_may_outlive_a_long_ttl() -> None:
    more = '[tokens]\nttl = "90d"'
    with pytest.raises(ConfigError, match="remember_ttl"):
        parsed(URL, more)
    assert parsed(f'{URL}remember_ttl = "90d"', more).browser.remember_ttl == 90 * 86400
    assert parsed("", more).browser == BrowserSettings(), "it does not matter without a url"


def test_an_https_url_means_that_others_can_connect() -> None:
    assert parsed(URL).exposure is not None
    assert parsed(LOCAL).exposure is None


def test_a_login_page_behind_no_trusted_proxy_is_a_risk() -> None:
    def risks(settings: Settings) -> list[str]:
        return [risk.name for risk in find_risks(settings, create_service(settings).passwords)]

    assert risks(parsed(URL)) == ["no_trusted_proxy"]
    assert risks(parsed(URL, '[server]\ntls_certificate = "/c"\ntls_key = "/k"')) == []
    assert risks(parsed(URL, '[server]\nsocket = "/run/t.sock"')) == []
    assert risks(parsed(URL, '[server]\ntrusted_proxies = ["127.0.0.1"]')) == []
    assert risks(parsed(LOCAL)) == []
    assert risks(parsed("")) == []
