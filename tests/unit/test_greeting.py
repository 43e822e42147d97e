"""What `serve` says on a terminal."""

import pytest

from tests.support.servers import USERS
from tokenauth.risks import SHIPPED_HASH, Risk
from tokenauth.server.greeting import greeting
from tokenauth.settings import loader

RISK = Risk("weak_hash", "a text")


def lines(toml: str, *risks: Risk, users: str = USERS) -> list[str]:
    """Return the lines between the first one and the last one."""
    text = greeting(loader.parse(toml + users, {}), 8000, risks, ".venv/bin/tokenauth", " -c mine.toml")
    first, *found, reload, last = [line for line in text.splitlines() if line]
    assert (first[:10], last) == ("tokenauth ", "Ctrl-C stops.")
    assert reload == "After a change of the configuration: .venv/bin/tokenauth reload -c mine.toml"
    return found


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")])
def test_the_url_can_be_opened(host: str, url: str) -> None:
    shown = lines(f'[server]\nhost = "{host}"\ndocs = false')
    assert [line.split()[0] for line in shown] == [url, f"{url}/console"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_all_addresses_are_said(host: str) -> None:
    assert lines(f'[server]\nhost = "{host}"') == [
        "  http://localhost:8000          and all other addresses of this machine",
        "  http://localhost:8000/console  see logins, named tokens and pools",
        "  http://localhost:8000/docs     try the API",
    ]


def test_the_login_page_is_named() -> None:
    shown = lines('[server]\ndocs = false\n[browser]\nurl = "https://auth.example.com"')
    assert shown[2:] == ["  https://auth.example.com/login  login page"]


def test_a_unix_socket_is_named_without_a_url() -> None:
    assert lines('[server]\nsocket = "/run/t.sock"') == ["  unix:/run/t.sock  for a reverse proxy"]


def test_the_url_is_https_with_a_certificate() -> None:
    tls = 'tls_certificate = "/c"\ntls_key = "/k"'
    assert lines(f"[server]\ndocs = false\n{tls}")[0].startswith("  https://127.0.0.1:8000")


def test_the_address_of_metrics_is_named() -> None:
    shown = lines('[server]\ndocs = false\n[metrics]\nlisten = "[::1]:9180"')
    assert shown[2:] == ["  http://[::1]:9180/metrics      metrics for Prometheus"]


def test_risks_are_one_line() -> None:
    one = "1 setting is unsafe on a public address: .venv/bin/tokenauth check -c mine.toml"
    assert lines("server.docs = false\n", RISK)[2:] == [one]
    several = lines("server.docs = false\n", *[RISK] * 4)
    assert several[2:] == [one.replace("1 setting is", "4 settings are")]


def test_only_the_shipped_password_is_shown() -> None:
    shipped = f'[[users]]\nusername = "admin"\npassword = "{SHIPPED_HASH}"'
    assert "Log in as admin / admin." in lines("", users=shipped)
    assert not [line for line in lines("", users=shipped.replace("admin", "ann", 1)) if line.startswith("Log in")]
    assert not [line for line in lines("") if "admin" in line]


def test_without_users_it_says_how_to_get_one() -> None:
    assert "Nobody can log in yet. Write a configuration with a user: .venv/bin/tokenauth init" in lines("", users="")
