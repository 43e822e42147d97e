"""The check of histories reports impossible histories, and no others. The histories here are written by hand."""

import math

import pytest

from tests.support.connections import NoAnswer
from tests.support.history import Event, Grant, HandTime, History, Outcome, RealTime, violations

TTL, CAPACITY = 10.0, 2
DONE, REFUSED, UNKNOWN = Outcome


def assign(lease: str, invoked: float, returned: float, fence: int = 1, token: str = "t") -> Event:
    return Event("assign", DONE, invoked, returned, invoked, lease, token, fence)


def keep(lease: str, invoked: float, returned: float, outcome: Outcome = DONE) -> Event:
    return Event("keep_alive", outcome, invoked, returned, invoked, lease, "t")


def release(lease: str, invoked: float, returned: float, outcome: Outcome = DONE) -> Event:
    return Event("release", outcome, invoked, returned, invoked, lease, "t")


def generate(token: str, outcome: Outcome = DONE) -> Event:
    return Event("generate", outcome, -2, -1, -2, token=token)


def delete(token: str, invoked: float, returned: float, outcome: Outcome = DONE) -> Event:
    return Event("delete", outcome, invoked, returned, invoked, token=token)


A = assign("a", 0, 1)
"""Held from 1 to 10, if nothing else happens."""

POSSIBLE: dict[str, list[Event]] = {
    "leased again after its release": [A, release("a", 3, 6), assign("b", 4, 5, 2)],
    "leased again after a release without an answer": [A, release("a", 2, math.inf, UNKNOWN), assign("b", 3, 4, 2)],
    "leased again after its end": [A, assign("b", 9, 10.5, 2)],
    "leased again after its extended end": [A, keep("a", 8, 9), assign("b", 17, 18.5, 2)],
    "a keep-alive without an answer": [A, keep("a", 8, math.inf, UNKNOWN), assign("b", 10, 11, 2)],
    "an answer that arrived after the end of its lease": [assign("a", 0, 25), assign("b", 11, 12, 2)],
    "two answers that overtook each other": [assign("a", 0, 12), assign("b", 10, 11, 2), keep("a", 13, 14, REFUSED)],
    "a refused stale request": [A, release("a", 2, 3), release("a", 4, 5, REFUSED), keep("a", 6, 7, REFUSED)],
    "refused when it may have ended": [A, keep("a", 9, 10.5, REFUSED)],
    "refused when its token was deleted": [A, delete("t", 2, 3), keep("a", 2.5, 4, REFUSED)],
    "refused when its token may have been deleted": [A, delete("t", 2, math.inf, UNKNOWN), keep("a", 3, 4, REFUSED)],
    "leased during its deletion": [delete("t", 0, 3), assign("a", 1, 2)],
    "a refused deletion": [delete("t", -4, -3, REFUSED), A],
    "as many leases as the capacity": [A, assign("b", 0, 1, token="u")],
    "a token replaces a deleted one": [
        delete("u", 1, 2),
        Event("generate", DONE, 1, 2, 1, token="v"),
        A,
        assign("b", 2, 3, token="v"),
    ],
    "the generated tokens are unknown": [generate("", UNKNOWN), A, assign("b", 0, 1, token="v")],
}

IMPOSSIBLE: dict[str, tuple[list[Event], list[str]]] = {
    "leased to two": (
        [A, assign("b", 2, 3, 2)],
        ["token t: leased to b (fence 2) at 3.000000, and a (fence 1) certainly held it until 10.000000"],
    ),
    "leased before its extended end": (
        [A, keep("a", 8, 9), assign("b", 10, 11, 2)],
        ["certainly held it until 18"],
    ),
    "leased to two, one of them not adjacent": (
        [A, assign("b", 2, 3, 2), release("b", 4, 5), assign("c", 6, 7, 3)],
        ["leased to b (fence 2) at 3.000000, and a", "leased to c (fence 3) at 7.000000, and a"],
    ),
    "leased despite a refused release": (
        [A, release("a", 10, 11, REFUSED), keep("a", 2, 3), assign("b", 4, 5, 2)],
        [
            "leased to b",
            "release was refused to a",
        ],
    ),
    "a fence twice": ([A, release("a", 2, 3), assign("b", 4, 5)], ["a (fence 1) and to b (fence 1) with the same"]),
    "a fence that falls": (
        [assign("a", 0, 1, 2), release("a", 2, 3), assign("b", 4, 5, 1)],
        ["leased to b (fence 1), which requested it after a (fence 2) had it"],
    ),
    "a fence that falls below one that is not adjacent": (
        [
            assign("a", 0, 1, 3),
            release("a", 2, 3),
            assign("c", 2.5, 9, 4),
            release("c", 9.1, 9.2),
            assign("b", 4, 9.5, 2),
        ],
        ["leased to b (fence 2), which requested it after a (fence 3) had it"],
    ),
    "a keep-alive was refused": (
        [A, keep("a", 8, 9, REFUSED)],
        ["keep_alive was refused to a (fence 1), which certain"],
    ),
    "a release was refused": ([A, release("a", 8, 9, REFUSED)], ["release was refused to a (fence 1), which certain"]),
    "released twice": (
        [A, release("a", 2, 3), release("a", 4, 5)],
        ["release was done for a (fence 1) after it was r"],
    ),
    "kept alive after its release": ([A, release("a", 2, 3), keep("a", 4, 5)], ["keep_alive was done for a (fence 1)"]),
    "released by an earlier holder": (
        [A, assign("b", 11, 12, 2), release("a", 13, 14)],
        ["release was done for a (fence 1) after b (fence 2) had the token"],
    ),
    "kept alive after its deletion": ([A, delete("t", 2, 3), keep("a", 4, 5)], ["for a (fence 1) after its token was"]),
    "leased after its deletion": (
        [delete("t", -1, -0.5), A],
        ["assign was done for a (fence 1) after its token was del"],
    ),
    "leased but never generated": ([assign("a", 0, 1, token="v")], ["token v: leased to a (fence 1) before it was"]),
    "leased before it was generated": (
        [assign("a", -4, -3)],
        ["token t: leased to a (fence 1) before it was generated"],
    ),
    "more leases than the capacity": (
        [generate("", UNKNOWN), A, assign("b", 0, 2, token="u"), assign("c", 0, 3, token="v")],
        ["3 leases were certainly held at 3.000000, and the capacity is 2"],
    ),
    "more tokens than the capacity": ([generate("v")], ["3 tokens certainly existed at -1.000000, and the"]),
    "more tokens than the capacity after a refused deletion": (
        [generate("v"), delete("u", -4, -3, REFUSED)],
        ["3 tokens certainly existed"],
    ),
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_a_possible_history_is_not_reported(name: str) -> None:
    for events in (POSSIBLE[name], POSSIBLE[name][::-1]):  # the order of the records does not matter
        assert violations([generate("t"), generate("u"), *events], TTL, CAPACITY) == []


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_each_impossible_history_is_reported_once(name: str) -> None:
    events, expected = IMPOSSIBLE[name]
    found = violations([generate("t"), generate("u"), *events], TTL, CAPACITY)
    assert len(found) == len(expected), found
    assert all(part in sentence for part, sentence in zip(expected, found, strict=True)), found


@pytest.mark.parametrize(("passed", "faults"), [(TTL - 0.001, 1), (TTL, 0)])
def test_a_manual_clock_ends_a_lease_exactly_at_its_end(time: HandTime, passed: float, faults: int) -> None:
    history = History(time)
    history.record("generate", lambda: Grant("t"))
    time.advance(1)
    history.record("assign", lambda: Grant("t", 1), "a")
    time.advance(passed / 2)
    time.advance(passed / 2)
    history.record("assign", lambda: Grant("t", 2), "b")
    time.advance(TTL)
    assert len(history.violations(TTL, CAPACITY)) == faults


@pytest.mark.parametrize(("ttl", "faults"), [(3600, 1), (0, 0)])
def test_with_the_real_clock_a_lease_is_held_for_its_time(ttl: float, faults: int) -> None:
    history = History(RealTime())
    for fence, lease in enumerate("ab", 1):
        history.record("assign", lambda fence=fence: Grant("t", fence), lease)  # type: ignore[misc]
    assert len([found for found in history.violations(ttl, CAPACITY) if "certainly held" in found]) == faults


def test_a_request_without_an_answer_is_recorded(time: HandTime) -> None:
    history = History(time)

    def hang_up() -> None:
        raise NoAnswer

    with pytest.raises(NoAnswer):
        history.record("release", hang_up, "a", "t", 1)
    [event] = history.events
    assert (event.outcome, event.returned, event.lease, event.token, event.fence) == (UNKNOWN, math.inf, "a", "t", 1)
