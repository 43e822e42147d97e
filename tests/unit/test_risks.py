"""Risks: allowed on a laptop, listed by `check`, and refused if others can reach the service."""

import grp
import json
import pwd
import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passlib.hash import argon2

from tests.support.servers import ROOT, shipped, shipped_with_dialects
from tokenauth.errors import ConfigError
from tokenauth.passwords import Passwords, machine_memory_kib
from tokenauth.risks import (
    SHIPPED_API_PASSWORD,
    SHIPPED_HASH,
    are_too_broad,
    check_accepted,
    find_risks,
    log_and_check,
)
from tokenauth.settings import loader
from tokenauth.settings.model import PasswordSettings, RiskName, Settings

STRONG = argon2.using(type="ID", memory_cost=64, time_cost=2, parallelism=1).hash("a long password")
WEAK = argon2.using(type="ID", memory_cost=8, time_cost=1, parallelism=1).hash("a long password")


@pytest.fixture(scope="module")
def passwords() -> Iterator[Passwords]:
    """Make a Passwords for which STRONG is strong enough and WEAK is not."""
    made = Passwords(PasswordSettings(memory_kib=64, time_cost=2, threads=1))
    yield made
    made.close()


def configured(server: str = "", password: str = STRONG) -> Settings:
    """Make settings with one user."""
    return loader.parse(f'[server]\n{server}\n[[users]]\nusername = "ann"\npassword = "{password}"', {})


def names(settings: Settings, passwords: Passwords) -> list[str]:
    """Return the names of the risks."""
    return [risk.name for risk in find_risks(settings, passwords)]


def test_the_shipped_hash_is_of_the_password_admin() -> None:
    admin = loader.parse(shipped(), {}).users_by_name["admin"]
    assert admin.password_hash == SHIPPED_HASH
    assert argon2.verify("admin", SHIPPED_HASH)


def test_a_strong_password_on_this_machine_is_no_risk(passwords: Passwords) -> None:
    assert names(configured(), passwords) == []


@pytest.mark.parametrize(
    ("password", "risk"), [(SHIPPED_HASH, "shipped_password"), (WEAK, "weak_hash")], ids=["shipped", "weak"]
)
def test_a_risk_is_only_a_warning_on_a_loopback_address(passwords: Passwords, password: str, risk: str) -> None:
    local = configured("", password)
    risks = find_risks(local, passwords)
    assert [each.name for each in risks] == [risk]
    assert "\n" not in risks[0].text
    assert password not in risks[0].text
    check_accepted(local, risks)
    log_and_check(local, risks)
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.com", "127.0.0.1.example.com", "0"):
        secured = f'host = "{host}"\ntls_certificate = "/c"\ntls_key = "/k"'
        public = configured(secured, password)
        with pytest.raises(ConfigError) as refusal:
            log_and_check(public, find_risks(public, passwords))
        assert str(refusal.value).startswith(f"server.host: '{host}' can be reached by others, and ")
        assert f"this risk is not accepted: {risk!r}; " in str(refusal.value)
        log_and_check(configured(f'{secured}\naccept_risks = ["{risk}"]', password), risks)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    ("public", "key"),
    [
        ('server.trusted_proxies = ["127.0.0.1"]', "server.trusted_proxies: "),
        ('server.trusted_proxies = ["10.0.0.0/8", "fd00::1"]', "server.trusted_proxies: "),
        ('oauth.issuer = "https://auth.example.com"', "oauth.issuer: "),
    ],
)
def test_a_loopback_address_behind_a_proxy_is_public(passwords: Passwords, host: str, public: str, key: str) -> None:
    user = f'[[users]]\nusername = "ann"\npassword = "{WEAK}"'
    settings = loader.parse(f'server.host = "{host}"\n{public}\n{user}', {})
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}.*others can reach the service, and .*'weak_hash'"):
        check_accepted(settings, find_risks(settings, passwords))
    local = loader.parse(f'server.host = "{host}"\noauth.issuer = "http://localhost:8000"\n{user}', {})
    check_accepted(local, find_risks(local, passwords))


@pytest.mark.parametrize("host", ["", " ", "127.0.0.1 ", "a b", "\x7f"])
def test_a_host_that_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^server\.host: "):
        configured(f"host = {json.dumps(host)}")


def parts(version: str, chosen: Sequence[bool], depth: int) -> tuple[list[str], float]:
    """Cut a space of addresses into equal networks. Return the chosen ones and their share of the space."""
    networks = list(ip_network(version).subnets(depth))
    return [str(network) for network, taken in zip(networks, chosen, strict=True) if taken], sum(chosen) / len(networks)


@settings(max_examples=50)
@given(
    st.sampled_from(["0.0.0.0/0", "2000::/3", "::ffff:0:0/96"]),
    st.integers(0, 4).flatmap(lambda depth: st.lists(st.booleans(), min_size=1 << depth, max_size=1 << depth)),
    st.lists(st.sampled_from(["127.0.0.1", "10.0.0.0/8", "::1", "fd00::/8", "2001:db8::/32", "fe80::1"])),
    st.randoms(use_true_random=False),
)
def test_trusting_an_eighth_of_all_addresses_is_a_risk(
    space: str, chosen: list[bool], proxies: list[str], order: Random
) -> None:
    networks, share = parts(space, chosen, len(chosen).bit_length() - 1)
    listed = [*networks, *proxies]
    order.shuffle(listed)
    assert are_too_broad(listed) == (share >= 1 / 8)


SLOW_HASHES = {
    "over a second of bcrypt": "$2b$15$" + "." * 53,
    "over a second of argon2": f"$argon2id$v=19$m=65536,t=20,p=1${'A' * 22}${'A' * 43}",
    "over a second of scrypt": f"$scrypt$ln=19,r=8,p=1${'A' * 22}${'A' * 43}",
    "over a second of pbkdf2": f"$pbkdf2-sha256$10000000${'A' * 22}${'A' * 43}",
}


@pytest.mark.parametrize("hashed", SLOW_HASHES)
def test_a_hash_that_stops_all_logins_is_a_risk(passwords: Passwords, hashed: str) -> None:
    risks = find_risks(configured("", SLOW_HASHES[hashed]), passwords)
    assert [risk.name for risk in risks if risk.name != "weak_hash"] == ["costly_hash"]
    text = "the password hash of 'ann' takes more than a second to check; run `tokenauth user passwd ann`"
    assert risks[-1].text == text
    with pytest.raises(ConfigError, match="costly_hash"):
        check_accepted(configured('host = "0.0.0.0"\naccept_risks = ["weak_hash"]'), risks)


def test_settings_that_make_each_login_slow_are_a_risk() -> None:
    slow = Passwords(PasswordSettings(memory_kib=65536, time_cost=20, threads=1))
    (risk,) = find_risks(loader.parse("", {}), slow)
    assert risk.name == "costly_hash"
    assert risk.text == "passwords: memory_kib and time_cost make each login take 1.3 seconds; lower one of them"


def test_hashing_in_over_half_of_the_memory_is_a_risk() -> None:
    """The memory of one hash, times all threads of all workers: by the settings, and by a user's hash."""
    half = machine_memory_kib() // 2
    passwords = Passwords(PasswordSettings(memory_kib=1 << 19, time_cost=1, threads=256))
    (risk,) = find_risks(loader.parse("[server]\nworkers = 64", {}), passwords)
    assert risk.name == "costly_hash"
    assert risk.text.startswith("passwords: memory_kib, threads and server.workers can take more than half")
    large = f"$argon2id$v=19$m={half // 3},t=1,p=1${'A' * 22}${'A' * 43}"
    passwords = Passwords(PasswordSettings(memory_kib=8, time_cost=1, threads=4))
    found = find_risks(configured("", large), passwords)
    assert [risk.name for risk in found if "memory" in risk.text] == ["costly_hash"]


def test_accepting_one_risk_does_not_accept_another(passwords: Passwords) -> None:
    public = configured('host = "0.0.0.0"\naccept_risks = ["weak_hash", "open_dialect"]', SHIPPED_HASH)
    with pytest.raises(ConfigError, match="shipped_password"):
        log_and_check(public, find_risks(public, passwords))


@pytest.mark.parametrize("name", ["shipped", "*", "open_dialekt", ""])
def test_an_unknown_risk_cannot_be_accepted(name: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.accept_risks\[0\]: must be one of shipped_password, "):
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
    public = loader.parse(server + users, {})
    risks = find_risks(public, passwords)
    assert [risk.name for risk in risks] == ["shipped_password", "weak_hash", "broad_trusted_proxies"]
    assert [risk.text.count("'a'") + 2 * risk.text.count("'b'") for risk in risks] == [1, 2, 0]
    with pytest.raises(ConfigError, match="broad_trusted_proxies"):
        check_accepted(public, risks)


PERMITS = """
[pools.permits]
capacity = 1
prefill = true
[dialects.simple-token-implement]
pool = "permits"
"""
OPEN = ["token-pool", "random-token-generator", "token-management-service"]


def served(name: str, more: str = "", server: str = "") -> Settings:
    """Make settings with a dialect over a pool."""
    return loader.parse(f'[server]\n{server}\n[pools.p]\n[dialects.{name}]\npool = "p"\n{more}', {})


@pytest.mark.parametrize("name", OPEN)
def test_a_dialect_without_login_is_a_risk(passwords: Passwords, name: str) -> None:
    (risk,) = find_risks(served(name), passwords)
    assert risk == ("open_dialect", f"dialects.{name} does not ask for a token; set its require_token to true")
    log_and_check(served(name), [risk])
    public = 'host = "0.0.0.0"\ntrusted_proxies = ["10.0.0.1"]\n'
    with pytest.raises(ConfigError) as refusal:
        check_accepted(served(name, server=public), [risk])
    assert str(refusal.value) == (
        "server.host: '0.0.0.0' can be reached by others, and this risk is not accepted: 'open_dialect'; fix it, or"
        " list it in server.accept_risks"
    )
    check_accepted(served(name, server=public + 'accept_risks = ["open_dialect"]'), [risk])
    assert find_risks(served(name, "require_token = true", public), passwords) == []


@pytest.mark.parametrize("more", ["", "require_token = true"])
def test_a_dialect_with_its_published_password_is_a_risk(passwords: Passwords, more: str) -> None:
    """It always asks for a password, so it is not open. Another password is no risk."""
    (risk,) = find_risks(loader.parse(f'{PERMITS}{more}\npassword = "change-me"', {}), passwords)
    assert risk.name == "shipped_password"
    assert risk.text.startswith("dialects.simple-token-implement.password is the one that tokenauth ships with")
    assert names(loader.parse(f'{PERMITS}{more}\npassword = "change-me-not"', {}), passwords) == []


def test_the_shipped_file_stays_as_it_is(passwords: Passwords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout, the fix is a file of one's own. Elsewhere, config.toml is an operator's file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text(shipped())
    for path, fix in (
        (".venv/bin/tokenauth", "run `.venv/bin/tokenauth init`"),
        ("", "run `tokenauth user passwd admin`"),
    ):
        if path:
            (tmp_path / path).parent.mkdir(parents=True)
            (tmp_path / path).touch()
        else:
            (tmp_path / ".venv/bin/tokenauth").unlink()
        found = {
            risk.name: risk.text for risk in find_risks(loader.parse(shipped(), {}), passwords, Path("config.toml"))
        }
        assert fix in found["shipped_password"]
        assert ("init`" in found["readable_config"]) == bool(path)


def test_accepting_open_dialects_accepts_no_other_risk(passwords: Passwords) -> None:
    text = shipped_with_dialects().replace("trusted_proxies = []", 'trusted_proxies = ["10.0.0.1"]')
    text = text.replace("${API_PASSWORD}", SHIPPED_API_PASSWORD)
    public = loader.parse(text.replace("accept_risks = []", 'accept_risks = ["open_dialect"]'), {})
    with pytest.raises(ConfigError, match="'shipped_password'; fix it"):
        check_accepted(public, find_risks(public, passwords))
    accepted = 'accept_risks = ["open_dialect", "shipped_password"]'
    public = loader.parse(text.replace("accept_risks = []", accepted), {})
    check_accepted(public, find_risks(public, passwords))


def test_the_shipped_file_risks_only_its_password() -> None:
    made = Passwords(PasswordSettings())
    assert names(loader.parse(shipped(), {}), made) == ["shipped_password"]
    switched_on = loader.parse(shipped_with_dialects(), {"API_PASSWORD": "x"})
    assert names(switched_on, made) == ["shipped_password", *["open_dialect"] * len(OPEN)]
    for risk, name in zip(find_risks(switched_on, made)[1:], OPEN, strict=True):
        assert f"dialects.{name} " in risk.text
    with pytest.raises(ConfigError, match=r"password: the environment has no API_PASSWORD"):
        loader.parse(shipped_with_dialects(), {})
    made.close()


def test_the_production_example_has_no_unnamed_risk(passwords: Passwords) -> None:
    """Once a proxy is named, a forgotten step or an open dialect is an error."""
    text = shipped().replace("trusted_proxies = []", 'trusted_proxies = ["127.0.0.1"]')
    with pytest.raises(ConfigError, match="'shipped_password'"):
        check_text(text, passwords)
    text = text.replace(SHIPPED_HASH, STRONG)
    check_text(text, passwords)
    _, first, dialects = shipped_with_dialects().partition("[dialects.")
    tables = re.split(r"(?=\[dialects\.)", first + dialects)[1:]
    assert len(tables) == 4
    for table in tables:
        with pytest.raises(ConfigError, match=r"'(open_dialect|shipped_password)'"):
            check_text(text + table.replace("${API_PASSWORD}", SHIPPED_API_PASSWORD), passwords)


def check_text(text: str, passwords: Passwords) -> None:
    """Check a configuration as `serve` does."""
    settings = loader.parse(text, {})
    check_accepted(settings, find_risks(settings, passwords))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Make a directory with a configuration and a database that have safe modes."""
    for name, mode in {"config.toml": 0o640, "tokenauth.db": 0o600}.items():
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    tmp_path.chmod(0o750)
    return tmp_path


def of_files(directory: Path, passwords: Passwords, path: Path | None = None) -> list[str]:
    """Return the names of the risks of the files in a directory."""
    settings = loader.parse(f'database.url = "sqlite+aiosqlite:///{directory}/tokenauth.db"', {})
    return [risk.name for risk in find_risks(settings, passwords, path or directory / "config.toml")]


@pytest.mark.parametrize("mode", range(0o600, 0o700), ids=oct)
def test_a_file_that_others_can_read_or_change_is_a_risk(files: Path, passwords: Passwords, mode: int) -> None:
    """Its group can read it: the documented install gives the file to root and the service's group."""
    path = files / "config.toml"
    own = grp.getgrgid(path.stat().st_gid).gr_name == pwd.getpwuid(path.stat().st_uid).pw_name
    path.chmod(mode)
    wanted = ["readable_config"] if mode & 0o004 else []
    wanted += ["writable_config"] if mode & 0o002 or (mode & 0o020 and not own) else []
    assert of_files(files, passwords) == wanted


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        (0o750, []),
        (0o755, []),
        (0o1777, []),
        (0o777, ["writable_config", "exposed_database"]),
        (0o757, ["writable_config", "exposed_database"]),
    ],
)
def test_a_directory_others_can_write_to_is_a_risk(
    files: Path, passwords: Passwords, mode: int, wanted: list[str]
) -> None:
    files.chmod(mode)
    assert of_files(files, passwords) == wanted
    (files / "below").mkdir()
    (files / "below/config.toml").symlink_to(files / "config.toml")
    assert of_files(files, passwords, files / "below/config.toml") == wanted


def test_both_a_link_and_its_target_are_checked(
    files: Path, passwords: Passwords, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "link.toml").symlink_to(files / "config.toml")
    assert of_files(files, passwords, elsewhere / "link.toml") == []
    elsewhere.chmod(0o777)
    assert of_files(files, passwords, elsewhere / "link.toml") == ["writable_config"]
    elsewhere.chmod(0o700)
    (files / "config.toml").chmod(0o644)
    assert of_files(files, passwords, elsewhere / "link.toml") == ["readable_config"]


def test_only_an_existing_readable_database_is_a_risk(files: Path, passwords: Passwords) -> None:
    (files / "tokenauth.db").chmod(0o644)
    assert of_files(files, passwords) == ["exposed_database"]
    (files / "tokenauth.db").unlink()
    assert of_files(files, passwords) == []
    assert of_files(files, passwords, Path("/dev/null")) == []


PROXIED = 'trusted_proxies = ["10.0.0.1"]'
CERTIFIED = 'tls_certificate = "/c"\ntls_key = "/k"'


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.com", "::ffff:10.0.0.1"])
def test_plain_http_that_others_can_reach_is_a_risk(passwords: Passwords, host: str) -> None:
    """Unless a proxy is trusted, where TLS ends, or the service speaks https itself."""
    public = f'host = "{host}"'
    (risk,) = find_risks(configured(public), passwords)
    assert (risk.name, risk.text.partition(": ")[0]) == ("no_tls", "server.host")
    with pytest.raises(ConfigError, match="not accepted: 'no_tls'"):
        log_and_check(configured(public), [risk])
    log_and_check(configured(f'{public}\naccept_risks = ["no_tls"]'), [risk])
    for more in (PROXIED, CERTIFIED, 'socket = "/run/t.sock"'):
        assert names(configured(f"{public}\n{more}"), passwords) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8", "::ffff:127.0.0.1"])
def test_plain_http_on_this_machine_is_no_risk(passwords: Passwords, host: str) -> None:
    for more in ("", PROXIED, CERTIFIED):
        assert names(configured(f'host = "{host}"\n{more}'), passwords) == []


def test_the_documentation_names_every_risk() -> None:
    table = (ROOT / "docs/configuration.md").read_text().partition("## Risks")[2].partition("## Users")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(get_args(RiskName))


@pytest.mark.parametrize(("mode", "found"), [("0660", []), ("0664", []), ("0666", ["broad_trusted_proxies"])])
def test_a_socket_for_all_users_is_a_risk(passwords: Passwords, mode: str, found: list[str]) -> None:
    settings = configured(f'socket = "/run/t.sock"\nsocket_mode = "{mode}"')
    assert names(settings, passwords) == found
    assert settings.exposure is not None


@pytest.mark.parametrize(("mode", "found"), [(0o600, []), (0o640, []), (0o644, True), (0o620, True)])
def test_a_tls_key_of_others_is_a_risk(passwords: Passwords, tmp_path: Path, mode: int, found: object) -> None:
    key = tmp_path / "key"
    key.touch()
    key.chmod(mode)
    settings = configured(f'tls_certificate = "/c"\ntls_key = "{key}"')
    assert names(settings, passwords) == (["readable_tls_key"] if found else [])
