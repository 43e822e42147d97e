"""What is counted, and the sums over workers."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.conftest import token
from tests.support.journal import until
from tests.support.servers import ROOT, START, HandClock
from tests.support.services import running
from tokenauth import gauges
from tokenauth.audit.log import CAPACITY, AuditLog
from tokenauth.errors import Forbidden, InvalidRequest, InvalidToken, NoFreeToken, StoreUnavailable, TokenRequired
from tokenauth.gauges import Gauges
from tokenauth.metrics import BUCKETS, Durations, Snapshot, ValidationCounts, add_duration
from tokenauth.models import ANY_LEASE, Grant, Identity, LeaseTerms
from tokenauth.server import totals
from tokenauth.server.channel import Report, decode_report, encode_report
from tokenauth.server.totals import Totals
from tokenauth.service import Service
from tokenauth.settings.model import AuditSettings

POOLS = "[pools.phones]\ncapacity = 3\nprefill = true\n[pools.endless]\n"


@pytest.fixture
async def service(tmp_path: Path, hand_clock: HandClock) -> AsyncIterator[Service]:
    async with running(tmp_path, POOLS, hand_clock) as service:
        yield service


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (0.001, 0), (0.0011, 1), (0.3, 8), (5.0, 11), (5.1, 12)])
def test_a_duration_is_counted_in_its_bucket(seconds: float, bucket: int) -> None:
    found = Durations().find("/auth", "GET")
    add_duration(found, seconds)
    add_duration(found, 1.0)
    *counts, total = found
    assert len(counts) == len(BUCKETS) + 1
    assert counts[bucket] == 1
    assert sum(counts) == 2
    assert total == pytest.approx(seconds + 1)


def test_made_up_methods_share_one_label() -> None:
    durations = Durations()
    for method in ("GET", "SECRET", "X" * 100):
        add_duration(durations.find("/auth", method), 0.1)
    assert set(durations.by_route["/auth"]) == {"GET", "(other)"}
    assert sum(durations.find("/auth", "PURGE")[:-1]) == 2


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (InvalidToken(), "invalid"),
        (Forbidden("no"), "denied"),
        (StoreUnavailable(), "unavailable"),
        (OSError(), "unavailable"),
        (TokenRequired(), None),
        (InvalidRequest("two tokens"), None),
    ],
)
def test_a_refused_validation_is_counted_by_its_reason(error: Exception, result: str | None) -> None:
    counts = ValidationCounts()
    counts.refuse(error)
    assert {name for name, number in counts.by_result().items() if number} == ({result} if result else set())


def test_counts_of_ended_workers_stay_in_the_sums() -> None:
    sums = Totals(2)
    sums.update(1, Snapshot({("logins_total", "ok"): [3], ("request_seconds", "GET", "/"): [1, 0, 0.5]}, {}))
    sums.update(2, Snapshot({("logins_total", "ok"): [4]}, {}))
    sums.update(2, Snapshot({("logins_total", "ok"): [6], ("request_seconds", "GET", "/"): [0, 1, 0.25]}, {}))
    for _ in range(2):
        counts, _ = sums.read()
        assert counts["logins_total", "ok"] == [9]
        assert counts["request_seconds", "GET", "/"] == [1, 1, 0.75]
        sums.end(1)
    assert sums.read()[1]["workers",] == 1


def test_only_what_was_guessed_is_a_failed_login() -> None:
    """The history leaves out logins that the service could not check, such as with a full disk."""
    sums, numbers = Totals(1), {"ok": 1, "invalid_credentials": 2, "too_many_attempts": 4, "store_unavailable": 8}
    more = {"overloaded": 16, "client_gone": 32}
    sums.update(1, Snapshot({("logins_total", result): [number] for result, number in (numbers | more).items()}, {}))
    history = sums.status([]).history
    assert [sum(each or 0 for each in values) for values in (history.logins, history.failures)] == [1, 6]


def test_each_gauge_is_merged_in_its_way() -> None:
    sums = Totals(2)
    for pid, queued, up in ((1, 3, 1), (2, 4, 0)):
        sums.update(pid, Snapshot({}, {("password_queue",): queued, ("store_up",): up, ("feed_age_seconds",): pid}))
    gauges = sums.read()[1]
    assert [gauges[name,] for name in ("password_queue", "store_up", "feed_age_seconds")] == [7, 0, 2]


def test_acts_that_the_main_process_holds_are_shown(tmp_path: Path) -> None:
    """They are of workers that have ended: no worker knows of them."""
    audit = AuditLog(AuditSettings(file=str(tmp_path / "none" / "audit.jsonl")))
    sums = Totals(1, audit)
    sums.update(1, Snapshot({("audit_lost_total",): [2]}, {("audit_up",): 1}))
    counts, gauges = sums.read()
    assert (counts["audit_lost_total",], gauges["audit_up",]) == ([2], 1)
    audit.take([b"{}", bytes(CAPACITY)])
    until(lambda: audit.problem is not None, "it has tried to write")
    for _ in range(2):
        counts, gauges = sums.read()
        assert (counts["audit_lost_total",], gauges["audit_up",]) == ([3], 0)
    audit.close()


def test_a_silent_worker_has_counts_and_no_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "STALE", -1.0)
    sums = Totals(1)
    sums.update(1, Snapshot({("logins_total", "ok"): [3]}, {("password_queue",): 1}))
    counts, gauges = sums.read()
    assert counts["logins_total", "ok"] == [3]
    assert ("password_queue",) not in gauges
    assert gauges["workers",] == 0


async def test_a_snapshot_passes_the_channel(service: Service) -> None:
    reader = Gauges(service, counts_store=True)
    await reader.read()
    add_duration(service.metrics.durations.find("/auth", "GET"), 0.1)
    snapshot = reader.snapshot()
    assert decode_report(encode_report(Report("alive", metrics=snapshot))).metrics == snapshot


@pytest.mark.parametrize("step", [1, 3, 50_000])
async def test_live_tokens_are_counted_in_steps(service: Service, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(gauges, "_STEP", step)
    monkeypatch.setattr(gauges, "_PAUSE", 0.0)
    lifetimes = [-5, 0, 1, 2, 3, 4, 3599, 3600, 3601, 86400, 10_000_000]
    for number, lifetime in enumerate(lifetimes):
        await service.store.tokens.issue(token(number, life=lifetime), 0, START)
    reader = Gauges(service, counts_store=True)
    await reader.read()
    assert reader.snapshot().gauges["live_tokens",] == sum(lifetime > 0 for lifetime in lifetimes)


async def test_one_worker_counts_what_all_share(service: Service) -> None:
    await service.pools.assign(service.pools.find("phones"), "worker-1")
    await service.pools.generate(service.pools.find("endless"), 2)
    one, other = Gauges(service, counts_store=True), Gauges(service, counts_store=False)
    for each in (one, other):
        await each.read()
    found = one.snapshot().gauges
    assert {key: value for key, value in found.items() if key[0].startswith("pool_")} == {
        ("pool_capacity", "phones"): 3,
        ("pool_leased", "phones"): 1,
        ("pool_capacity", "endless"): 2,
        ("pool_leased", "endless"): 0,
        ("pool_waiting", "phones"): 0,
        ("pool_waiting", "endless"): 0,
    }
    assert not {key for key in other.snapshot().gauges if key[0] in {"live_tokens", "pool_leased"}}
    assert other.snapshot().gauges["store_up",] == 1


async def test_leases_are_counted_by_how_they_end(service: Service, hand_clock: HandClock) -> None:
    pools, phones = service.pools, service.pools.find("phones")
    kept, taken, _ = [await pools.assign(phones, "worker-1", "ann") for _ in range(3)]
    with pytest.raises(NoFreeToken):
        await pools.assign(phones, "worker-2", "ann")
    hand_clock.advance(10)
    await pools.release(phones, kept.value)
    await pools.force_release(phones, taken.value, ANY_LEASE, "admin", None)
    hand_clock.advance(60)  # the third one lapses
    for _ in range(3):
        await pools.assign(phones, "worker-3", "ann")
    counts = Gauges(service, counts_store=False).snapshot().counts
    assert {key[0]: numbers for key, numbers in counts.items() if key[1:] == ("phones",)} == {
        "pool_granted_total": [6],
        "pool_denied_total": [1],
        "pool_lapsed_total": [1],
        "pool_forced_total": [1],
        "pool_wait_seconds": [0, 0],
        "pool_hold_seconds": [2, 10 + phones.lease_ttl],
    }


async def test_waits_in_line_are_counted(service: Service, hand_clock: HandClock) -> None:
    pools, endless = service.pools, service.pools.find("endless")
    (value,) = await pools.generate(endless, 1)
    await pools.assign(endless, "worker-1", "ann")
    waiting = asyncio.create_task(pools.lease(endless, Identity("ann"), LeaseTerms("worker-2", wait=30)))
    while await pools.count_waiting(endless) == 0:  # noqa: ASYNC110  (the line is in the database, which has no event)
        await asyncio.sleep(0)
    reader = Gauges(service, counts_store=True)
    await reader.read()
    assert reader.snapshot().gauges["pool_waiting", "endless"] == 1
    hand_clock.advance(5)
    await pools.release(endless, value)
    assert isinstance(await waiting, Grant)
    assert reader.snapshot().counts["pool_wait_seconds", "endless"] == [1, 5]


async def test_a_lost_database_is_a_store_that_is_down(service: Service, tmp_path: Path) -> None:
    reader = Gauges(service, counts_store=True)
    await reader.read()
    assert reader.snapshot().gauges["store_up",] == 1
    (tmp_path / "tokenauth.db").unlink()
    await reader.read()
    assert reader.snapshot().gauges["store_up",] == 0


def test_the_library_is_loaded_only_for_metrics() -> None:
    program = "import tokenauth.server.serve, tokenauth.server.worker, tokenauth.web.app, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "starlette" in loaded
    assert "prometheus_client" not in loaded
