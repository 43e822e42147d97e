"""The settings: their defaults, their bounds, and the shipped file that shows them."""

import math
import re
import tomllib
from typing import Any

import msgspec
import pytest

from tests.support.servers import shipped, shipped_with_dialects
from tokenauth.errors import ConfigError
from tokenauth.settings import loader
from tokenauth.settings.dialects import DIALECTS, DialectSettings, PasswordDialectSettings
from tokenauth.settings.fields import Table
from tokenauth.settings.model import PasswordSettings, PoolSettings, Settings, UserSettings, canonical

USER = '[[users]]\nusername = "ann"\npassword = "x"\n'
TABLES = [field.name for field in msgspec.structs.fields(Settings)]
SECTIONS = [name for name in TABLES if name not in {"users", "pools", "dialects"}]


def parsed(text: str) -> Settings:
    """Read TOML, with an empty environment."""
    return loader.parse(text, {})


def keys(record: type[Table]) -> list[str]:
    """Return the keys of a table."""
    return [field.encode_name for field in msgspec.structs.fields(record)]


def explained(first: str, last: str) -> list[str]:
    """Return the keys that comments of the shipped file explain, between two of its lines."""
    part = shipped().partition(first)[2].partition(last)[0]
    return re.findall(r"(?:^#|;) (\w+): ", part, re.MULTILINE)


def test_a_file_that_has_only_users_works() -> None:
    settings = parsed(USER)
    assert settings == Settings(users=(UserSettings(username="ann", password="x"),))
    assert list(settings.users_by_name) == ["ann"]


def test_an_empty_file_is_all_defaults() -> None:
    assert parsed("") == Settings()


def test_the_defaults_are_safe() -> None:
    settings = Settings()
    assert settings.server.loopback
    assert settings.server.trusted_proxies == settings.server.cors_origins == settings.server.accept_risks == ()
    assert not settings.server.access_log
    assert settings.passwords == PasswordSettings(memory_kib=19 * 1024, time_cost=2, parallelism=1)
    assert settings.tokens.ttl == 24 * 3600
    assert settings.throttle.max_delay == 15 * 60


@pytest.mark.parametrize("section", SECTIONS)
def test_the_shipped_file_names_every_key_with_its_default(section: str) -> None:
    written = tomllib.loads(shipped())[section]
    record: Table = getattr(Settings(), section)
    assert list(written) == keys(type(record))
    assert getattr(parsed(shipped()), section) == record


def test_the_shipped_file_has_no_other_section_and_one_user() -> None:
    tree = tomllib.loads(shipped())
    assert list(tree) == [table for table in TABLES if table != "dialects"]
    assert [user["username"] for user in tree["users"]] == ["admin"]


def test_the_shipped_file_documents_every_pool_key() -> None:
    assert explained("[[users]]", "[pools.") == keys(PoolSettings)
    text = re.sub(r"\n# ?", " ", shipped())
    assert re.search(r"capacity: [^;]*\(default: no limit\)", text)
    assert re.search(r"token_ttl: [^;]*\(default: no limit\)", text)
    default = re.search(r'lease_ttl: [^;]*\(default: "(\w+)"\)', text)
    assert default is not None
    assert parsed(f'[pools.p]\nlease_ttl = "{default[1]}"') == parsed("[pools.p]")
    assert parsed("[pools.p]").pools["p"] == PoolSettings(
        capacity=None, token_ttl=None, lease_ttl=60, prefill=False, scope=None
    )


def test_the_shipped_file_explains_every_key_of_a_dialect() -> None:
    assert explained("[pools.owned]", "[dialects.") == ["prefix", "require_token"]
    written = tomllib.loads(shipped_with_dialects())["dialects"]
    assert list(written) == list(DIALECTS)
    for name, table in written.items():
        assert list(table) == keys(PasswordDialectSettings if "password" in table else DialectSettings)
        assert table["require_token"] is DialectSettings(pool="p").require_token
        assert table["prefix"] == f"/{name}"
    assert DialectSettings(pool="p") == DialectSettings(pool="p", prefix="", require_token=False)


def test_the_shipped_dialect_pools_match_their_originals() -> None:
    settings = loader.parse(shipped_with_dialects(), {"API_PASSWORD": "1234"})
    chosen = settings.dialects
    assert [dialect.pool for dialect in chosen.values()] == list(settings.pools)
    pools = {name: settings.pools_by_name[dialect.pool] for name, dialect in chosen.items()}
    assert {name: (pool.capacity, pool.token_ttl, pool.lease_ttl, pool.prefill) for name, pool in pools.items()} == {
        "simple-token-implement": (1, math.inf, 1800, True),
        "token-pool": (10_000, 300, 60, False),
        "random-token-generator": (5, 300, 60, False),
        "token-management-service": (10, 300, 60, False),
    }


def test_the_shipped_file_reads_the_originals_variables() -> None:
    environ = {"TOTAL_TOKENS": "7", "TIMER_DURATION": "90", "API_PASSWORD": "1234"}
    settings = loader.parse(shipped_with_dialects(), environ)
    assert settings.pools["permits"] == PoolSettings(capacity=7, lease_ttl=90, prefill=True)
    served = settings.dialects["simple-token-implement"]
    assert isinstance(served, PasswordDialectSettings)
    assert served.password == "1234"


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30", 30), ("1.5", 1.5), ('"30"', 30), ('"30s"', 30), ('"5m"', 300), ('"24h"', 86400), ('"7d"', 604800),
     ('"1.5h"', 5400), ('"2 h"', 7200)],
)  # fmt: skip
def test_a_duration_is_a_number_or_has_a_unit(written: str, seconds: float) -> None:
    assert parsed(f"tokens.ttl = {written}").tokens.ttl == seconds


@pytest.mark.parametrize("written", ['""', '"h"', '"5x"', '"-5s"', '"1h30m"', '"1e5"', "true", "[]", '"5M"'])
def test_anything_else_is_no_duration(written: str) -> None:
    with pytest.raises(ConfigError, match=r"^tokens\.ttl: must be a duration from 1s to 3650d, such as '24h'"):
        parsed(f"tokens.ttl = {written}")


RANGES: dict[str, tuple[Any, Any]] = {
    "server.port": (0, 65535),
    "server.workers": (1, 64),
    "tokens.ttl": (1, 10 * 365 * 86400),
    "tokens.per_user": (0, 1_000_000),
    "tokens.cache_size": (1, 100_000_000),
    "passwords.memory_kib": (8, 1 << 20),
    "passwords.time_cost": (1, 100),
    "passwords.threads": (0, 256),
    "passwords.queue": (1, 10_000),
    "throttle.free": (1, 1_000_000),
    "throttle.network_free": (1, 1_000_000),
    "throttle.delay": (1, 900),  # max_delay's default
    "throttle.forget": (900, 30 * 86400),
}


@pytest.mark.parametrize("key", RANGES)
def test_a_number_may_be_at_either_end_of_its_range(key: str) -> None:
    for number in RANGES[key]:
        section, _, name = key.partition(".")
        assert getattr(getattr(parsed(f"{key} = {number}"), section), name) == number


@pytest.mark.parametrize("key", RANGES)
def test_a_number_beyond_its_range_is_refused_by_name(key: str) -> None:
    low, high = RANGES[key]
    for number in (low - 1, high + 1, -(10**30), 10**30, 2**63, 2**64):
        with pytest.raises(ConfigError, match=rf"^{key.replace('delay', '(max_)?delay')}: "):
            parsed(f"{key} = {number}")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_duration_is_finite(number: str) -> None:
    with pytest.raises(ConfigError, match=r"^tokens\.ttl: must be a duration from 1s to "):
        parsed(f"tokens.ttl = {number}")


@pytest.mark.parametrize(
    ("text", "key"), [("delay = 10, max_delay = 9", "max_delay"), ("max_delay = 1000, forget = 999", "forget")]
)
def test_delay_max_delay_and_forget_must_not_decrease(text: str, key: str) -> None:
    assert parsed("throttle = {delay = 10, max_delay = 10, forget = 10}")
    with pytest.raises(ConfigError, match=rf"^throttle\.{key}: must not be less than "):
        parsed(f"throttle = {{{text}}}")


def test_parallelism_needs_its_memory() -> None:
    assert parsed("passwords = {parallelism = 64, memory_kib = 512}").passwords.parallelism == 64
    with pytest.raises(ConfigError, match=r"^passwords\.memory_kib: must be at least 512 "):
        parsed("passwords = {parallelism = 64, memory_kib = 511}")


def test_password_threads_default_to_the_number_of_cores() -> None:
    assert PasswordSettings().thread_count >= 1
    assert PasswordSettings(threads=3).thread_count == 3


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.4", False), ("example.com", False), ("localhost.example.com", False)],
)  # fmt: skip
def test_only_loopback_addresses_are_this_machine(host: str, loopback: bool) -> None:
    assert parsed(f'server.host = "{host}"').server.loopback is loopback


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("ann", "ANN"),
        ("straße", "STRASSE"),
        ("ﬁn", "fin"),
        ("Ann", "\uff21\uff4e\uff4e"),
        ("e\u0301ve", "éve"),
        ("ΣΑΣ", "σας"),
    ],
)
def test_names_that_look_alike_are_the_same(one: str, another: str) -> None:
    assert canonical(one) == canonical(another)
    with pytest.raises(ConfigError, match=r"^users\[1\]\.username: .* exists already"):
        parsed(USER.replace("ann", one) + USER.replace("ann", another))


@pytest.mark.parametrize("name", ["ann", "ßẞ", "ŉ", "ΐ", "İ", "ǰ", "ᾳ", "\u0345", "K", "ﬅ", "Ǆ"])
def test_the_canonical_form_is_stable(name: str) -> None:
    assert canonical(canonical(name)) == canonical(name)


def test_users_are_found_by_their_canonical_name() -> None:
    user = parsed(USER.replace("ann", "Ann") + 'scopes = ["read"]').users_by_name["ann"]
    assert (user.username, user.password_hash, user.scopes) == ("ann", "x", ("read",))


@pytest.mark.parametrize(
    "name", ["", " ann", "ann ", "\\u0000", "a\\nb", "a\\u200bb", "a\\u202eb", "a\\u3164", "a" * 257]
)
def test_a_name_that_cannot_be_shown_or_typed_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^users\[0\]\.username: must (not )?have "):
        parsed(f'[[users]]\nusername = "{name}"\npassword = "x"')


@pytest.mark.parametrize("name", ["a", "a" * 256, "ann@example.com", "жанна", "Ann O'Neill", "\U0001f511"])
def test_any_other_name_may_log_in(name: str) -> None:
    assert len(parsed(USER.replace("ann", name)).users_by_name) == 1


@pytest.mark.parametrize("scope", ["", "a b", 'a\\"b', "a\\\\b", "é", "a\\n"])
def test_a_scope_is_a_word_of_rfc_6749(scope: str) -> None:
    with pytest.raises(ConfigError, match=r"^users\[0\]\.scopes\[1\]: "):
        parsed(f'{USER}scopes = ["read", "{scope}"]')


@pytest.mark.parametrize("origin", ["*", "https://*.example.com", "example.com", "https://a.b/", "null", "file://x"])
def test_an_origin_is_exact(origin: str) -> None:
    assert parsed('server.cors_origins = ["https://app.example.com", "http://localhost:3000"]')
    with pytest.raises(ConfigError, match=r"^server\.cors_origins\[0\]: must be an origin"):
        parsed(f'server.cors_origins = ["{origin}"]')


def test_an_origin_that_nearly_fits_gets_a_hint() -> None:
    for origin in ("https://a.b/", "https://a.b/path"):
        with pytest.raises(ConfigError, match=rf"not '{origin}'; write it without the slash and what follows$"):
            parsed(f'server.cors_origins = ["{origin}"]')
    with pytest.raises(ConfigError, match=r"; wildcards are not supported, list each origin$"):
        parsed('server.cors_origins = ["https://*.b"]')
    with pytest.raises(ConfigError, match=r"; write it in lower case, as browsers send it$"):
        parsed('server.cors_origins = ["https://A.b"]')


def test_an_origin_with_a_password_is_not_shown() -> None:
    for origin in ("https://ann:very-secret@a.b", "https://ann:very-secret@a.b/", "https://very-secret@*.b"):
        with pytest.raises(ConfigError, match=r"\[0\]: must have no user and no password") as refusal:
            parsed(f'server.cors_origins = ["{origin}"]')
        assert "very-secret" not in str(refusal.value)


@pytest.mark.parametrize("proxy", ["*", "proxy.local", "10.0.0.0/33", "10.0.0.1/8", ""])
def test_a_trusted_proxy_is_an_address_or_a_network(proxy: str) -> None:
    assert parsed('server.trusted_proxies = ["10.0.0.1", "10.0.0.0/8", "fd00::/8"]')
    with pytest.raises(ConfigError, match=r"^server\.trusted_proxies\[0\]: must be an IP address or network"):
        parsed(f'server.trusted_proxies = ["{proxy}"]')


RECORDS = [
    Settings(),
    *(getattr(Settings(), section) for section in SECTIONS),
    PoolSettings(),
    DialectSettings(pool="p"),
    PasswordDialectSettings(pool="p", password="x"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_cannot_be_changed(record: Table) -> None:
    with pytest.raises(AttributeError):
        setattr(record, msgspec.structs.fields(record)[0].name, None)


@pytest.mark.parametrize(
    ("issuer", "hint"),
    [
        ("https://ann:very-secret@auth.example.com", "must have no user and no password"),
        ("https://@auth.example.com", "must have no user and no password"),
        ("http://ann:very-secret@localhost", "must have no user and no password"),
        ("https://auth.example.com:99999", "a port from 1 to 65535 or none, not 'auth.example.com:99999'"),
        ("https://auth.example.com:0", "a port from 1 to 65535"),
        ("https://auth.example.com:", "a port from 1 to 65535"),
        ("https://auth.example.com:port", "must have a host"),
        ("http://localhost:70000", "a port from 1 to 65535"),
        ("https://auth.exämple.com", "write it as 'xn--...'"),
        ("https://:8443", "must have a host"),
        ("https://[::1", "must have a host"),
        ("https://a%20b", "must have a host"),
        ("https://auth.example.com/", "must be a URL"),
    ],
)
def test_an_issuer_that_is_no_usable_url_is_refused(issuer: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"^oauth\.issuer: ") as refusal:
        parsed(f'oauth.issuer = "{issuer}"')
    assert hint in str(refusal.value)
    assert "very-secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "host", ["auth.example.com", "a.b:8443", "xn--auth-4qa.example:65535", "[2001:db8::1]:443", "h/a/b"]
)
def test_an_issuer_has_a_host_and_maybe_a_port(host: str) -> None:
    assert parsed(f'oauth.issuer = "https://{host}"').oauth.issuer == f"https://{host}"
