"""FailureStore: failed logins are counted by key, until they are forgotten, cleared or purged."""

import asyncio

import pytest

from tests.contract.conftest import Place
from tests.servers import START
from tokenauth.models import Failures
from tokenauth.stores.base import FailureStore

FORGET = 60.0
ANN, BOB, NET = (bytes([number]) * 16 for number in range(3))


async def test_what_never_failed_is_left_out(failures: FailureStore) -> None:
    assert dict(await failures.failures([ANN, BOB])) == {}
    assert dict(await failures.failures([])) == {}
    await failures.fail([BOB], START, FORGET)
    assert dict(await failures.failures([ANN, BOB])) == {BOB: Failures(1, START)}


async def test_each_failure_counts_one_under_each_key(failures: FailureStore) -> None:
    await failures.fail([ANN, NET], START, FORGET)
    await failures.fail([BOB, NET], START + 1, FORGET)
    await failures.fail([ANN, NET], START + 2, FORGET)
    assert dict(await failures.failures([ANN, BOB, NET])) == {
        ANN: Failures(2, START + 2),
        BOB: Failures(1, START + 1),
        NET: Failures(3, START + 2),
    }
    assert dict(await failures.failures([NET])) == {NET: Failures(3, START + 2)}


async def test_counting_starts_from_one_again_when_the_last_failure_is_long_past(failures: FailureStore) -> None:
    await failures.fail([ANN], START, FORGET)
    await failures.fail([ANN], START + 59.9, FORGET)
    assert (await failures.failures([ANN]))[ANN] == Failures(2, START + 59.9)
    await failures.fail([ANN], START + 59.9 + 60, FORGET)
    assert (await failures.failures([ANN]))[ANN] == Failures(1, START + 119.9)


async def test_each_key_is_forgotten_by_its_own_last_failure(failures: FailureStore) -> None:
    await failures.fail([ANN, NET], START, FORGET)
    await failures.fail([NET], START + 50, FORGET)
    await failures.fail([ANN, NET], START + 70, FORGET)
    assert {key: found.count for key, found in (await failures.failures([ANN, NET])).items()} == {ANN: 1, NET: 3}


async def test_concurrent_failures_are_all_counted(place: Place, other: Place) -> None:
    both = [place.failures, other.failures]
    await asyncio.gather(*(both[number % 2].fail([ANN, NET], START, FORGET) for number in range(100)))
    for each in both:
        assert dict(await each.failures([ANN, NET])) == {ANN: Failures(100, START), NET: Failures(100, START)}


async def test_a_failure_is_seen_by_every_process_at_once(place: Place, other: Place) -> None:
    for count in range(1, 20):
        await place.failures.fail([ANN], START, FORGET)
        assert (await other.failures.failures([ANN]))[ANN].count == count


async def test_a_cleared_key_counts_nothing(place: Place, other: Place) -> None:
    await place.failures.fail([ANN, NET], START, FORGET)
    await place.failures.clear(ANN, START)
    for each in (place, other):
        assert set(await each.failures.failures([ANN, NET])) == {NET}
    await place.failures.fail([ANN], START, FORGET)
    assert (await place.failures.failures([ANN]))[ANN].count == 1


async def test_clearing_a_key_that_counts_nothing_is_nothing(failures: FailureStore) -> None:
    await failures.clear(ANN, START)
    assert dict(await failures.failures([ANN])) == {}


async def test_a_purge_deletes_no_more_than_its_limit(failures: FailureStore) -> None:
    keys = [bytes([number]) * 16 for number in range(10)]
    for number, key in enumerate(keys):
        await failures.fail([key], START + number, FORGET)
    assert await failures.purge_failures(START + 6.5, 0) == 0
    assert await failures.purge_failures(START + 6.5, 3) == 3
    assert await failures.purge_failures(START + 6.5, 100) == 4
    assert await failures.purge_failures(START + 6.5, 100) == 0
    assert set(await failures.failures(keys)) == set(keys[7:])


@pytest.mark.parametrize(("before", "purged"), [(START - 1, 0), (START, 0), (START + 0.001, 1)])
async def test_a_purge_deletes_what_failed_before_an_instant_and_not_at_it(
    failures: FailureStore, before: float, purged: int
) -> None:
    await failures.fail([ANN], START - 5, FORGET)
    await failures.fail([ANN], START, FORGET)
    assert await failures.purge_failures(before, 100) == purged
