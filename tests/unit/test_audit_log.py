"""The audit log of a process: acts wait in memory while the file cannot be written, up to a limit, and in order."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.support.auditing import read_audit
from tests.support.journal import until
from tokenauth.audit import log as module
from tokenauth.audit import repeats
from tokenauth.audit.chain import LOCK_TIMEOUT
from tokenauth.audit.log import AuditLog, append_now, auditing, find_problem
from tokenauth.audit.records import ACTS, DROPPED, MAX_RECORD, encode, make_record
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
    until(lambda: audit.problem is None, "what was kept is written")
    observe(audit, 1, start=99)
    until(lambda: len(read_audit(file)) == kept + 2, "it goes on")
    assert targets(file) == [*(str(number) for number in range(kept)), DROPPED, "99"]
    assert read_audit(file)[kept]["details"]["count"] == 50 - kept


def test_each_retry_adds_to_the_same_counted_line(audit: AuditLog, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPACITY", 1000)
    attempts = 0
    append = audit._chain.append

    def count(records: Sequence[bytes]) -> None:
        nonlocal attempts
        attempts += 1
        observe(audit, 1)  # arrives while the others are being written
        append(records)

    monkeypatch.setattr(audit._chain, "append", count)
    observe(audit, 50)
    until(lambda: attempts >= 5, "it tries again and again")
    monkeypatch.setattr(audit._chain, "append", append)
    file.parent.mkdir()
    until(lambda: audit.problem is None, "it is written")
    assert targets(file).count(DROPPED) == 1
    assert read_audit(file)[-1]["details"]["count"] == audit.lost
    assert len(read_audit(file)) - 1 + audit.lost == 50 + attempts


def refuse(audit: AuditLog, count: int) -> None:
    for _ in range(count):
        audit.observe({"event": "login_refused", "user": "ann", "network": "192.0.2.0/24", "reason": "overloaded"})


def test_refusals_that_repeat_are_written_after_a_minute(
    audit: AuditLog, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "PERIOD", 0.5)
    file.parent.mkdir()
    refuse(audit, 3)
    until(lambda: len(read_audit(file)) == 2, "the first, and the others as one")
    assert [record.get("details") for record in read_audit(file)] == [None, {"count": 2}]
    until(lambda: audit._repeats.next_due() is None, "nothing is counted any more")
    refuse(audit, 1)
    until(lambda: len(read_audit(file)) == 3, "it is written at once")


def test_a_stop_writes_what_was_counted(audit: AuditLog, file: Path) -> None:
    file.parent.mkdir()
    refuse(audit, 100)
    audit.close()
    assert [record.get("details") for record in read_audit(file)] == [None, {"count": 99}]


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


def test_a_stop_counts_what_is_being_written(audit: AuditLog, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_TIMEOUT", 0.05)
    file.parent.mkdir()
    observe(audit, 1)
    until(lambda: len(read_audit(file)) == 1, "the first is written")
    with file.with_name("audit.jsonl.head").open("rb") as head:
        fcntl.flock(head, fcntl.LOCK_EX)  # as a process that was stopped in the middle
        observe(audit, 5)
        until(lambda: len(audit._taken) == 5, "the thread has taken them")
        with capture_logs() as logs:
            audit.close()
    assert audit.lost == 5
    assert [(line["event"], line["count"]) for line in logs] == [("audit_lines_lost", 5)]


def test_a_stop_waits_longer_than_for_the_lock() -> None:
    assert module.FLUSH_TIMEOUT > LOCK_TIMEOUT


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


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.head"])
def test_a_link_is_reported_before_it_is_met(tmp_path: Path, name: str) -> None:
    (tmp_path / "real").touch()
    (tmp_path / name).symlink_to(tmp_path / "real")
    settings = AuditSettings(file=str(tmp_path / "audit.jsonl"))
    with pytest.raises(OSError, match="symbolic links"):
        append_now(settings, {"event": "listening"})
    assert f"{tmp_path / name} is a link" in str(find_problem(settings))


def test_a_directory_of_another_user_is_reported(tmp_path: Path) -> None:
    settings = AuditSettings(file=str(tmp_path / "audit.jsonl"))
    assert find_problem(settings) is None
    tmp_path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        problem = find_problem(settings)
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
    expected = f"this user cannot look into {tmp_path}: Permission denied; run this as the user of the service"
    assert str(problem).startswith(expected)


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, problem in (("none", "does not exist"), ("file/in", "does not exist"), ("file", "is not a directory")):
        assert problem in str(find_problem(AuditSettings(file=f"{tmp_path}/{name}/audit.jsonl")))


def long_names(count: int, letter: str) -> list[str]:
    return [f"{number}{letter * 250}" for number in range(count)]


@pytest.mark.parametrize(("letter", "names"), [("\u4e00", 3), ("\U000e0001", 3), ("x", 10)])
def test_a_long_record_is_cut_and_says_so(letter: str, names: int) -> None:
    kinds = ("users_added", "users_removed", "passwords_changed", "scopes_changed", "pools_added", "pools_removed")
    changes = {kind: long_names(51, letter) for kind in kinds}
    line = encode(make_record({"event": "reloaded", "cause": "command", "users": 100, **changes}, None))
    record = json.loads(line)
    assert len(line) <= MAX_RECORD
    assert (record["action"], record["result"], record["cut"]) == ("reload", "ok", True)
    assert (record["details"]["cause"], record["details"]["users"]) == ("command", 100)
    assert len(record["details"]["users_added"]) == names + 1
    assert record["details"]["users_added"][0].startswith(f"0{letter}")
    assert record["details"]["users_added"][-1] == "and more"


def test_no_record_is_longer_than_the_limit() -> None:
    text = "\U000e0001" * 100_000
    fields = {f"field_{number}": text for number in range(20)}
    line = encode(make_record({"event": "member_reserved", "user": text, "by": text, "pool": text, **fields}, None))
    assert len(line) <= MAX_RECORD
    assert json.loads(line)["cut"] is True


def test_a_record_that_fits_is_not_cut() -> None:
    line = encode(make_record({"event": "reloaded", "users_added": long_names(51, "x")}, None))
    record = json.loads(line)
    assert record["details"]["users_added"] == long_names(51, "x")
    assert "cut" not in record
