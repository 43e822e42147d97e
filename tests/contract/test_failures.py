"""FailureStore: a count and an instant per key, until they are purged."""

import asyncio

import pytest

from tests.contract.conftest import Place
from tests.support.servers import START
from tokenauth.models import CountUpdate, Failures, ShareUpdate
from tokenauth.stores.store import FailureStore

FORGET = 60.0
ANN, BOB, NET = (bytes([number]) * 16 for number in range(3))


def failed(*keys: bytes, now: float = START) -> list[CountUpdate]:
    """Count a failure under each key, from one again if the last one is forgotten."""
    return [CountUpdate(key, 1, cutoff=now - FORGET, at=now) for key in keys]


async def test_what_was_never_noted_is_left_out(failures: FailureStore) -> None:
    assert dict(await failures.get([ANN, BOB])) == {}
    assert dict(await failures.get([])) == {}
    await failures.update(failed(BOB), START)
    assert dict(await failures.get([ANN, BOB])) == {BOB: Failures(1, START)}


async def test_each_key_is_counted_by_itself(failures: FailureStore) -> None:
    await failures.update(failed(ANN, NET), START)
    await failures.update(failed(BOB, NET, now=START + 1), START + 1)
    await failures.update(failed(ANN, NET, now=START + 2), START + 2)
    assert dict(await failures.get([ANN, BOB, NET])) == {
        ANN: Failures(2, START + 2),
        BOB: Failures(1, START + 1),
        NET: Failures(3, START + 2),
    }
    assert dict(await failures.get([NET])) == {NET: Failures(3, START + 2)}


async def test_counting_restarts_long_after_the_last_failure(failures: FailureStore) -> None:
    await failures.update(failed(ANN), START)
    await failures.update(failed(ANN, now=START + 59.9), START)
    assert (await failures.get([ANN]))[ANN] == Failures(2, START + 59.9)
    await failures.update(failed(ANN, now=START + 59.9 + 60), START)
    assert (await failures.get([ANN]))[ANN] == Failures(1, START + 119.9)


async def test_each_key_is_forgotten_by_its_own_instant(failures: FailureStore) -> None:
    await failures.update(failed(ANN, NET), START)
    await failures.update(failed(NET, now=START + 50), START)
    await failures.update(failed(ANN, NET, now=START + 70), START)
    assert {key: found.count for key, found in (await failures.get([ANN, NET])).items()} == {ANN: 1, NET: 3}


async def test_a_refund_never_makes_a_count_negative(failures: FailureStore) -> None:
    await failures.update([CountUpdate(BOB, -3)], START)
    await failures.update(failed(ANN) + failed(BOB), START)
    await failures.update(failed(ANN), START)
    await failures.update([CountUpdate(ANN, -1), CountUpdate(BOB, -5)], START + 1)
    assert dict(await failures.get([ANN, BOB])) == {ANN: Failures(1, START), BOB: Failures(0, START)}
    await failures.update(failed(BOB), START)
    assert (await failures.get([BOB]))[BOB] == Failures(1, START)


async def test_an_instant_is_moved_from_now_or_from_where_it_was(failures: FailureStore) -> None:
    for seconds, expected in ((0.0, 36.0), (0.0, 72.0), (10.0, 108.0), (200.0, 236.0)):
        await failures.update([CountUpdate(NET, at=START + seconds, shift=36.0)], START)
        assert (await failures.get([NET]))[NET] == Failures(0, START + expected)
    await failures.update([CountUpdate(NET, shift=-100.0)], START)
    assert (await failures.get([NET]))[NET] == Failures(0, START + 136.0)


async def test_an_instant_that_is_kept_never_becomes_earlier(failures: FailureStore) -> None:
    for at in (START + 100, START + 50):
        await failures.update([CountUpdate(ANN, at=at)], START)
        assert (await failures.get([ANN]))[ANN] == Failures(0, START + 100)


async def test_concurrent_notes_are_all_made(place: Place, other: Place) -> None:
    both = [place.failures, other.failures]
    ahead = CountUpdate(BOB, at=START, shift=1.0)
    await asyncio.gather(*(both[number % 2].update([*failed(ANN, NET), ahead], START) for number in range(100)))
    for each in both:
        assert dict(await each.get([ANN, BOB, NET])) == {
            ANN: Failures(100, START),
            BOB: Failures(0, START + 100),
            NET: Failures(100, START),
        }


async def test_a_failure_is_seen_by_every_process_at_once(place: Place, other: Place) -> None:
    for count in range(1, 20):
        await place.failures.update(failed(ANN), START)
        assert (await other.failures.get([ANN]))[ANN].count == count


async def test_a_purge_deletes_no_more_than_its_limit(failures: FailureStore) -> None:
    keys = [bytes([number]) * 16 for number in range(10)]
    for number, key in enumerate(keys):
        await failures.update(failed(key, now=START + number), START)
    assert await failures.purge(START + 6.5, 0) == 0
    assert await failures.purge(START + 6.5, 3) == 3
    assert await failures.purge(START + 6.5, 100) == 4
    assert await failures.purge(START + 6.5, 100) == 0
    assert set(await failures.get(keys)) == set(keys[7:])


@pytest.mark.parametrize(("before", "purged"), [(START - 1, 0), (START, 0), (START + 0.001, 1)])
async def test_a_purge_deletes_only_what_is_before_its_instant(
    failures: FailureStore, before: float, purged: int
) -> None:
    await failures.update(failed(ANN, now=START - 5), START)
    await failures.update(failed(ANN), START)
    assert await failures.purge(before, 100) == purged


async def test_a_refund_takes_back_what_is_counted_and_once(place: Place, other: Place) -> None:
    """However many callers there are; a bucket loses what is left of a share."""
    share, bucket = bytes([7]) * 16, bytes([8]) * 16
    filled = CountUpdate(bucket, at=START, shift=30.0, initial=7)
    of_share = ShareUpdate(share, bucket, START, 30.0)
    for number in range(1, 4):
        await place.failures.update([*failed(ANN, BOB), filled], START, [of_share])
        await place.failures.update([*failed(BOB), CountUpdate(bucket, at=START, shift=50.0)], START)
        refund = (ANN, BOB, [(share, bucket)], START - FORGET, START + 10)
        await asyncio.gather(*(each.failures.refund(*refund) for each in (place, other) * 10))
        found = await other.failures.get([ANN, BOB, share, bucket])
        assert found[ANN].count == 0
        assert found[BOB].count == number
        assert found[share].last_at == START + 10
        assert found[bucket].last_at == START + 10 + 50 * number


async def test_a_share_is_empty_once_its_bucket_is_cleared(failures: FailureStore) -> None:
    bucket, old, new = (bytes([number]) * 16 for number in (7, 1, 9))
    fill = CountUpdate(bucket, at=START, shift=30.0, initial=5)
    await failures.update([fill], START, [ShareUpdate(old, bucket, START, 30.0)])
    await failures.update([CountUpdate(bucket, 1, shift=-30.0)], START)
    await failures.update([fill], START, [ShareUpdate(new, bucket, START, 30.0)])
    await failures.refund(ANN, None, [(old, bucket)], START - FORGET, START)
    assert (await failures.get([bucket]))[bucket] == Failures(6, START + 30)
    await failures.update([fill], START, [ShareUpdate(old, bucket, START, 30.0)])
    found = await failures.get([bucket, old])
    assert found == {bucket: Failures(6, START + 60), old: Failures(6, START + 30)}
    for share in (old, new):
        await failures.refund(ANN, None, [(share, bucket)], START - FORGET, START)
    assert (await failures.get([bucket]))[bucket] == Failures(6, START)
