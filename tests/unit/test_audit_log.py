"""The audit log of a process: acts wait in memory while the file cannot be written, up to a limit, and in order."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.auditing import read_audit
from tests.support.journal import until
from tokenauth.audit import log as module
from tokenauth.audit.log import AuditLog, auditing
from tokenauth.audit.records import ACTS, DROPPED, make_record
from tokenauth.settings.model import AuditSettings


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY", 0.01)
    monkeypatch.setattr(module, "_DELAY", 0.01)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "later" / "audit.jsonl"


@pytest.fixture
def audit(file: Path) -> Iterator[AuditLog]:
    """Return an audit log whose directory does not exist yet."""
    made = AuditLog(AuditSettings(file=str(file)))
    yield made
    made.close()


def observe(audit: AuditLog, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        audit.observe({"event": "token_issued", "user": "ann", "id": str(number)})


def targets(file: Path) -> list[str]:
    return [record.get("target", record["action"]) for record in read_audit(file)]


def test_what_waits_is_written_in_order(audit: AuditLog, file: Path) -> None:
    observe(audit, 100)
    until(lambda: audit.problem == "No such file or directory", "the problem is noticed")
    observe(audit, 100, start=100)
    file.parent.mkdir()
    until(lambda: len(read_audit(file)) == 200, "all are written")
    assert targets(file) == [str(number) for number in range(200)]
    until(lambda: audit.problem is None, "the problem is over")
    assert audit.lost == 0


def test_what_does_not_fit_in_is_one_counted_line(audit: AuditLog, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY", 1000)
    observe(audit, 50)
    until(lambda: audit.problem is not None, "the problem is noticed")
    kept = 50 - audit.lost
    assert 3 <= kept <= 10
    file.parent.mkdir()
    until(lambda: len(read_audit(file)) == kept + 1, "what was kept is written")
    observe(audit, 1, start=99)
    until(lambda: len(read_audit(file)) == kept + 2, "it goes on")
    assert targets(file) == [*(str(number) for number in range(kept)), DROPPED, "99"]
    assert read_audit(file)[kept]["details"]["count"] == 50 - kept


def test_other_events_are_not_written(audit: AuditLog, file: Path) -> None:
    file.parent.mkdir()
    audit.observe({"event": "swept", "rows": 3})
    observe(audit, 1)
    audit.close()
    assert targets(file) == ["0"]


def test_closing_writes_what_waits(audit: AuditLog, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DELAY", 3600)
    file.parent.mkdir()
    observe(audit, 10)
    audit.close()
    assert len(read_audit(file)) == 10


def test_an_event_that_cannot_be_written_is_counted(audit: AuditLog) -> None:
    audit.observe({"event": "login_refused", "user": "ann"})  # without its reason
    assert audit.lost == 1


def test_many_threads_lose_nothing(audit: AuditLog, file: Path) -> None:
    file.parent.mkdir()
    threads = [threading.Thread(target=observe, args=(audit, 200, start)) for start in (0, 200, 400, 600)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    assert sorted(targets(file), key=int) == [str(number) for number in range(800)]


def test_without_an_audit_log_nothing_is_observed() -> None:
    with auditing(None):
        pass


def test_odd_texts_stay_one_line(audit: AuditLog, file: Path) -> None:
    file.parent.mkdir()
    for text in ("two\nlines", '","hash":"x"}', "\x1b[2J", "a\udcffb", "\u2028", "x" * 100_000):
        audit.observe({"event": "user_added", "user": text})
    audit.close()
    lines = file.read_bytes().splitlines()
    assert len(lines) == 6
    assert all(line.isascii() and len(line) < 8000 for line in lines)
    assert json.loads(lines[0])["user"] == "two\nlines"
    assert audit._chain.verify().problem is None


@pytest.mark.parametrize("event", ACTS)
def test_each_act_has_an_action_and_a_result(event: str) -> None:
    record = make_record({"event": event, "user": "ann", "reason": "because"}, None)
    assert record["action"]
    assert record["result"]
