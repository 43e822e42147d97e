"""Risks: fine on a laptop, named by `check`, and refused where others can reach the service."""

from collections.abc import Iterator

import pytest
from passlib.hash import argon2

from tests.servers import ROOT
from tokenauth import config, configfile
from tokenauth.app import create_app
from tokenauth.config import Config
from tokenauth.errors import ConfigError
from tokenauth.passwords import Passwords
from tokenauth.risks import SHIPPED_API_PASSWORD, SHIPPED_HASH, demand_acceptable, find_risks, judge

STRONG = argon2.using(type="ID", memory_cost=64, time_cost=2, parallelism=1).hash("a long password")
WEAK = argon2.using(type="ID", memory_cost=8, time_cost=1, parallelism=1).hash("a long password")


@pytest.fixture(scope="module")
def passwords() -> Iterator[Passwords]:
    """Make passwords to which STRONG is strong enough and WEAK is not."""
    made = Passwords(config.Passwords(memory_kib=64, time_cost=2, threads=1))
    yield made
    made.close()


def configured(server: str = "", password: str = STRONG) -> Config:
    """Make a configuration of one user."""
    return configfile.parse(f'[server]\n{server}\n[[users]]\nusername = "ann"\npassword = "{password}"', {})


def names(settings: Config, passwords: Passwords) -> list[str]:
    """Name the risks of a configuration."""
    return [risk.name for risk in find_risks(settings, passwords)]


def test_the_shipped_hash_is_that_of_the_shipped_file_and_of_the_word_admin() -> None:
    shipped = configfile.load(ROOT / "config.toml", {}).directory["admin"]
    assert shipped.password_hash == SHIPPED_HASH
    assert argon2.verify("admin", SHIPPED_HASH)


def test_a_strong_password_on_this_machine_is_no_risk(passwords: Passwords) -> None:
    assert names(configured(), passwords) == []


@pytest.mark.parametrize(
    ("server", "password", "risk"),
    [
        ("", SHIPPED_HASH, "shipped_password"),
        ("", WEAK, "weak_hash"),
        ('trusted_proxies = ["0.0.0.0/0"]', STRONG, "trusts_everybody"),
        ('trusted_proxies = ["10.0.0.0/8", "::/0"]', STRONG, "trusts_everybody"),
    ],
    ids=["shipped", "weak", "ipv4", "ipv6"],
)
def test_a_risk_is_named_and_accepted_on_a_loopback_address_only(
    passwords: Passwords, server: str, password: str, risk: str
) -> None:
    at_home = configured(server, password)
    risks = find_risks(at_home, passwords)
    assert [each.name for each in risks] == [risk]
    assert "\n" not in risks[0].text
    assert password not in risks[0].text
    demand_acceptable(at_home, risks)
    judge(at_home, risks)
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.com"):
        public = configured(f'{server}\nhost = "{host}"', password)
        with pytest.raises(ConfigError) as refusal:
            judge(public, find_risks(public, passwords))
        assert str(refusal.value).startswith(f"server.host: '{host}' can be reached by others, and ")
        assert f"(or add {risk!r} to server.accept_risks)" in str(refusal.value)
        judge(configured(f'{server}\nhost = "{host}"\naccept_risks = ["{risk}"]', password), risks)


def test_accepting_one_risk_does_not_accept_another(passwords: Passwords) -> None:
    public = configured('host = "0.0.0.0"\naccept_risks = ["weak_hash", "open_dialect"]', SHIPPED_HASH)
    with pytest.raises(ConfigError, match="shipped_password"):
        judge(public, find_risks(public, passwords))


@pytest.mark.parametrize("name", ["shipped", "*", "open_dialekt", ""])
def test_a_risk_that_there_is_not_cannot_be_accepted(name: str) -> None:
    with pytest.raises(ConfigError, match=r"server.accept_risks: there is no risk"):
        configured(f'accept_risks = ["{name}"]', STRONG)


def test_all_risks_are_found_and_each_must_be_accepted(passwords: Passwords) -> None:
    users = "\n".join(
        f'[[users]]\nusername = "{name}"\npassword = "{password}"'
        for name, password in {"a": SHIPPED_HASH, "b": WEAK, "c": STRONG}.items()
    )
    server = """[server]
    host = "0.0.0.0"
    trusted_proxies = ["0.0.0.0/0"]
    accept_risks = ["shipped_password", "weak_hash"]
    """
    public = configfile.parse(server + users, {})
    risks = find_risks(public, passwords)
    assert [risk.name for risk in risks] == ["shipped_password", "weak_hash", "trusts_everybody"]
    assert [risk.text.count("'a'") + 2 * risk.text.count("'b'") for risk in risks] == [1, 2, 0]
    with pytest.raises(ConfigError, match="trusts_everybody"):
        demand_acceptable(public, risks)


PERMITS = """
[pools.permits]
capacity = 1
prefill = true
[dialects.simple-token-implement]
pool = "permits"
"""
OPEN = ["token-pool", "random-token-generator", "token-management-service"]


def served(name: str, more: str = "", server: str = "") -> Config:
    """Make a configuration that serves a dialect over a pool of its own."""
    return configfile.parse(f'[server]\n{server}\n[pools.p]\n[dialects.{name}]\npool = "p"\n{more}', {})


@pytest.mark.parametrize("name", OPEN)
def test_a_dialect_that_asks_nobody_for_a_token_is_a_risk(passwords: Passwords, name: str) -> None:
    (risk,) = find_risks(served(name), passwords)
    assert risk == ("open_dialect", f"dialects.{name} asks nobody for a token; set its require_token to true")
    judge(served(name), [risk])
    public = 'host = "0.0.0.0"\n'
    with pytest.raises(ConfigError) as refusal:
        create_app(served(name, server=public))
    assert str(refusal.value) == (
        f"server.host: '0.0.0.0' can be reached by others, and {risk.text}"
        " (or add 'open_dialect' to server.accept_risks)"
    )
    demand_acceptable(served(name, server=public + 'accept_risks = ["open_dialect"]'), [risk])
    assert find_risks(served(name, "require_token = true", public), passwords) == []


@pytest.mark.parametrize("more", ["", "require_token = true"])
def test_the_password_that_everybody_knows_is_a_risk_of_the_dialect_that_has_one(
    passwords: Passwords, more: str
) -> None:
    """Of its own it asks for a password, and so is not open; another password is no risk."""
    (risk,) = find_risks(configfile.parse(f'{PERMITS}{more}\npassword = "change-me"', {}), passwords)
    assert risk.name == "shipped_password"
    assert risk.text.startswith("dialects.simple-token-implement.password is the one that tokenauth is shipped with")
    assert names(configfile.parse(f'{PERMITS}{more}\npassword = "change-me-not"', {}), passwords) == []


def test_accepting_the_risk_of_one_dialect_accepts_that_of_all_and_no_other(passwords: Passwords) -> None:
    text = (ROOT / "config.toml").read_text().replace('host = "127.0.0.1"', 'host = "0.0.0.0"')
    public = configfile.parse(text.replace("accept_risks = []", 'accept_risks = ["open_dialect"]'), {})
    with pytest.raises(ConfigError, match="'shipped_password' to server"):
        demand_acceptable(public, find_risks(public, passwords))
    public = configfile.parse(
        text.replace("accept_risks = []", 'accept_risks = ["open_dialect", "shipped_password"]'), {}
    )
    demand_acceptable(public, find_risks(public, passwords))


def test_the_shipped_configuration_has_its_passwords_and_its_open_dialects_for_risks() -> None:
    shipped = configfile.load(ROOT / "config.toml", {})
    made = Passwords(shipped.passwords)
    assert names(shipped, made) == ["shipped_password", "shipped_password", *["open_dialect"] * len(OPEN)]
    assert names(configfile.load(ROOT / "config.toml", {"API_PASSWORD": "x"}), made)[1:] == ["open_dialect"] * len(OPEN)
    for risk, name in zip(find_risks(shipped, made)[2:], OPEN, strict=True):
        assert f"dialects.{name} " in risk.text
    made.close()


def test_the_shipped_api_password_is_that_of_the_shipped_file() -> None:
    terms = configfile.load(ROOT / "config.toml", {}).dialects.simple_token_implement
    assert terms is not None
    assert terms.password == SHIPPED_API_PASSWORD
