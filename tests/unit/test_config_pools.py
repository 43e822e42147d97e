"""The settings in [pools.NAME] and [dialects.NAME], alone and together."""

import math
from typing import Any

import pytest

from tokenauth.errors import ConfigError
from tokenauth.models import Member, Pool
from tokenauth.settings import loader
from tokenauth.settings.dialects import DialectSettings
from tokenauth.settings.model import Settings

YEARS = 10 * 365 * 86400
PERMITS = "[pools.p]\ncapacity = 1\nprefill = true\n"


def parsed(text: str) -> Settings:
    """Read TOML, with an empty environment."""
    return loader.parse(text, {})


def mistake(text: str) -> str:
    """Return the error for a text."""
    with pytest.raises(ConfigError) as refusal:
        parsed(text)
    return str(refusal.value)


def dialect(more: str = "", name: str = "token-pool", pool: str = "[pools.p]\n") -> str:
    """Return TOML for a dialect over the pool `p`."""
    return f'{pool}[dialects.{name}]\npool = "p"\n{more}'


RANGES: dict[str, tuple[Any, Any]] = {
    "capacity": (0, 100_000_000),
    "token_ttl": (1, YEARS),
    "lease_ttl": (1, YEARS),
    "reclaim_delay": (0, 86400),
    "per_user": (1, 1_000_000),
}


@pytest.mark.parametrize("key", RANGES)
def test_a_number_may_equal_its_bounds_but_not_pass_them(key: str) -> None:
    low, high = RANGES[key]
    for number in (low, high):
        assert getattr(parsed(f"[pools.p]\n{key} = {number}").pools["p"], key) == number
    for number in (low - 1, high + 1, 2**63, -(2**63), 10**30):
        assert mistake(f"[pools.p]\n{key} = {number}").startswith(f"pools.p.{key}: ")


@pytest.mark.parametrize("key", ["token_ttl", "lease_ttl"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_time_to_live_is_finite(key: str, number: str) -> None:
    assert mistake(f"[pools.p]\n{key} = {number}").startswith(f"pools.p.{key}: must be a duration from 1s to ")


def test_pool_settings_are_read_from_the_file() -> None:
    settings = parsed("""
        pools.plain = {}
        [pools.all]
        capacity = 3
        token_ttl = "5m"
        lease_ttl = 1.5
        scope = "gpu"
        [pools.full]
        capacity = 0
        prefill = true
    """)
    assert settings.pools_by_name == {
        "plain": Pool("plain", lease_ttl=60, token_ttl=math.inf, capacity=None, prefill=False, scope=None),
        "all": Pool("all", lease_ttl=1.5, token_ttl=300, capacity=3, prefill=False, scope="gpu"),
        "full": Pool("full", lease_ttl=60, token_ttl=math.inf, capacity=0, prefill=True, scope=None),
    }


@pytest.mark.parametrize("name", ["a", "A-1", "a_b", '"v1.2"', '"..."', "1", "a" * 64])
def test_a_pool_name_needs_no_encoding_in_a_url(name: str) -> None:
    assert list(parsed(f"[pools.{name}]").pools_by_name) == [name.strip('"')]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "a%", "{a}", "a\\n", "a" * 65, "\\u0000", ".", ".."])
def test_any_other_pool_name_is_refused(name: str) -> None:
    assert " is not a name of 1 to 64 letters, digits, dots, dashes and underscores" in mistake(f'[pools."{name}"]')


@pytest.mark.parametrize("scope", ["", "a b", 'a\\"b', "a\\\\b", "é"])
def test_the_scope_of_a_pool_is_a_word_of_rfc_6749(scope: str) -> None:
    assert mistake(f'[pools.p]\nscope = "{scope}"').startswith("pools.p.scope: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefill = true", "pools.p.prefill: needs `capacity`, the number of tokens to keep"),
        ("prefill = true\ncapacity = 1\ntoken_ttl = 9", "pools.p.token_ttl: must not be set with prefill, "),
    ],
)
def test_prefill_requires_capacity_and_excludes_token_ttl(text: str, message: str) -> None:
    assert mistake(f"[pools.p]\n{text}").startswith(message)


def members(*lines: str, before: str = "") -> str:
    """Return TOML for a pool with a member for each line."""
    return f"[pools.p]\n{before}\n" + "\n".join(f"[[pools.p.members]]\n{line}" for line in lines)


def test_members_are_read_from_the_file() -> None:
    pool = parsed(
        members(
            'name = "pixel-8"\nlabels = ["android", "os:14", "gpu=a/1"]\nnote = "shelf 3"',
            'name = "moto"',
            before='lease_max = "8h"\nreclaim_delay = "15s"\nper_user = 1',
        )
    ).pools_by_name["p"]
    assert pool.members == {
        "pixel-8": Member("pixel-8", ("android", "os:14", "gpu=a/1"), "shelf 3"),
        "moto": Member("moto"),
    }
    assert (pool.capacity, pool.lease_max, pool.reclaim_delay, pool.per_user) == (2, 8 * 3600, 15, 1)


NO_MEMBERS = {
    members('note = "x"'): "members[0].name: is missing",
    members(
        'name = "a b"'
    ): "members[0].name: must be 1 to 64 letters, digits, dots, dashes and underscores, not 'a b'",
    members('name = ".."'): "members[0].name: must be 1 to 64 letters, digits, dots, dashes and underscores, not '..'",
    members(
        'name = "a"', 'name = "b"', 'name = "a"'
    ): "members[2].name: 'a' is the name of members[0]: use another one",
    members('name = "a"\nlabels = ["a b"]'): "members[0].labels[0]: must be 1 to 64 letters, digits and any of"
    " . _ : = / + -, not 'a b'",
    members('name = "a"\nlabels = ["x", "x"]'): "members[0].labels: has a label twice",
    members('name = "a"\nlabels = ["b"]', 'name = "b"'): "members[0].labels: 'b' is the name of a member, and so"
    " selects that one: use another word",
    members('name = "a"\nnote = "x\\u3164"'): "members[0].note: must be one line of at most 256 visible characters",
    members('name = "a"\nnote = "x\\ny"'): "members[0].note: must be one line of at most 256 visible characters",
    members(f'name = "a"\nnote = "{"x" * 257}"'): "members[0].note: must be one line of at most 256 visible characters",
    members('name = "a"', before="capacity = 1"): "capacity: must not be set with members: the pool has exactly these"
    " tokens",
    members('name = "a"', before="capacity = 0"): "capacity: must not be set with members: the pool has exactly these"
    " tokens",
    members('name = "a"', before="prefill = true"): "prefill: must not be set with members: the pool has exactly these"
    " tokens",
    members('name = "a"', before="token_ttl = 9"): "token_ttl: must not be set with members: the pool has exactly these"
    " tokens",
    members(*(f'name = "m{number}"' for number in range(1001))): "members: must be at most 1000, not 1001",
    '[pools.p.members]\nname = "a"': "members: must be an array, not a table: write [[pools.p.members]], with two"
    " pairs of brackets",
    members('nmae = "a"'): "members[0].nmae: there is no such key; did you mean name?",
}


@pytest.mark.parametrize("text", NO_MEMBERS, ids=NO_MEMBERS.values())
def test_a_mistake_in_a_member_is_named(text: str) -> None:
    assert mistake(text) == f"pools.p.{NO_MEMBERS[text]}"


def test_a_pool_has_up_to_1000_members() -> None:
    assert len(parsed(members(*(f'name = "m{number}"' for number in range(1000)))).pools_by_name["p"].members) == 1000


def test_lease_max_is_at_least_lease_ttl() -> None:
    assert parsed("[pools.p]\nlease_max = 60").pools_by_name["p"].lease_max == 60
    assert mistake("[pools.p]\nlease_max = 59") == "pools.p.lease_max: must not be less than lease_ttl"


@pytest.mark.parametrize("prefix", ["", "/a", "/a/b", "/token-pool", "/v1.2/~x_y"])
def test_a_prefix_is_empty_or_a_path(prefix: str) -> None:
    assert parsed(dialect(f'prefix = "{prefix}"')).dialects["token-pool"] == DialectSettings(pool="p", prefix=prefix)


@pytest.mark.parametrize(
    "prefix", ["/", "a", "/a/", "//a", "/a b", "/é", "/{a}", "/a?b", "/%61", "/a\\n", "/.", "/a/.."]
)
def test_any_other_prefix_is_refused(prefix: str) -> None:
    assert mistake(dialect(f'prefix = "{prefix}"')).startswith("dialects.token-pool.prefix: ")


@pytest.mark.parametrize("password", ["", "a b", "é", "a\\n", "a\\u0000", "x" * 1025])
def test_a_dialect_password_must_fit_in_a_header(password: str) -> None:
    name = "simple-token-implement"
    assert parsed(dialect(f'password = "{"x" * 1024}"', name, PERMITS))
    message = mistake(dialect(f'password = "{password}"', name, PERMITS))
    assert message.startswith("dialects.simple-token-implement.password: must be 1 to 1024 ASCII characters")
    assert "x" * 20 not in message


UNSUITABLE = {
    dialect(pool=""): "dialects.token-pool.pool: must be one of the pools (none): there is no [pools.p]",
    dialect(pool="[pools.a]\n[pools.b]\n"): "dialects.token-pool.pool: must be one of the pools (a, b): there is no"
    " [pools.p]",
    dialect(pool='[pools.p]\nscope = "x"\n'): "dialects.token-pool.require_token: must be true, because [pools.p]"
    " needs a scope",
    dialect(
        pool=members('name = "a"') + "\n"
    ): "dialects.token-pool.pool: [pools.p] must have no members: use another pool",
    dialect(pool="[pools.p]\nper_user = 1\n"): "dialects.token-pool.require_token: must be true, because [pools.p] has"
    " per_user",
    dialect('password = "x"', "simple-token-implement"): "dialects.simple-token-implement.pool: [pools.p] must have"
    " prefill = true",
}


@pytest.mark.parametrize("text", UNSUITABLE)
def test_a_dialect_is_refused_over_an_unsuitable_pool(text: str) -> None:
    assert mistake(text) == UNSUITABLE[text]


def test_a_dialect_with_login_may_use_a_scoped_pool() -> None:
    assert parsed(dialect("require_token = true", pool='[pools.p]\nscope = "x"\n')).pools_by_name["p"].scope == "x"


def test_only_the_configured_dialects_are_served() -> None:
    assert parsed("").dialects == {}
    assert list(parsed(dialect()).dialects) == ["token-pool"]
