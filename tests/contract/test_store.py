"""Store: start and stop, duties, and writes that share commits but not their failures."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import structlog

from tests.contract.conftest import Place, Places, token
from tests.support.servers import START
from tokenauth.models import CountUpdate
from tokenauth.service import create_service
from tokenauth.settings.model import DatabaseSettings, Settings

KEY = bytes(16)

WRITES: dict[str, Callable[[Place, float], Awaitable[object]]] = {
    "add": lambda place, now: place.tokens.issue(token(), 0, now),
    "remove": lambda place, now: place.tokens.revoke(token().digest, now),
    "remove_all": lambda place, now: place.tokens.revoke_all("nobody", now),
    "purge": lambda place, now: place.tokens.purge(now, 10),
    "note": lambda place, now: place.failures.update([CountUpdate(KEY, 1, at=now)], now),
    "acquire_duty": lambda place, now: place.store.acquire_duty("sweep", now, now + 30),
}


async def test_a_new_store_has_never_been_written(place: Place) -> None:
    assert place.started == 0


async def test_a_start_reports_the_time_only_by_its_answer(places: Places) -> None:
    """Otherwise the caller could not tell by how much its own clock was behind."""
    await (await places.open()).store.save_time(START + 500)
    again = await places.open()
    assert (again.started, again.clock_advances_at_start) == (START + 500, [])


@pytest.mark.parametrize("behind", [0.0, 0.5, 3600.0])
async def test_a_clock_that_is_behind_is_logged_at_the_start(places: Places, behind: float) -> None:
    """By how much, compared with the latest time that was written."""
    place = await places.open()
    await place.store.save_time(START + behind)
    service = create_service(Settings(database=DatabaseSettings(place.url)), lambda: START, lambda: 0.0)
    with structlog.testing.capture_logs() as logs:
        async with service.running():
            assert service.clock() == START + behind
    found = [entry["seconds"] for entry in logs if entry["event"] == "clock_behind"]
    assert found == ([behind] if behind > 1 else [])


@pytest.mark.parametrize("write", WRITES)
async def test_a_start_returns_the_latest_time_written(places: Places, write: str) -> None:
    place = await places.open()
    await WRITES[write](place, START + 7.25)
    assert (await places.open()).started == START + 7.25, "also while the first is still open, or was killed"
    await places.close(place)
    assert (await places.open()).started == START + 7.25


async def test_an_idle_process_learns_the_time_of_another(place: Place, other: Place) -> None:
    await other.store.save_time(START + 3600)
    async with asyncio.timeout(20):
        while START + 3600 not in place.clock_advances:  # noqa: ASYNC110 - that is what is shown
            await asyncio.sleep(0.01)


async def test_an_earlier_time_does_not_replace_the_latest(places: Places) -> None:
    place = await places.open()
    await place.tokens.issue(token(1), 0, START + 10)
    await place.tokens.issue(token(2), 0, START)
    await places.close(place, START + 5)
    assert (await places.open()).started == START + 10


async def test_stopping_remembers_the_time(places: Places) -> None:
    await places.close(await places.open(), START + 99)
    assert (await places.open()).started == START + 99


@pytest.mark.parametrize("purge", ["purge_failures", "purge_revocations"])
async def test_the_age_that_a_purge_asks_for_is_not_the_time(places: Places, purge: str) -> None:
    place = await places.open()
    await place.failures.update([CountUpdate(KEY, 1, at=START)], START)
    if purge == "purge_revocations":
        await place.store.purge_revocations(START + 1000, 10)
    else:
        await place.failures.purge(START + 1000, 10)
    assert (await places.open()).started == START


async def test_everything_is_still_there_after_a_restart(places: Places) -> None:
    place = await places.open()
    await place.tokens.issue(token(1), 0, START)
    await place.tokens.issue(token(2), 0, START)
    await place.tokens.revoke(token(2).digest, START)
    await place.failures.update([CountUpdate(KEY, 1, at=START)], START)
    await places.close(place, START)
    again = await places.open()
    assert await again.tokens.get(token(1).digest) == token(1)
    assert await again.tokens.get(token(2).digest) is None
    assert (await again.failures.get([KEY]))[KEY].count == 1


async def test_a_stop_finishes_pending_writes(places: Places) -> None:
    place = await places.open()
    writes = [asyncio.create_task(place.tokens.issue(token(number), 0, START)) for number in range(200)]
    await asyncio.sleep(0)
    await places.close(place, START)
    await asyncio.gather(*writes)
    again = await places.open()
    assert len(await again.tokens.list(None, START, 1000)) == 200


async def test_a_store_that_serves_is_ready(place: Place) -> None:
    assert await place.store.ready() is None


async def test_of_two_claims_of_a_duty_one_succeeds(place: Place, other: Place) -> None:
    for duty in ("sweep", "count"):
        attempts = [each.store.acquire_duty(duty, START, START + 30) for each in (place, other, place, other)]
        assert sorted(await asyncio.gather(*attempts)) == [False, False, False, True], duty


async def test_a_duty_is_free_again_at_its_until(place: Place, other: Place) -> None:
    assert await place.store.acquire_duty("sweep", START, START + 30)
    assert not await other.store.acquire_duty("sweep", START + 29.999, START + 59)
    assert await other.store.acquire_duty("sweep", START + 30, START + 60)
    assert not await place.store.acquire_duty("sweep", START + 30, START + 60)
    assert await place.store.acquire_duty("count", START, START + 30), "another duty is independent"


async def test_the_log_of_revocations_is_purged_by_age_and_limit(place: Place) -> None:
    for number in range(10):
        await place.tokens.issue(token(number), 0, START)
        await place.tokens.revoke(token(number).digest, START + number)
    assert await place.store.purge_revocations(START - 1, 100) == 0
    assert await place.store.purge_revocations(START + 5.5, 0) == 0
    assert await place.store.purge_revocations(START + 5.5, 4) == 4
    assert await place.store.purge_revocations(START + 5.5, 4) == 2
    assert await place.store.purge_revocations(START + 5.5, 4) == 0


async def test_a_log_entry_is_purged_only_before_the_instant(place: Place) -> None:
    for number in range(3):
        await place.tokens.issue(token(number), 0, START)
        await place.tokens.revoke(token(number).digest, START + number)
    assert await place.store.purge_revocations(START, 100) == 0
    assert await place.store.purge_revocations(START + 0.001, 100) == 1


async def test_concurrent_writes_share_commits_and_not_answers(place: Place) -> None:
    before = place.commits()
    await asyncio.gather(*(place.tokens.issue(token(number, f"user{number}"), 5, START) for number in range(500)))
    assert place.commits() - before <= 5
    removals = [place.tokens.revoke(token(number).digest, START) for number in range(400, 600)]
    clearances = [place.tokens.revoke_all(f"user{number}", START) for number in range(300, 420)]
    attempts = [place.store.acquire_duty(f"duty{number % 50}", START, START + 1) for number in range(100)]
    removed, cleared, claimed = await asyncio.gather(
        asyncio.gather(*removals), asyncio.gather(*clearances), asyncio.gather(*attempts)
    )
    assert place.commits() - before <= 10
    assert removed[20:] == [True] * 80 + [False] * 100
    assert cleared[:100] == [1] * 100
    assert [int(true) + count for true, count in zip(removed[:20], cleared[100:], strict=True)] == [1] * 20
    assert sum(claimed[:50]) == 50
    assert sum(claimed[50:]) == 0


async def test_no_change_is_answered_before_its_commit(place: Place, other: Place) -> None:
    """A client that was answered may use the result with another process at once."""

    async def add(number: int) -> bool:
        await place.tokens.issue(token(number), 0, START)
        return await other.tokens.find(token(number).id) == token(number)

    assert all(await asyncio.gather(*(add(number) for number in range(100))))


@pytest.mark.parametrize("bad", [token(99, "\ud800"), token(99, user_agent="\udfff"), token(0)], ids=ascii)
async def test_an_impossible_change_spoils_no_other(place: Place, bad: object) -> None:
    """A lone surrogate cannot be encoded, and a digest cannot be there twice."""
    assert isinstance(bad, type(token()))
    await place.tokens.issue(token(0), 0, START)
    adds = [place.tokens.issue(token(number), 0, START) for number in range(1, 20)]
    adds.insert(7, place.tokens.issue(bad, 0, START))
    answers = await asyncio.gather(*adds, place.tokens.revoke(token(0).digest, START), return_exceptions=True)
    refused = answers.pop(7)
    assert isinstance(refused, Exception) or bad == token(0), "the removal may come before it"
    assert answers == [()] * 19 + [True]
    assert len(await place.tokens.list(None, START, 100)) == 19 + (refused == ())


async def test_a_cancelled_caller_spoils_no_other_change(place: Place) -> None:
    adds = [asyncio.create_task(place.tokens.issue(token(number), 0, START)) for number in range(20)]
    await asyncio.sleep(0)
    adds[3].cancel()
    with suppress(asyncio.CancelledError):
        await adds[3]
    await asyncio.gather(*adds[:3], *adds[4:])
    assert len(await place.tokens.list(None, START, 100)) >= 19
