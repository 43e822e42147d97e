"""`tokenauth audit`, and the acts of commands in the audit log."""

import gzip
import json
import os
import pwd
import re
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.auditing import read_audit, wait_for
from tests.support.journal import fill, until
from tests.support.processes import Forked
from tests.support.servers import TOKENAUTH, log_in, serve, worker, write_config
from tests.system.test_cli import environment, mistake, output, recorded, run, script
from tests.system.test_terminal import on_terminal
from tokenauth.audit.chain import CUT, Chain
from tokenauth.audit.records import ACTS, DROPPED, LOGOUT

OPERATOR = os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name

INTERRUPTED = """
import signal
from tokenauth.cli.main import main
from tokenauth.stores.sqlite.writer import SqliteWriter

apply = SqliteWriter.apply

def interrupted(self, change):
    SqliteWriter.apply = apply
    answer = apply(self, change)
    signal.raise_signal(signal.SIGINT)
    return answer

SqliteWriter.apply = interrupted
main(prog_name="tokenauth")
"""
"""`tokenauth` that gets Ctrl-C while its change is written."""

VANISHING = """
import os
from tokenauth.cli.main import main

stat, late = os.stat, {}

def vanishing(path, **options):
    os.stat = stat
    if not late:
        os.unlink("audit.jsonl.1")
    found = stat(path, **options)
    if late:
        os.unlink("audit.jsonl.1")
    return found

def until_it_is_looked_at(path, **options):
    return (vanishing if str(path).endswith("audit.jsonl.1") else stat)(path, **options)

os.stat = until_it_is_looked_at
main(prog_name="tokenauth")
"""
"""`tokenauth` for which an older file of the audit log is deleted just before or after it is looked at first."""

POOLS = """
[pools.licences]
[pools.devices]
[[pools.devices.members]]
name = "pixel"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a directory with a configuration that has an audit log, and a database."""
    write_config(tmp_path, f'[audit]\nfile = "{tmp_path}/audit.jsonl"\n{POOLS}')
    assert run(tmp_path, "migrate").returncode == 0
    return tmp_path


def acts(home: Path) -> list[dict[str, Any]]:
    """Return what was audited, without what differs each time."""
    shown = {"action", "result", "user", "target", "details"}
    records = read_audit(home / "audit.jsonl")
    for record in records:
        assert (record["by"], record["via"]) == (OPERATOR, "command")
        assert record["pid"] > 1
    return [{key: record[key] for key in record if key in shown} for record in records]


def test_each_command_that_changes_something_is_an_act(home: Path) -> None:
    changes = [
        ("user", "add", "eve", "--scope", "read", "--password-stdin"),
        ("user", "passwd", "eve", "--password-stdin"),
        ("user", "set-scopes", "eve", "--scope", "write"),
        ("user", "remove", "eve"),
        ("tokens", "issue", "--user", "ann", "--name", "ci"),
        ("pool", "generate", "licences", "--count", "2"),
        ("pool", "reserve", "devices", "pixel", "--until", "1h", "--note", "repair"),
        ("pool", "unreserve", "devices", "pixel"),
    ]
    with worker(home / "config.toml"):  # adds the member
        pass
    printed = [output(run(home, *change, stdin="a long password\n")) for change in changes]
    token = json.loads(output(run(home, "tokens", "list", "--json")))["tokens"][0]["id"]
    new = output(run(home, "tokens", "rotate", token))
    output(run(home, "tokens", "revoke", "--user", "ann"))
    licence = printed[5].split()[0]
    output(run(home, "pool", "delete", "licences", licence))
    found = acts(home)
    assert [(act["action"], act.get("user"), act.get("target")) for act in found] == [
        ("upgrade_schema", None, None),
        ("add_user", "eve", None),
        ("change_password", "eve", None),
        ("change_scopes", "eve", None),
        ("remove_user", "eve", None),
        ("issue_token", "ann", token),
        ("generate_pool_tokens", None, "licences"),
        ("reserve_member", None, "devices/pixel"),
        ("unreserve_member", None, "devices/pixel"),
        ("rotate_token", "ann", token),
        ("revoke_tokens", "ann", "all"),
        ("delete_pool_token", None, "licences"),
    ]
    assert {act["result"] for act in found} == {"ok"}
    assert found[3]["details"] == {"scopes": ["write"], "scopes_before": ["read"]}
    assert found[4]["details"] == {"scopes_before": ["write"]}
    text = (home / "audit.jsonl").read_text()
    assert [
        secret for secret in (*printed[4].split(), *printed[5].split(), *new.split(), "long") if secret in text
    ] == []
    assert output(run(home, "audit", "verify")).startswith("ok: 12 lines, from 1 to 12\nThe last hash is ")


@pytest.mark.parametrize("by", ["id", "scan"])
def test_a_revoked_token_is_of_a_user(home: Path, by: str) -> None:
    token = output(run(home, "tokens", "issue", "--user", "ann", "--name", "ci")).strip()
    id_ = json.loads(output(run(home, "tokens", "list", "--json")))["tokens"][0]["id"]
    if by == "id":
        output(run(home, "tokens", "revoke", "--id", id_))
    else:
        assert run(home, "tokens", "scan", "--revoke", stdin=token).returncode == 3
    assert acts(home)[-1] == {"action": "revoke_token", "result": "ok", "user": "ann", "target": id_}


@pytest.mark.parametrize("who", [("--user", "user0"), ("--all",)], ids=["a_removed_user", "all"])
def test_a_revocation_that_failed_halfway_is_recorded(home: Path, who: tuple[str, ...]) -> None:
    database = home / "tokenauth.db"
    fill(database, 10_001, 1, time.time(), lambda _: int(time.time()) + 3600)  # one more than a step deletes
    with closing(sqlite3.connect(database)) as db, db:
        last = "NOT EXISTS (SELECT 1 FROM tokens LIMIT 1 OFFSET 1)"
        db.execute(f"CREATE TRIGGER fault BEFORE DELETE ON tokens WHEN {last} BEGIN SELECT RAISE(ABORT, 'no'); END")
    done = run(home, "tokens", "revoke", "--yes", *who)
    assert done.returncode != 0
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    user, revoked = who[-1].replace("--all", "(all)"), {"count": 10_000}
    logged = {"event": "revocation_interrupted", "user": user, "kind": "all", **revoked, "by": OPERATOR}
    assert [line for line in lines if "revo" in line["event"]] == [{**lines[-1], **logged}]
    interrupted = {"action": "revoke_tokens", "result": "interrupted", "user": user, "target": "all"}
    assert acts(home)[1:] == [{**interrupted, "details": revoked}]
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("DROP TRIGGER fault")
    assert output(run(home, "tokens", "revoke", "--yes", *who)) == "Revoked 1 token.\n"
    assert acts(home)[2:] == [{**interrupted, "result": "ok", "details": {"count": 1}}]


def test_a_change_that_is_interrupted_is_an_act(home: Path) -> None:
    """Ctrl-C comes too late for the change, and so for its record."""
    with worker(home / "config.toml"):  # adds the member
        pass

    def interrupt(*command: str, stdin: str = "") -> int:
        done = script(home, "-c", INTERRUPTED, *command, stdin=stdin, program=sys.executable)
        recorded(done)
        return done.returncode

    one = output(run(home, "tokens", "issue", "--user", "ann", "--name", "one")).strip()
    [token] = output(run(home, "pool", "generate", "licences")).split()
    assert interrupt("tokens", "issue", "--user", "ann", "--name", "two") == 0
    assert interrupt("tokens", "scan", "--revoke", stdin=one) == 130
    [two] = [row["id"] for row in json.loads(output(run(home, "tokens", "list", "--json")))["tokens"]]
    assert interrupt("tokens", "rotate", two) == 0
    assert interrupt("tokens", "revoke", "--user", "ann", "--leases") == 130
    assert interrupt("pool", "generate", "licences") == 0
    assert interrupt("pool", "reserve", "devices", "pixel", "--until", "1h") == 0
    assert interrupt("pool", "unreserve", "devices", "pixel") == 0
    assert interrupt("pool", "delete", "licences", token) == 0
    assert [(act["action"], act["result"]) for act in acts(home)[3:]] == [
        ("issue_token", "ok"),
        ("revoke_token", "ok"),
        ("rotate_token", "ok"),
        ("revoke_tokens", "interrupted"),
        ("generate_pool_tokens", "ok"),
        ("reserve_member", "ok"),
        ("unreserve_member", "ok"),
        ("delete_pool_token", "ok"),
    ]


def test_what_commands_only_read_is_no_act(home: Path) -> None:
    for command in (("user", "list"), ("tokens", "list"), ("pool", "list"), ("check",), ("doctor",), ("migrate",)):
        assert run(home, *command).returncode == 0
    assert [act["action"] for act in acts(home)] == ["upgrade_schema"]


def test_init_says_which_directory_is_missing(tmp_path: Path) -> None:
    place = tmp_path / "none"
    done = run(tmp_path, "init", "--yes", "--set", f"audit.file={place}/audit.jsonl")
    assert done.returncode == 0
    assert f"No such file or directory: the directory {place} does not exist; create it" in done.stderr


def test_a_command_works_without_the_audit_log(home: Path) -> None:
    (home / "audit.jsonl").unlink()
    (home / "audit.jsonl").mkdir()
    done = run(home, "user", "remove", "ann")
    assert done.returncode == 0
    assert "Warning: this is missing in the audit log, which cannot be written: Is a directory" in done.stderr
    assert "ann" not in output(run(home, "user", "list"))
    checked = run(home, "check")
    assert checked.returncode == 0
    assert f"warning: audit log: {home}/audit.jsonl is not a regular file; move it away, or change" in checked.stdout
    assert "warning  audit log:" in run(home, "doctor").stdout


NEXT = 'What to do: docs/production.md, "The audit log has a break"\n'
REKEYED = "If audit.key was changed, each line that was written with another one is a break.\n"
UNBOUND = (
    "Not shown: whether lines before the last break were written again, since there is no audit.key."
    " Only lines after it are bound to the .head file.\n"
)


def test_verify_says_where_a_line_is_missing(home: Path) -> None:
    for name in ("ann", "bob"):
        output(run(home, "user", "remove", name))
    file = home / "audit.jsonl"
    first, _, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + last)
    problem = "line 2 is missing here, or moved: this is line 3"
    done = run(home, "audit", "verify")
    assert (done.returncode, done.stdout) == (1, f"{file}, line 2: {problem}\n1 break; 2 lines ok\n{UNBOUND}{NEXT}")
    done = run(home, "audit", "verify", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["breaks"]) == (1, False, 1)
    assert report["problems"] == [{"problem": problem, "file": str(file), "line": 2}]


def _flipped(content: bytes) -> bytes:
    return b"".join([content[:60], bytes([content[60] ^ 0x10]), content[61:]])


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "the first line": lambda path: path.write_bytes(b"x\n" + path.read_bytes().partition(b"\n")[2]),
    "the first two lines": lambda path: path.write_bytes(b"x\nx\n" + path.read_bytes()[-300:].partition(b"\n")[2]),
    "all lines": lambda path: path.write_bytes(b"x\n" * 3),
    "cut to a half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut to a few bytes": lambda path: os.truncate(path, 15),
    "a flipped bit": lambda path: path.write_bytes(_flipped(path.read_bytes())),
    "bytes at its end": lambda path: path.write_bytes(path.read_bytes() + b"xyz"),
    "emptied": lambda path: path.write_bytes(b""),
    "a directory": lambda path: _replace(path, Path.mkdir),
    "a pipe": lambda path: _replace(path, os.mkfifo),
    "a link to nowhere": lambda path: _replace(path, lambda link: link.symlink_to("none")),
}


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an audit log of four files, of which the oldest begins with line 4, as one that was rotated before."""
    chain = Chain(tmp_path_factory.mktemp("rotated") / "audit.jsonl")
    for number in (4, 3, 2, 1, 0):
        for _ in range(3):
            chain.append([b'{"time":"2026-11-28T06:00:00.000Z","action":"test"}'])
        if number:
            chain.path.rename(chain.path.with_name(f"audit.jsonl.{number}"))
    chain.path.with_name("audit.jsonl.4").unlink()
    return chain.path


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_break(rotated: Path, tmp_path: Path, damage: str, packed: bool) -> None:
    """Whichever it is, and whatever of it can still be read: `verify` names it. Nothing else is one."""
    for name in ("audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.3"):
        home = tmp_path / name
        shutil.copytree(rotated.parent, home)
        chain, path = Chain(home / "audit.jsonl"), home / name
        if packed and path != chain.path:
            path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
            path = path.with_name(f"{name}.gz")
        assert (chain.verify().problem, chain.verify().lines) == (None, 12)
        DAMAGES[damage](path)
        if path == chain.path and damage in {"emptied", "a link to nowhere"}:
            assert chain.verify().problem == "the last 3 lines are missing: audit.jsonl.head knows line 15"
        else:
            assert path in {each.position.file for each in chain.verify().problems if each.position}
    write_config(home, f'[audit]\nfile = "{home}/audit.jsonl"\n')
    done = run(home, "audit", "verify")
    assert (done.returncode, done.stderr, f"{path}" in done.stdout) == (1, "", True)
    assert done.stdout.endswith(NEXT)


@pytest.mark.parametrize("damage", DAMAGES)
def test_tail_shows_what_it_can_read_of_a_damaged_file(rotated: Path, tmp_path: Path, damage: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(rotated.parent, home)
    write_config(home, f'[audit]\nfile = "{home}/audit.jsonl"\n')
    path = home / "audit.jsonl.2.gz"
    path.write_bytes(gzip.compress((home / "audit.jsonl.2").read_bytes()))
    (home / "audit.jsonl.2").unlink()
    DAMAGES[damage](path)
    done = run(home, "audit", "tail", "--json")
    shown = [json.loads(line)["n"] for line in done.stdout.splitlines()]
    assert [number for number in shown if number not in range(7, 10)] == [4, 5, 6, *range(10, 16)]
    if damage != "emptied":
        assert (done.returncode, done.stderr.startswith(f"Warning: acts may be missing here. {path}: ")) == (1, True)


def test_tail_reads_a_file_whose_first_lines_are_not_its_own(rotated: Path, tmp_path: Path) -> None:
    shutil.copytree(rotated.parent, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path, f'[audit]\nfile = "{tmp_path}/audit.jsonl"\n')
    DAMAGES["the first two lines"](tmp_path / "audit.jsonl.3")
    shown = [json.loads(line)["n"] for line in output(run(tmp_path, "audit", "tail", "--json")).splitlines()]
    assert shown == [*range(6, 16)]


def test_an_empty_file_is_no_break_if_no_line_can_be_missing(home: Path) -> None:
    """Such as one that another program has made while the disk was full."""
    (home / "audit.jsonl.1").touch()
    output(run(home, "user", "remove", "ann"))
    assert output(run(home, "audit", "verify")).startswith("ok: 2 lines, from 1 to 2\n")


LARGE = 1 << 40
"""Bytes of a file that nothing can read to its end, or keep in memory. Only its start is on the disk."""

LITTLE = 'ulimit -v 500000; exec "$0" "$@"'
"""Run a command that cannot have 512 MiB of memory."""


def _make_large(path: Path, start: bytes) -> None:
    path.write_bytes(start)
    os.truncate(path, LARGE)


OTHERS: dict[str, Callable[[Path], object]] = {
    "audit.jsonl.csv": lambda path: _make_large(path, b"time,user,action\n" * 20_000),
    "audit.jsonl.long": lambda path: _make_large(path, b""),
    "audit.jsonl.short": lambda path: path.write_bytes(b"time,user,action\n"),
    "audit.jsonl.zip.gz": lambda path: path.write_bytes(gzip.compress(bytes(1 << 20)) * 3_000),
}
"""Files beside the log that are none of it."""


def test_another_file_beside_the_log_is_one_break(home: Path) -> None:
    others = [home / name for name in OTHERS]
    for path in others:
        OTHERS[path.name](path)
    done = script(home, "-c", LITTLE, TOKENAUTH, "audit", "verify", "--json", program="sh")
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr, report["breaks"], report["lines"]) == (1, "", len(others), 1)
    assert sorted(each["file"] for each in report["problems"]) == [str(path) for path in others]
    assert {"no line of an audit log is at its start" in each["problem"] for each in report["problems"]} == {True}
    done = script(home, "-c", LITTLE, TOKENAUTH, "audit", "tail", "--json", program="sh")
    assert (done.returncode, done.stdout) == (1, (home / "audit.jsonl").read_text())
    assert [line.startswith("Warning: acts may be missing here.") for line in done.stderr.splitlines()] == [True] * 4


def test_a_line_that_is_longer_than_the_memory_is_marked(home: Path) -> None:
    """Such as a hole that a crash has left."""
    file = home / "audit.jsonl"
    os.truncate(file, file.stat().st_size + (512 << 20))
    done = script(home, "-c", LITTLE, TOKENAUTH, "user", "remove", "ann", program="sh")
    assert [event["event"] for event in recorded(done)] == ["user_removed"]
    done = script(home, "-c", LITTLE, TOKENAUTH, "audit", "verify", program="sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok: 3 lines, from 1 to 3; a crash has cut 1 more line, which is marked\n")
    done = script(home, "-c", LITTLE, TOKENAUTH, "audit", "tail", "--json", program="sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["action"] for line in done.stdout.splitlines()] == ["upgrade_schema", CUT, "remove_user"]


def _opened_by(pid: int) -> set[str]:
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            found.add(os.readlink(each))
    return found


def test_acts_are_written_while_verify_reads(home: Path) -> None:
    """However long that takes, and whatever is beside the log."""
    file, old = home / "audit.jsonl", home / "audit.jsonl.1"
    _make_large(old, file.read_bytes())
    OTHERS["audit.jsonl.csv"](home / "audit.jsonl.csv")
    with serve(home / "config.toml") as server, server.client() as client:
        log_in(client)
        wait_for(file, action="login")
        streams = [Path(os.devnull), home / "out", home / "out"]
        verify = Forked("tests.support.serving", ["tokenauth", "audit", "verify"], home, streams, environment({}))
        try:
            resource.prlimit(verify.pid, resource.RLIMIT_AS, (512 << 20, 512 << 20))
            until(lambda: str(old) in _opened_by(verify.pid), "it has opened the files")
            log_in(client)
            wait_for(file, 2, action="login")
            assert verify.poll() is None
        finally:
            verify.send_signal(signal.SIGKILL)
            verify.wait()


@pytest.mark.parametrize("name", ["audit.jsonl.head", "audit.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_is_named(home: Path, name: str, make: Callable[[Path], None]) -> None:
    """Nothing waits for a pipe, either."""
    path = home / name
    _replace(path, make)
    problem = "it is no file; remove it, or give it a name that does not begin with that of the log"
    done = run(home, "audit", "verify")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"{path}: this cannot be read: {problem}\n")
    done = run(home, "user", "remove", "ann")
    assert (done.returncode, "Warning: this is missing in the audit log, which cannot be" in done.stderr) == (0, True)
    if name == "audit.jsonl":
        assert problem in mistake(run(home, "audit", "tail"))


def test_verify_says_what_it_cannot_find(home: Path) -> None:
    """As when somebody deletes the log and its head: it begins again with line 1, and is right."""
    shown = output(run(home, "audit", "verify"))
    assert "; the last line is the one that the .head file knows.\n" in shown
    (home / "audit.jsonl.head").unlink()
    assert "would not show, since there is no valid .head file.\n" in output(run(home, "audit", "verify"))
    (home / "audit.jsonl").unlink()
    output(run(home, "user", "remove", "ann"))
    shown = output(run(home, "audit", "verify"))
    assert shown.startswith("ok: 1 line, from 1 to 1\n")
    assert "\nNot shown: whether an older log existed and was deleted, with its .head file, or all" in shown
    (home / "audit.jsonl").unlink()
    output(run(home, "user", "remove", "bob"))
    said = output(run(home, "audit", "verify"))
    assert "\nLines 1 to 1 are not here. If you did not move their file away, they were deleted.\n" in said


def test_verify_says_which_lines_the_head_does_not_know(home: Path) -> None:
    """As after a crash between a line and its head."""
    head = home / "audit.jsonl.head"
    before = head.read_bytes()
    output(run(home, "user", "remove", "ann"))
    head.write_bytes(before)
    shown = output(run(home, "audit", "verify"))
    assert (
        "; line 1 is the one that the .head file knows; after it, 1 line left by a crash, or written by anyone.\n"
        in shown
    )
    with (home / "audit.jsonl").open("ab") as file:
        file.write(b"x\n")
    shown = run(home, "audit", "verify").stdout
    assert shown.endswith(f" Only lines after it, up to line 1, are bound to the .head file.\n{REKEYED}{NEXT}")
    head.unlink()
    shown = run(home, "audit", "verify").stdout
    assert shown.endswith(f"written again, since there is no audit.key, and no .head file was read.\n{REKEYED}{NEXT}")


def test_verify_writes_large_numbers_in_one_form(home: Path) -> None:
    Chain(home / "audit.jsonl").append([b'{"action":"test"}'] * 1_203)
    assert output(run(home, "audit", "verify")).startswith("ok: 1,204 lines, from 1 to 1,204\n")


def test_old_files_moved_to_another_directory_are_not_checked(home: Path) -> None:
    """What the documents say to do after a break."""
    file, elsewhere = home / "audit.jsonl", home / "old"
    elsewhere.mkdir()
    file.write_bytes(b"x\n" + file.read_bytes())
    assert run(home, "audit", "verify").returncode == 1
    renamed = file.rename(home / "audit.jsonl.broken")
    output(run(home, "user", "remove", "bob"))
    assert run(home, "audit", "verify").returncode == 1
    renamed.rename(elsewhere / "audit.jsonl")
    file.unlink()
    assert "missing" in run(home, "audit", "verify").stdout
    output(run(home, "user", "remove", "ann"))
    assert output(run(home, "audit", "verify")).startswith("ok: 1 line, from 3 to 3\n")


def test_verify_checks_copies_elsewhere(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("copy") / "audit.jsonl"
    copy.write_bytes((home / "audit.jsonl").read_bytes())
    found = output(run(copy.parent, "audit", "verify", str(copy)))
    assert found.startswith("ok: 1 line, from 1 to 1\n")
    assert "lines missing at the end would not show, since named files are checked without the .head file" in found
    copy.write_bytes(copy.read_bytes().replace(b"upgrade", b"updated"))
    assert run(copy.parent, "audit", "verify", str(copy)).returncode == 1
    missing = run(copy.parent, "audit", "verify", str(copy.with_name("none")))
    assert "No such file" in mistake(missing)


def test_a_key_is_needed_to_verify(tmp_path: Path) -> None:
    table = f'[audit]\nfile = "{tmp_path}/audit.jsonl"\nkey = "${{AUDIT_KEY}}"\n'
    write_config(tmp_path, table)
    assert run(tmp_path, "migrate", AUDIT_KEY="k" * 32).returncode == 0
    assert run(tmp_path, "audit", "verify", AUDIT_KEY="k" * 32).returncode == 0
    wrong = run(tmp_path, "audit", "verify", AUDIT_KEY="j" * 32)
    assert (wrong.returncode, "Not shown" in wrong.stdout) == (1, False)
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b"x\n")
    changed = run(tmp_path, "audit", "verify", AUDIT_KEY="k" * 32)
    assert (changed.returncode, changed.stdout.partition("\n")[2]) == (1, f"1 break; 1 line ok\n{REKEYED}{NEXT}")


def test_without_an_audit_log_the_commands_say_so(tmp_path: Path) -> None:
    write_config(tmp_path)
    for command in ("verify", "tail"):
        assert "audit.file: is not set" in mistake(run(tmp_path, "audit", command))
    write_config(tmp_path, f'[audit]\nfile = "{tmp_path}/audit.jsonl"\n')
    assert output(run(tmp_path, "audit", "verify")) == "No lines.\n"
    assert output(run(tmp_path, "audit", "tail")) == "No acts.\n"


@contextmanager
def following(home: Path, *options: str, printed: str = "printed") -> Iterator[Path]:
    """Run `audit tail --follow`, and yield the file with its output."""
    path = home / printed
    path.touch()
    command = ["tokenauth", "audit", "tail", "--follow", *options]
    process = Forked("tests.support.serving", command, home, [Path(os.devnull), path, path], environment({}))
    try:
        yield path
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("late", [False, True])
def test_a_file_that_is_deleted_while_tail_reads_is_named(home: Path, late: bool) -> None:
    older = home / "audit.jsonl.1"
    shutil.copy(home / "audit.jsonl", older)
    command = ["-c", VANISHING.format(late), "audit", "tail", "--since", "1h"]
    done = script(home, *command, program=sys.executable)
    assert done.returncode == 1
    missing = f"{older}: this cannot be read: No such file or directory"
    assert done.stderr == f"Warning: acts may be missing here. {missing}\n"
    assert "upgrade_schema ok" in done.stdout


def test_tail_selects_by_user_action_and_time(home: Path) -> None:
    for name in ("bob", "ann", "admin"):
        output(run(home, "user", "remove", name))
    lines = (home / "audit.jsonl").read_text().splitlines()
    assert output(run(home, "audit", "tail", "--json")).splitlines() == lines
    assert output(run(home, "audit", "tail", "--json", "-n", "2")).splitlines() == lines[-2:]
    assert output(run(home, "audit", "tail", "--json", "-n", "0")) == ""
    assert output(run(home, "audit", "tail", "--json", "--user", "ANN")).splitlines() == [lines[2]]
    assert output(run(home, "audit", "tail", "--json", "--user", OPERATOR)).splitlines() == lines
    assert output(run(home, "audit", "tail", "--json", "--action", "upgrade_schema")).splitlines() == [lines[0]]
    assert output(run(home, "audit", "tail", "--json", "--since", "1h")).splitlines() == lines
    assert output(run(home, "audit", "tail", "--json", "--since", "0s")) == ""
    assert "must be a duration" in run(home, "audit", "tail", "--since", "now").stderr
    [line] = output(run(home, "audit", "tail", "--user", "ann")).splitlines()
    removed = f"remove_user ok, by {OPERATOR}, user ann, from command; scopes before read write"
    assert line.partition("  ")[2] == removed


def test_tail_shows_details_within_80_columns(home: Path) -> None:
    with worker(home / "config.toml"):  # adds the member
        pass
    output(run(home, "pool", "reserve", "devices", "pixel", "--until", "1h", "--note", "a new battery " * 6))
    with on_terminal(home, 'stty cols 80; "$TOKENAUTH" audit tail -n 1 2>&1; echo "exit $?"') as found:
        found.expect("exit 0")
    lines = found.shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0][21:] == f"reserve_member ok, by {OPERATOR}, target devices/pixel, from"
    assert lines[1] == " " * 21 + "command"
    assert re.match(rf" {{21}}until {time.gmtime().tm_year}-\d\d-\d\d \d\d:\d\d:\d\d, note", lines[2])
    text = " ".join(" ".join(lines[2:]).split())
    assert "note a new battery a new battery" in text
    [line] = output(run(home, "audit", "tail", "-n", "1")).splitlines()
    assert line.partition("; ")[2] in text


def test_tail_shows_times_durations_and_lists(home: Path) -> None:
    details = {
        "held": 61.5, "taken": False, "until": 1795978522, "scopes": ["read", "write"],
        "scopes_changed": ["ann: none -> admin", "carl: a -> b"],
    }  # fmt: skip
    Chain(home / "audit.jsonl").append(
        [json.dumps({"time": "2026-11-30T06:00:00.000Z", "action": "test", "details": details}).encode()]
    )
    assert output(run(home, "audit", "tail", "-n", "1")) == (
        "2026-11-30 06:00:00  test; held 61.5 s, until 2026-11-29 18:55:22, scopes read write, scopes changed"
        " ann: none -> admin; carl: a -> b\n"
    )


def test_tail_reads_renamed_files_too(home: Path) -> None:
    (home / "audit.jsonl").rename(home / "audit.jsonl-20261128")
    output(run(home, "user", "remove", "ann"))
    (home / "audit.jsonl").rename(home / "audit.jsonl-20261129")
    output(run(home, "user", "remove", "bob"))
    lines = [json.loads(line)["n"] for line in output(run(home, "audit", "tail", "--json")).splitlines()]
    assert lines == [1, 2, 3]
    assert json.loads(output(run(home, "audit", "tail", "--json", "-n", "2")).splitlines()[0])["n"] == 2
    assert output(run(home, "audit", "verify")).startswith("ok: 3 lines")


def test_tail_follows_a_server_and_a_rename(home: Path) -> None:
    with serve(home / "config.toml") as server, following(home, "--json", "-n", "1") as printed:
        until(lambda: "\n" in printed.read_text(), "the last act is shown")
        with server.client() as client:
            log_in(client)
            wait_for(home / "audit.jsonl", action="login")
            until(lambda: '"login"' in printed.read_text(), "the login is shown")
            (home / "audit.jsonl").rename(home / "audit.jsonl.1")
            log_in(client)
            until(lambda: printed.read_text().count('"login"') == 2, "the login after the rename is shown")
        assert server.stop() == 0
    assert run(home, "audit", "verify").returncode == 0


def test_tail_passes_nothing_on_that_controls_a_terminal(home: Path) -> None:
    """What others have written into the file: tokenauth escapes what it writes."""
    forged = {
        "time": "9999-01-01T00:00:00.000Z", "action": "\x1b[2J", "result": 5, "by": "\x9b2J", "target": "\u202e",
        "details": [{}],
    }  # fmt: skip
    with following(home) as printed, following(home, "--json", printed="json") as lines:
        until(lambda: "upgrade_schema" in printed.read_text() and "upgrade_schema" in lines.read_text(), "both read it")
        with (home / "audit.jsonl").open("ab") as file:
            for line in (json.dumps(forged), json.dumps(forged, ensure_ascii=False)):
                file.write(line.encode() + b"\n")
            file.write(json.dumps(forged).encode("utf-16-le") + b"\n")
        output(run(home, "user", "remove", "ann"))
        for path in (printed, lines):
            until(lambda path=path: "remove_user" in path.read_text(), "all lines are shown")  # type: ignore[misc]
    assert printed.read_text().count(r"\x1b[2J 5, by \x9b2J, target \u202e") == 2
    assert lines.read_text().count(r'"by": "\u009b2J"') == 2
    assert all(line.isprintable() for path in (printed, lines) for line in path.read_text().splitlines())


def test_a_terminal_is_not_controlled_by_any_field(home: Path) -> None:
    forged = {"time": "9999\x1b[2J", "action": "\x1b[2J", "by": "\x9b2J", "details": {"\x1b[2J": "\x1b[2J"}}
    with (home / "audit.jsonl").open("ab") as file:
        file.write(json.dumps(forged).encode() + b"\n")
    with on_terminal(home, 'stty cols 80; "$TOKENAUTH" audit tail -n 1 2>&1; echo "exit $?"') as found:
        found.expect("exit 0")
    assert found.shown.count(r"\x1b[2J") == 4
    assert "\x1b" not in found.shown


def test_an_ordered_reload_names_the_operator(home: Path) -> None:
    with serve(home / "config.toml") as server:
        assert run(home, "reload").returncode == 0
        [order] = wait_for(home / "audit.jsonl", action="order_reload")
        [done] = wait_for(home / "audit.jsonl", action="reload")
    assert (order["by"], order["via"], order["details"]) == (OPERATOR, "command", {"server": server.process.pid})
    assert (done["via"], done["result"], done["details"]["cause"]) == ("server", "ok", "command")
    assert done["by"] == OPERATOR


def test_a_refused_reload_names_the_operator(home: Path) -> None:
    """The command cannot do that: it finds no audit log in a broken file."""
    with serve(home / "config.toml") as server:
        (home / "config.toml").write_text("nonsense")
        assert run(home, "reload", SUDO_USER="jo-ann").returncode == 1
        [refused] = wait_for(home / "audit.jsonl", action="reload")
        server.process.send_signal(signal.SIGHUP)
        _, without = wait_for(home / "audit.jsonl", 2, action="reload")
        until(lambda: len(server.events("reload_refused")) == 2, "both are logged")
        assert [line.get("by") for line in server.events("reload_refused")] == ["jo-ann", None]
    assert (refused["by"], refused["result"], "by" in without) == ("jo-ann", "refused", False)


def test_the_document_names_each_action() -> None:
    text = (Path(__file__).parents[2] / "docs/audit.md").read_text()
    actions = {act.action for act in ACTS.values()} | {LOGOUT, DROPPED, "line_cut"}
    assert [action for action in actions if f"`{action}`" not in text] == []
