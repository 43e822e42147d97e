"""The records' arithmetic, and the clock that never goes back."""

import math
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenauth.models import ANY_LEASE, Claim, ForwardClock, Issued, Lease, Pool, PoolToken, Token, User, public_id

DIGEST = bytes(range(32))
TOKEN = Token(DIGEST, "ann", "fingerprint", 1_000.5, 2_000)
POOL = Pool("p", lease_ttl=60, token_ttl=240)
PERMIT = PoolToken("p", "permit", free_at=1_000, holder="ann", fence=3)
"""Lent to ann until 1,000, and free from then on."""


class Hand:
    """A clock that is set by hand."""

    def __init__(self, now: float = 0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Read it."""
        return self.now


def test_a_credential_tells_passwords_apart_and_names_alike() -> None:
    assert User("ann", "hash-1").credential == User("bob", "hash-1").credential
    assert User("ann", "hash-1").credential != User("ann", "hash-2").credential


def test_a_credential_is_short_and_does_not_give_the_hash_away() -> None:
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
    shown = repr(Issued("the-value", TOKEN))
    assert "ann" in shown
    for secret in ("the-value", "fingerprint", DIGEST.hex(), repr(DIGEST)):
        assert secret not in shown


def test_records_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        TOKEN.expires_at = 3_000  # type: ignore[misc]
    with pytest.raises(AttributeError):
        User("ann", "hash").scopes = ("admin",)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        POOL.capacity = 9  # type: ignore[misc]


@pytest.mark.parametrize(("now", "lease"), [(0, Lease("ann", 1_000)), (999.9, Lease("ann", 1_000)), (1_000, None)])
def test_a_lease_is_over_at_the_moment_its_time_is_up(now: float, lease: Lease | None) -> None:
    assert PERMIT.lease(now) == lease
    assert Claim("ann", 3).holds(PERMIT, now) is (lease is not None)


@pytest.mark.parametrize("retired", [False, True])
@pytest.mark.parametrize(
    ("now", "lent", "alive"), [(999, True, True), (1_000, False, True), (1_239.9, False, True), (1_240, False, False)]
)
def test_a_token_lives_while_it_is_lent_and_for_token_ttl_after_that(
    now: float, lent: bool, alive: bool, retired: bool
) -> None:
    """A retired one only while it is lent."""
    assert POOL.lives(PERMIT._replace(retired=retired), now) is (lent if retired else alive)


@pytest.mark.parametrize(
    ("pool", "retired", "gone"),
    [(POOL, False, 1_240), (POOL, True, 1_000), (replace(POOL, token_ttl=math.inf), False, None)],
)
def test_a_token_is_gone_at_the_instant_that_is_shown(pool: Pool, retired: bool, gone: float | None) -> None:
    token = PERMIT._replace(retired=retired)
    assert pool.expires_at(token) == gone
    if gone is None:
        assert pool.lives(token, 1e300)
        assert pool.floor(1e300) == -math.inf
    else:
        assert pool.lives(token, gone - 0.1)
        assert not pool.lives(token, gone)


def test_lending_extending_and_releasing_change_what_they_must_and_nothing_else() -> None:
    free = PERMIT._replace(free_at=900, holder=None)
    lent = POOL.leased(free, "bob", "ann", 1_000)
    assert lent == PoolToken("p", "permit", free_at=1_060, holder="bob", fence=4, username="ann")
    assert POOL.extended(lent, 1_050) == lent._replace(free_at=1_110)
    assert POOL.released(lent, 1_050) == lent._replace(free_at=1_050, holder=None, username=None)
    retired = lent._replace(retired=True)
    assert POOL.extended(retired, 1_050).retired
    assert POOL.released(retired, 1_050).retired


@pytest.mark.parametrize("holder", [None, "ann", "bob", "", "Ann"])
@pytest.mark.parametrize("fence", [None, 3, 2, 4, 0])
def test_a_claim_holds_when_all_that_it_names_is_right(holder: str | None, fence: int | None) -> None:
    right = holder in {None, "ann"} and fence in {None, 3}
    assert Claim(holder, fence).holds(PERMIT, 999) is right
    assert ANY_LEASE.holds(PERMIT, 999)
    assert not Claim(holder, fence).holds(PERMIT, 1_000)


@pytest.mark.parametrize(
    ("lessee", "user", "right"), [("ann", "ann", True), ("ann", "bob", False), (None, "ann", False)]
)
def test_only_its_user_owns_a_lease_and_anyone_may_where_no_user_is_named(
    lessee: str | None, user: str, right: int
) -> None:
    token = PERMIT._replace(username=lessee)
    assert Claim(username=user).owns(token) is bool(right)
    assert Claim("ann", 3, user).holds(token, 999) is bool(right)
    assert ANY_LEASE.holds(token, 999)


def test_a_permit_that_is_printed_does_not_show_what_it_permits_with() -> None:
    assert "ann" in repr(PERMIT)
    assert "permit" not in repr(PERMIT)


def test_a_clock_that_is_set_forward_is_believed() -> None:
    wall, ticks = Hand(1_000), Hand(50)
    clock = ForwardClock(wall, ticks)
    assert clock() == 1_000
    wall.now = 5_000
    assert clock() == 5_000


def test_a_clock_that_is_set_back_goes_on_at_the_pace_of_ticks() -> None:
    wall, ticks = Hand(1_000), Hand(50)
    clock = ForwardClock(wall, ticks)
    wall.now, ticks.now = 10, 53
    assert clock() == 1_003
    wall.now, ticks.now = 11, 60.5
    assert clock() == 1_010.5
    wall.now, ticks.now = 1_011, 60.5
    assert clock() == 1_011, "once it has caught up it is believed again"


def test_a_clock_that_is_slower_than_ticks_goes_on_at_the_pace_of_ticks() -> None:
    wall, ticks = Hand(1_000), Hand(0)
    clock = ForwardClock(wall, ticks)
    wall.now, ticks.now = 1_001, 2
    assert clock() == 1_002


def test_a_clock_is_advanced_to_an_instant_and_goes_on_from_there() -> None:
    wall, ticks = Hand(1_000), Hand(0)
    clock = ForwardClock(wall, ticks)
    assert clock.advance(1_060) == 60
    assert clock() == 1_060
    wall.now, ticks.now = 1_010, 10
    assert clock() == 1_070
    wall.now, ticks.now = 1_500, 20
    assert clock() == 1_500


@pytest.mark.parametrize("past", [0, 999.5, 1_000])
def test_advancing_to_the_past_changes_nothing(past: float) -> None:
    clock = ForwardClock(Hand(1_000), Hand(0))
    assert clock.advance(past) == 0
    assert clock() == 1_000


steps = st.tuples(st.integers(-10_000, 10_000), st.integers(0, 100), st.integers(-10_000, 10_000))


@given(st.lists(steps, max_size=50))
def test_time_never_decreases_and_never_lags_behind_wall_or_ticks(moves: list[tuple[int, int, int]]) -> None:
    wall, ticks = Hand(1_000_000), Hand(0)
    clock = ForwardClock(wall, ticks)
    before = clock()
    for jump, pause, advance in moves:
        wall.now += jump
        ticks.now += pause
        now = clock()
        assert now >= before + pause
        assert now >= wall()
        assert now in {wall(), before + pause}
        behind = clock.advance(now + advance)
        assert behind == max(advance, 0)
        before = clock()
        assert before == now + max(advance, 0)
