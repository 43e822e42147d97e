"""The clock that never goes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenauth.clock import MonotonicClock


class ManualClock:
    """A clock that is set by hand."""

    def __init__(self, now: float = 0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time it was set to."""
        return self.now


def test_a_clock_set_forward_is_followed() -> None:
    wall, monotonic = ManualClock(1_000), ManualClock(50)
    clock = MonotonicClock(wall, monotonic)
    assert clock() == 1_000
    wall.now = 5_000
    assert clock() == 5_000


def test_a_clock_set_back_follows_the_monotonic_one() -> None:
    wall, monotonic = ManualClock(1_000), ManualClock(50)
    clock = MonotonicClock(wall, monotonic)
    wall.now, monotonic.now = 10, 53
    assert clock() == 1_003
    wall.now, monotonic.now = 11, 60.5
    assert clock() == 1_010.5
    wall.now, monotonic.now = 1_011, 60.5
    assert clock() == 1_011, "must follow the wall clock once that has caught up"


def test_a_slow_clock_follows_the_monotonic_one() -> None:
    wall, monotonic = ManualClock(1_000), ManualClock(0)
    clock = MonotonicClock(wall, monotonic)
    wall.now, monotonic.now = 1_001, 2
    assert clock() == 1_002


def test_an_advanced_clock_continues_from_there() -> None:
    wall, monotonic = ManualClock(1_000), ManualClock(0)
    clock = MonotonicClock(wall, monotonic)
    assert clock.advance(1_060) == 60
    assert clock() == 1_060
    wall.now, monotonic.now = 1_010, 10
    assert clock() == 1_070
    wall.now, monotonic.now = 1_500, 20
    assert clock() == 1_500


def test_only_a_jump_ahead_is_reported() -> None:
    wall, monotonic = ManualClock(1_000), ManualClock(0)
    clock = MonotonicClock(wall, monotonic)
    reported: list[float] = []
    clock.on_advance = reported.append
    for now, ticked in [(1_001, 1), (900, 2), (1_003.5, 3), (5_000, 4), (5_001, 5)]:
        wall.now, monotonic.now = now, ticked
        clock()
    assert reported == [5_000]


@pytest.mark.parametrize("past", [0, 999.5, 1_000])
def test_advancing_to_the_past_changes_nothing(past: float) -> None:
    clock = MonotonicClock(ManualClock(1_000), ManualClock(0))
    assert clock.advance(past) == 0
    assert clock() == 1_000


steps = st.tuples(st.integers(-10_000, 10_000), st.integers(0, 100), st.integers(-10_000, 10_000))


@given(st.lists(steps, max_size=50))
def test_time_never_decreases_or_lags_behind(moves: list[tuple[int, int, int]]) -> None:
    wall, monotonic = ManualClock(1_000_000), ManualClock(0)
    clock = MonotonicClock(wall, monotonic)
    before = clock()
    for jump, pause, advance in moves:
        wall.now += jump
        monotonic.now += pause
        now = clock()
        assert now >= before + pause
        assert now >= wall()
        assert now in {wall(), before + pause}
        behind = clock.advance(now + advance)
        assert behind == max(advance, 0)
        before = clock()
        assert before == now + max(advance, 0)
