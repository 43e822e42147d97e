"""Refusals that repeat: the first is a record at once, those that follow are one record a minute, with their number."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

from tokenauth.audit.repeats import MAX_GROUPS, PERIOD, REPEATED, Repeats
from tokenauth.request_context import RequestContext


class Sent(RequestContext):
    """A request from an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def trace(self) -> dict[str, str]:
        return {}

    def origin(self) -> dict[str, str]:
        return {"address": self._address, "user_agent": "curl"}


Refusal = tuple[dict[str, object], Sent]


def denied(route: str, scope: str = "admin") -> Refusal:
    event = {"event": "access_denied", "user": "ann", "reason": "insufficient_scope", "route": route, "scope": scope}
    return {**event}, Sent("192.0.2.7")


def failed(user: str = "ann", address: str = "192.0.2.7") -> Refusal:
    return {"event": "login_failed", "user": user}, Sent(address)


def add(repeats: Repeats, refusals: Iterable[Refusal], now: float = 0) -> list[Any]:
    """Add refusals, and return the records that are to be written at once."""
    return [record for event, request in refusals if (record := repeats.add(event, request, now)) is not None]


def counts(records: Iterable[Any]) -> list[int]:
    return [record["details"]["count"] for record in records]


def test_the_first_is_written_and_the_others_counted() -> None:
    repeats = Repeats()
    [first] = add(repeats, [failed()] * 5)
    assert (first["user"], first["address"], first["result"]) == ("ann", "192.0.2.7", "invalid_credentials")
    assert "details" not in first
    assert repeats.next_due() == PERIOD
    assert repeats.due(PERIOD - 1) == []
    [counted] = repeats.due(PERIOD)
    assert counted["details"] == {"count": 4}
    without_time = {"time": "", "details": {}}
    assert {**counted, **without_time} == {**first, **without_time}


def test_a_flood_is_one_record_a_minute() -> None:
    repeats, found = Repeats(), []
    for minute in range(5):
        add(repeats, [failed()] * 1000, now=minute * PERIOD)
        found += counts(repeats.due((minute + 1) * PERIOD))
    assert found == [999, 1000, 1000, 1000, 1000]


def test_after_a_minute_without_any_the_next_is_written() -> None:
    repeats = Repeats()
    assert len(add(repeats, [failed()] * 2)) == 1
    assert len(repeats.due(PERIOD)) == 1
    assert add(repeats, [failed()], now=1.5 * PERIOD) == []
    assert len(repeats.due(2 * PERIOD)) == 1
    assert repeats.due(3 * PERIOD) == []
    assert repeats.next_due() is None
    assert len(add(repeats, [failed()], now=3 * PERIOD)) == 1


def test_other_users_networks_results_and_targets_are_told_apart() -> None:
    different: list[Refusal] = [
        failed(),
        failed("bob"),
        failed(address="198.51.100.7"),
        failed(address="2001:db8::1"),
        failed(address="2001:db8:0:1::1"),
        ({"event": "login_refused", "user": "ann", "reason": "too_many_attempts"}, Sent("192.0.2.7")),
        ({"event": "login_refused", "user": "ann", "reason": "overloaded"}, Sent("192.0.2.7")),
        denied("/auth"),
        denied("/api/status"),
    ]
    repeats = Repeats()
    assert len(add(repeats, different)) == len(different)
    same = [failed(address="192.0.2.99"), failed(address="2001:db8::2")]
    assert add(repeats, [*different, *same]) == []
    assert sum(counts(repeats.due())) == len(different) + 2


def test_details_of_the_first_counted_one_stay() -> None:
    repeats = Repeats()
    add(repeats, [denied("/auth", scope) for scope in ("one", "two", "three")])
    [record] = repeats.due()
    assert (record["target"], record["details"]) == ("/auth", {"scope": "two", "count": 2})


def test_further_networks_are_counted_by_user() -> None:
    repeats = Repeats()
    attacks = [failed("ann", f"198.51.{number}.1") for number in range(50)]
    assert len(add(repeats, attacks)) == MAX_GROUPS
    [record] = repeats.due()
    assert (record["user"], record["details"]) == ("ann", {"count": 50 - MAX_GROUPS})
    assert not {"address", "user_agent", "by"} & record.keys()


def test_further_users_are_counted_by_result() -> None:
    repeats = Repeats()
    assert len(add(repeats, (failed(f"user{number}") for number in range(100)))) == MAX_GROUPS
    *by_user, rest = repeats.due()
    assert [record["user"] for record in by_user] == [f"user{MAX_GROUPS + number}" for number in range(MAX_GROUPS)]
    assert (rest["action"], rest["result"]) == ("login", "invalid_credentials")
    assert rest["details"] == {"count": 100 - 2 * MAX_GROUPS}
    assert not {"user", "address"} & rest.keys()


def test_a_botnet_writes_a_bounded_number_of_lines() -> None:
    """From any number of networks, under any names: at most two groups of MAX_GROUPS a minute, and one for the rest."""
    repeats, lines, sent = Repeats(), 0, 0
    for minute in range(10):
        for user, part in product(range(60), range(50)):
            refusals = [failed(f"user{(user + minute) % 90}", f"10.{minute}.{part}.1")]
            lines += len(add(repeats, refusals, now=minute * PERIOD + user))
            sent += 1
        lines += len(repeats.due((minute + 1) * PERIOD))
    assert sent == 30_000
    assert lines <= 10 * (2 * MAX_GROUPS + 1) + 2 * MAX_GROUPS
    assert sum(len(groups) for groups in repeats._levels) <= 2 * MAX_GROUPS + 1


def test_nothing_is_lost_in_the_counting() -> None:
    repeats = Repeats()
    written: list[Any] = []
    for second in range(600):
        refusals = [failed(f"user{second % 31}", f"10.0.{second % 7}.{number}") for number in range(10)]
        written += add(repeats, refusals, now=second) + repeats.due(second)
    written += repeats.due()
    assert sum(record.get("details", {}).get("count", 1) for record in written) == 6000


@pytest.mark.parametrize("event", sorted(REPEATED))
def test_each_kind_of_refusal_is_counted(event: str) -> None:
    repeats = Repeats()
    refusals: list[Refusal]
    refusals = [({"event": event, "user": "ann", "reason": "because", "id": str(n)}, Sent("192.0.2.7")) for n in "123"]
    assert len(add(repeats, refusals)) == 1
    assert counts(repeats.due()) == [2]
