"""The arithmetic of the records."""

import math
from dataclasses import replace
from hashlib import sha256

import pytest

from tokenauth.models import (
    ANY_LEASE,
    IssuedToken,
    Lease,
    LeaseCheck,
    Pool,
    PoolToken,
    Token,
    User,
    is_visible,
    public_id,
)

DIGEST = bytes(range(32))
TOKEN = Token.new(DIGEST, "ann", "fingerprint", 1_000.5, 2_000)
POOL = Pool("p", lease_ttl=60, token_ttl=240)
PERMIT = PoolToken("p", "permit", free_at=1_000, holder="ann", fence=3)
"""Leased to ann until 1,000, then free."""


def test_a_credential_depends_on_the_hash_and_not_the_name() -> None:
    assert User("ann", "hash-1").credential == User("bob", "hash-1").credential
    assert User("ann", "hash-1").credential != User("ann", "hash-2").credential


def test_a_credential_is_short_and_hides_the_hash() -> None:
    user = User("ann", "$argon2id$secret")
    assert user.credential == sha256(b"$argon2id$secret").hexdigest()[:16]
    assert "secret" not in repr(user)
    assert user.credential not in repr(user)


def test_the_same_user_is_an_equal_record() -> None:
    assert User("ann", "hash", ("read",)) == User("ann", "hash", ("read",))
    assert User("ann", "hash", ("read",)) != User("ann", "hash", ())


def test_an_id_is_24_hexadecimal_digits_of_the_digest() -> None:
    assert TOKEN.id == public_id(DIGEST) == "000102030405060708090a0b"


def test_a_token_that_is_printed_shows_no_secret() -> None:
    shown = repr(IssuedToken("the-value", TOKEN))
    assert "ann" in shown
    for secret in ("the-value", "fingerprint", DIGEST.hex(), repr(DIGEST)):
        assert secret not in shown


def test_a_new_token_is_unused_and_its_lifetime_fixed() -> None:
    assert (TOKEN.used_at, TOKEN.max_expires_at) == (TOKEN.issued_at, None)
    assert Token.new(DIGEST, "ann", "", 1_000.5, 2_000, max_expires_at=9_000).max_expires_at == 9_000


def test_records_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TOKEN.expires_at = 3_000  # type: ignore[misc]
    with pytest.raises(AttributeError):
        User("ann", "hash").scopes = ("admin",)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        POOL.capacity = 9  # type: ignore[misc]


@pytest.mark.parametrize(("now", "lease"), [(0, Lease("ann", 1_000)), (999.9, Lease("ann", 1_000)), (1_000, None)])
def test_a_lease_is_over_exactly_at_its_end(now: float, lease: Lease | None) -> None:
    assert PERMIT.lease(now) == lease
    assert LeaseCheck("ann", 3).matches(PERMIT, now) is (lease is not None)


@pytest.mark.parametrize("retired", [False, True])
@pytest.mark.parametrize(
    ("now", "leased", "alive"), [(999, True, True), (1_000, False, True), (1_239.9, False, True), (1_240, False, False)]
)
def test_a_token_lives_while_leased_and_token_ttl_longer(now: float, leased: bool, alive: bool, retired: bool) -> None:
    """A retired token is live only while it is leased."""
    assert POOL.is_live(PERMIT._replace(retired=retired), now) is (leased if retired else alive)


@pytest.mark.parametrize(
    ("pool", "retired", "expires_at"),
    [(POOL, False, 1_240), (POOL, True, 1_000), (replace(POOL, token_ttl=math.inf), False, None)],
)
def test_a_token_expires_at_the_instant_that_is_shown(pool: Pool, retired: bool, expires_at: float | None) -> None:
    token = PERMIT._replace(retired=retired)
    assert pool.expires_at(token) == expires_at
    if expires_at is None:
        assert pool.is_live(token, 1e300)
        assert pool.cutoff(1e300) == -math.inf
    else:
        assert pool.is_live(token, expires_at - 0.1)
        assert not pool.is_live(token, expires_at)


def test_each_lease_operation_changes_only_its_own_fields() -> None:
    free = PERMIT._replace(free_at=900, holder=None)
    leased = POOL.leased(free, "bob", "ann", 1_000)
    assert leased == PoolToken("p", "permit", free_at=1_060, holder="bob", fence=4, username="ann", leased_at=1_000)
    assert POOL.extended(leased, 1_050) == leased._replace(free_at=1_110)
    assert POOL.released(leased, 1_050) == leased._replace(free_at=1_050, holder=None, username=None, leased_at=None)
    retired = leased._replace(retired=True)
    assert POOL.extended(retired, 1_050).retired
    assert POOL.released(retired, 1_050).retired


def test_a_lease_lasts_as_long_as_its_request_asked() -> None:
    leased = POOL.leased(PERMIT, "bob", None, 1_000, ttl=20)
    assert (leased.free_at, leased.lease_ttl) == (1_020, 20)
    assert POOL.extended(leased, 1_015) == leased._replace(free_at=1_035)
    assert POOL.released(leased, 1_015).lease_ttl is None


def test_no_lease_is_kept_alive_past_lease_max() -> None:
    pool = replace(POOL, lease_max=100)
    leased = pool.leased(PERMIT, "bob", None, 1_000)
    assert pool.extended(leased, 1_030).free_at == 1_090
    assert pool.extended(leased, 1_050).free_at == 1_100
    assert pool.lease_ends_by(leased) == 1_100
    assert POOL.lease_ends_by(leased) is None
    assert replace(POOL, lease_max=30).leased(PERMIT, "bob", None, 1_000).free_at == 1_030
    assert pool.extended(PERMIT, 950).leased_at == 950, "of a lease from before its start was stored"


@pytest.mark.parametrize("holder", [None, "ann", "bob", "", "Ann"])
@pytest.mark.parametrize("fence", [None, 3, 2, 4, 0])
def test_a_lease_check_compares_what_it_names(holder: str | None, fence: int | None) -> None:
    right = holder in {None, "ann"} and fence in {None, 3}
    assert LeaseCheck(holder, fence).matches(PERMIT, 999) is right
    assert ANY_LEASE.matches(PERMIT, 999)
    assert not LeaseCheck(holder, fence).matches(PERMIT, 1_000)


@pytest.mark.parametrize(
    ("lessee", "user", "right"), [("ann", "ann", True), ("ann", "bob", False), (None, "ann", False)]
)
def test_a_lease_belongs_to_its_user_or_to_anyone(lessee: str | None, user: str, right: int) -> None:
    token = PERMIT._replace(username=lessee)
    assert LeaseCheck(username=user).matches_user(token) is bool(right)
    assert LeaseCheck("ann", 3, user).matches(token, 999) is bool(right)
    assert ANY_LEASE.matches(token, 999)


def test_the_repr_of_a_pool_token_hides_its_value() -> None:
    assert "ann" in repr(PERMIT)
    assert "permit" not in repr(PERMIT)


INVISIBLE = (
    "\u00ad \u034f \u115f \u1160 \u17b4 \u180b \u180f \u200d \u2028 \u2064 \u2800 \u3164 \ufe00 \ufe0f \ufeff \uffa0"
)
FURTHER = "\U00013441 \U00016fe4 \U0001bca0 \U0001d159 \U0001d173 \U000e0001 \U000e0100 \U000e01ef"


@pytest.mark.parametrize("letter", ["\u3000", *INVISIBLE.split(" "), *FURTHER.split(" ")], ids=ascii)
def test_what_shows_nothing_or_a_blank_is_not_visible(letter: str) -> None:
    assert [is_visible(text) for text in (letter, f"nightly{letter}", f"a{letter}b")] == [False] * 3


@pytest.mark.parametrize(
    "text", ["", "a b", "Größe 3 / prod", "e\u0301", "日本", "한글", "\u1112\u1161", "⠁", "👍🏽", "კ"]
)
def test_texts_of_any_script_are_visible(text: str) -> None:
    assert is_visible(text)
