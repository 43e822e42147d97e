"""The chain of an audit file: what was removed, changed, inserted, swapped or cut shows, and a crash is harmless."""

import fcntl
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.servers import ROOT
from tests.support.skipping import skip_without
from tokenauth.audit import chain as module
from tokenauth.audit.chain import CUT, FIRST, LONGEST, Chain

Lines = list[bytes]


def record(number: int) -> bytes:
    return json.dumps({"action": "test", "number": number}).encode()


def filled(path: Path, count: int, **options: int | str) -> Chain:
    """Return a chain with that many lines, each appended by itself."""
    chain = Chain(path / "audit.jsonl", **options)  # type: ignore[arg-type]
    for number in range(1, count + 1):
        chain.append([record(number)])
    return chain


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def edit(chain: Chain, change: Callable[[Lines], Lines]) -> None:
    """Change the lines of the file, and leave its head alone."""
    lines = chain.path.read_bytes().splitlines(keepends=True)
    chain.path.write_bytes(b"".join(change(lines)))


def forge(line: bytes) -> bytes:
    """Change a line and compute its hash again, as anyone can without a key."""
    body = line.partition(b',"hash"')[0].replace(b'"test"', b'"fake"')
    return body + b',"hash":"' + sha256(body).hexdigest().encode() + b'"}\n'


def rewrite(lines: Lines, numbers: range) -> Lines:
    """Return lines up to the first of these numbers, then others with hashes that fit, as anyone can without a key."""
    written = lines[: numbers[0] - 1]
    previous = json.loads(written[-1])["hash"] if written else FIRST
    for number in numbers:
        body = b'{"n":%d,"action":"fake","previous":"%b"' % (number, previous.encode())
        previous = sha256(body).hexdigest()
        written.append(body + b',"hash":"%b"}\n' % previous.encode())
    return written


def test_a_filled_chain_is_right(tmp_path: Path) -> None:
    chain = filled(tmp_path, 5)
    verdict = chain.verify()
    assert (verdict.problem, verdict.lines, verdict.first, verdict.last) == (None, 5, 1, 5)
    assert verdict.hash == read(chain.path)[-1]["hash"]
    assert [line["number"] for line in read(chain.path)] == [1, 2, 3, 4, 5]


TAMPERED: dict[str, tuple[Callable[[Lines], Lines], int | None, str]] = {
    "removed": (lambda lines: lines[:4] + lines[5:], 5, "line 5 is missing"),
    "several removed": (lambda lines: lines[:4] + lines[7:], 5, "lines from 5 on are missing"),
    "changed": (lambda lines: [*lines[:4], lines[4].replace(b"test", b"best"), *lines[5:]], 5, "was changed"),
    "changed with its hash": (lambda lines: [*lines[:4], forge(lines[4]), *lines[5:]], 6, "does not follow"),
    "inserted": (lambda lines: [*lines[:4], b'{"action":"x"}\n', *lines[4:]], 5, "did not write it"),
    "repeated": (lambda lines: [*lines[:4], lines[2], *lines[4:]], 5, "line 3 is repeated"),
    "swapped": (lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]], 5, "line 5 is missing here, or moved"),
    "cut in the middle": (lambda lines: [*lines[:4], lines[4][:30] + b"\n", *lines[5:]], 5, "changed or cut"),
    "cut at the end": (lambda lines: lines[:-2], None, "the last 2 lines are missing"),
    "cut in the last line": (lambda lines: [*lines[:-1], lines[-1][:-20]], 9, "changed or cut"),
    "without the last line break": (lambda lines: [*lines[:-1], lines[-1].rstrip()], 9, "line break at the end"),
    "without a line break": (lambda lines: [*lines[:4], lines[4].rstrip(), *lines[5:]], 5, "was changed or cut"),
    "the last one changed with its hash": (lambda lines: [*lines[:-1], forge(lines[-1])], None, "not the one"),
    "the first one removed and renumbered": (
        lambda lines: [forge(lines[1].replace(b'"n":2', b'"n":1')), *lines[2:]], 1, "numbered 1, and follows others"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_finds_the_first_tampered_line(tmp_path: Path, case: str) -> None:
    change, line, problem = TAMPERED[case]
    chain = filled(tmp_path, 9)
    edit(chain, change)
    verdict = chain.verify()
    assert problem in str(verdict.problem)
    position = verdict.problems[0].position
    assert (position and position.line) == line


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_goes_on_after_each_break(tmp_path: Path, case: str) -> None:
    """So one changed line does not hide what is done to the log later."""
    chain = filled(tmp_path, 9)
    edit(chain, TAMPERED[case][0])
    chain.append([record(10), record(11), record(12)])
    before = chain.verify()
    assert before.breaks == len(before.problems) >= 1
    edit(chain, lambda lines: [*lines[:-2], lines[-2].replace(b"test", b"best"), lines[-1]])
    after = chain.verify()
    assert after.breaks == before.breaks + 1
    assert "was changed" in after.problems[-1].problem


CUT_AND_CHANGED: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "garbage appended": (lambda lines: [*lines[:10], b"x"], "the last 9 lines are missing"),
    "last line changed": (lambda lines: [*lines[:9], b"x\n"], "the last 10 lines are missing"),
    "only garbage left": (lambda lines: [b"x\n"], "line 20 is missing, or changed"),
}


@pytest.mark.parametrize("key", ["", "a key of the operator"])
@pytest.mark.parametrize("case", CUT_AND_CHANGED)
def test_a_changed_line_does_not_hide_that_the_end_is_missing(tmp_path: Path, case: str, key: str) -> None:
    change, problem = CUT_AND_CHANGED[case]
    chain = filled(tmp_path, 20, key=key)
    edit(chain, change)
    verdict = chain.verify()
    assert verdict.breaks == 2
    assert problem in verdict.problems[-1].problem


FORGED: dict[str, Callable[[Lines], Lines]] = {
    "the last five written again as six": lambda lines: rewrite(lines, range(16, 22)),
    "all removed, and others after the head": lambda lines: rewrite(lines, range(20, 26))[20:],
    "the last one changed, and others after it": lambda lines: [
        *lines[:19],
        b"x\n",
        *rewrite(lines, range(20, 23))[20:],
    ],
}


@pytest.mark.parametrize("case", FORGED)
def test_lines_beyond_the_head_hide_no_forged_ones(tmp_path: Path, case: str) -> None:
    chain = filled(tmp_path, 20)
    edit(chain, FORGED[case])
    verdict = chain.verify()
    assert "line 20 is not the one that audit.jsonl.head knows" in verdict.problems[-1].problem


@pytest.mark.parametrize("case", FORGED)
def test_the_next_line_does_not_make_forged_ones_right(tmp_path: Path, case: str) -> None:
    chain = filled(tmp_path, 20)
    edit(chain, FORGED[case])
    chain.append([record(21)])
    chain.append([record(22)])
    problems = [found.problem for found in chain.verify().problems]
    assert any("repeated, inserted or moved" in problem for problem in problems)
    assert json.loads(chain.path.read_bytes().splitlines()[-1])["n"] == 22


def test_a_head_that_is_older_than_the_file_is_kept(tmp_path: Path) -> None:
    """As after a loss of power: the head is not flushed to the disk."""
    chain = filled(tmp_path, 3)
    before = chain.head_path.read_bytes()
    chain.append([record(4), record(5)])
    chain.path.rename(tmp_path / "audit.jsonl.1")
    chain.append([record(6)])
    chain.head_path.write_bytes(before)
    assert (chain.verify().problem, chain.verify().beyond) == (None, 3)
    chain.append([record(7)])
    assert (chain.verify().problem, chain.verify().lines) == (None, 7)


def test_a_wrong_key_counts_all_lines_and_shows_some(tmp_path: Path) -> None:
    chain = filled(tmp_path, 30, key="a key of the operator")
    verdict = Chain(chain.path).verify()
    assert (verdict.breaks, len(verdict.problems), verdict.lines) == (30, 20, 0)


@pytest.mark.parametrize("case", TAMPERED)
def test_later_lines_do_not_hide_tampering(tmp_path: Path, case: str) -> None:
    chain = filled(tmp_path, 9)
    edit(chain, TAMPERED[case][0])
    chain.append([record(10)])
    assert chain.verify().problem is not None


def test_a_key_shows_lines_that_were_all_rewritten(tmp_path: Path) -> None:
    chain = filled(tmp_path, 3, key="a key of the operator")
    assert chain.verify().problem is None
    assert Chain(chain.path).verify().problem is not None
    chain.path.unlink()
    chain.head_path.unlink()
    filled(tmp_path, 3)
    assert "line 1" not in str(chain.verify().problem)
    assert chain.verify().problems[0].position is not None


@pytest.mark.parametrize(
    "rest",
    [b'{"n":4,"action":"te', b"\0" * 70_000, b"{}", b"\0" * LONGEST, b"\0" * 2 * LONGEST, b"\0" * (5 * LONGEST + 1)],
    ids=["half", "zeros", "object", "as long as the longest", "twice as long", "long"],
)
def test_a_line_that_a_crash_has_cut_is_marked(tmp_path: Path, rest: bytes) -> None:
    chain = filled(tmp_path, 3)
    with chain.path.open("ab") as file:
        file.write(rest)
    chain.append([record(4)])
    verdict = chain.verify()
    assert (verdict.problem, verdict.lines, verdict.cut) == (None, 5, 1)
    lines = chain.path.read_bytes().splitlines()
    assert lines[3] == rest
    assert json.loads(lines[4])["action"] == CUT
    assert json.loads(lines[4])["details"] == {"bytes": len(rest), "sha256": sha256(rest).hexdigest()}


def test_a_cut_line_is_not_hidden_by_another_mark(tmp_path: Path) -> None:
    chain = filled(tmp_path, 3)
    with chain.path.open("ab") as file:
        file.write(b"cut")
    chain.append([record(4)])
    edit(chain, lambda lines: [*lines[:3], b"cat\n", *lines[4:]])
    assert chain.verify().problem is not None


def test_a_long_line_is_changed_or_cut(tmp_path: Path) -> None:
    """Also if its hash is right: tokenauth writes none."""
    chain = filled(tmp_path, 3)
    chain.append([json.dumps({"action": "test", "text": "x" * LONGEST}).encode(), record(5)])
    verdict = chain.verify()
    assert (verdict.breaks, verdict.lines, verdict.problems[0].position) == (1, 4, (chain.path, 4))
    assert "changed or cut" in str(verdict.problem)


@pytest.mark.parametrize("start", [b'{"n":4,"action":', b'{"action":'], ids=["numbered", "unnumbered"])
def test_a_deep_line_with_a_hash_that_fits_is_a_break(tmp_path: Path, start: bytes) -> None:
    chain = filled(tmp_path, 3)
    body = start + b"[" * 500_000 + b'"n"'
    deep = body + b',"hash":"' + sha256(body).hexdigest().encode() + b'"}\n'
    (tmp_path / "audit.jsonl.1").write_bytes(deep)
    edit(chain, lambda lines: [*lines, deep])
    assert [each.position for each in chain.verify().problems] == [(tmp_path / "audit.jsonl.1", 0), (chain.path, 4)]


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    chain = filled(tmp_path, 3)
    before = chain.head_path.read_bytes()
    chain.append([record(4)])
    chain.path.write_bytes(chain.path.read_bytes().removesuffix(b"\n"))
    chain.head_path.write_bytes(before)
    chain.append([record(5)])
    assert (chain.verify().problem, chain.verify().lines) == (None, 5)


def test_without_a_head_a_missing_end_may_be_that_of_a_crash(tmp_path: Path) -> None:
    """Nothing then shows whether the head knew that line. It is a break in any case."""
    chain = filled(tmp_path, 3)
    chain.path.write_bytes(chain.path.read_bytes().removesuffix(b"\n"))
    assert "was removed" in str(chain.verify().problem)
    named = chain.verify([chain.path])
    chain.head_path.unlink()
    for verdict in (named, chain.verify()):
        assert verdict.breaks == 1
        assert "no line break at its end: a crash has lost it, or someone has removed it" in str(verdict.problem)


def test_a_rotated_file_without_its_end_shows(tmp_path: Path) -> None:
    """Also where it is checked by name, and compressed."""
    chain = filled(tmp_path, 5)
    whole = chain.path.rename(tmp_path / "audit.jsonl.1")
    chain.append([record(6)])
    assert chain.verify().problem is None
    whole.write_bytes(whole.read_bytes().removesuffix(b"\n"))
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    for files in ([], [whole], [packed]):
        verdict = chain.verify(files)
        assert (verdict.breaks, verdict.problems[0].position) == (1, ([*files, whole][0], 5))


def test_lines_written_before_the_head_are_kept(tmp_path: Path) -> None:
    chain = filled(tmp_path, 3)
    before = chain.head_path.read_bytes()
    chain.append([record(4), record(5)])
    chain.head_path.write_bytes(before)
    assert (chain.verify().problem, chain.verify().beyond) == (None, 2)
    whole = chain.path.read_bytes()
    edit(chain, lambda lines: lines[3:])  # the others are in a file that is no longer kept
    assert (chain.verify().problem, chain.verify().first) == (None, 4)
    chain.path.write_bytes(whole)
    chain.append([record(6)])
    assert (chain.verify().problem, chain.verify().lines) == (None, 6)


@pytest.mark.parametrize("size", [1_000, 70_000, 300_000])
def test_a_long_line_before_the_head_is_kept(tmp_path: Path, size: int) -> None:
    chain = filled(tmp_path, 3)
    before = chain.head_path.read_bytes()
    chain.append([json.dumps({"action": "test", "text": "x" * size}).encode()])
    chain.head_path.write_bytes(before)
    chain.append([record(5)])
    assert (chain.verify().problem, chain.verify().lines) == (None, 5)


@pytest.mark.parametrize("head", [None, b"", b"torn {"])
def test_without_a_head_the_chain_goes_on(tmp_path: Path, head: bytes | None) -> None:
    chain = filled(tmp_path, 3)
    if head is None:
        chain.head_path.unlink()
    else:
        chain.head_path.write_bytes(head)
    chain.append([record(4)])
    assert (chain.verify().problem, chain.verify().lines) == (None, 4)


def test_rotation_by_size_keeps_the_chain(tmp_path: Path) -> None:
    chain = filled(tmp_path, 40, max_size=1000, keep=3)
    names = [path.name for path in chain.files()]
    assert names == ["audit.jsonl.3", "audit.jsonl.2", "audit.jsonl.1", "audit.jsonl"]
    assert all(path.stat().st_size <= 1000 for path in chain.files())
    verdict = chain.verify()
    assert (verdict.problem, verdict.last) == (None, 40)
    assert verdict.lines == 40 - verdict.first + 1


def test_a_rotated_file_that_is_missing_shows(tmp_path: Path) -> None:
    chain = filled(tmp_path, 40, max_size=1000, keep=3)
    chain.files()[1].unlink()
    assert "missing" in str(chain.verify().problem)


def test_a_file_renamed_by_another_program_goes_on(tmp_path: Path) -> None:
    chain = filled(tmp_path, 3)
    chain.path.rename(tmp_path / "audit.jsonl-20261128")
    chain.append([record(4)])
    with gzip.open(tmp_path / "audit.jsonl-20261128.gz", "wb") as file:
        file.write((tmp_path / "audit.jsonl-20261128").read_bytes())
    (tmp_path / "audit.jsonl-20261128").unlink()
    assert [path.name for path in chain.files()] == ["audit.jsonl-20261128.gz", "audit.jsonl"]
    assert (chain.verify().problem, chain.verify().lines) == (None, 4)


@pytest.mark.parametrize("cut", [b"", b'{"n":4,"acti', b"\0" * 5 * LONGEST], ids=["empty", "half", "zeros"])
def test_a_file_that_begins_oddly_is_one_of_the_chain(tmp_path: Path, cut: bytes) -> None:
    chain = filled(tmp_path, 3)
    chain.path.rename(tmp_path / "audit.jsonl-20261128")
    chain.path.write_bytes(cut)
    chain.append([json.dumps({"action": "test", "text": "x" * 80_000}).encode(), record(5)])
    chain.path.rename(tmp_path / "audit.jsonl-20261129")
    chain.append([record(6)])
    assert [path.name for path in chain.files()] == ["audit.jsonl-20261128", "audit.jsonl-20261129", "audit.jsonl"]
    assert (chain.verify().problem, chain.verify().cut) == (None, int(bool(cut)))


def test_a_restored_copy_goes_on(tmp_path: Path) -> None:
    chain = filled(tmp_path, 3)
    copy = chain.path.read_bytes()
    chain.path.unlink()
    chain.path.write_bytes(copy)
    chain.append([record(4)])
    assert (chain.verify().problem, chain.verify().lines) == (None, 4)


def test_new_files_are_closed_to_other_accounts(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        chain = filled(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (chain.path, chain.head_path)} == {0o640}


def test_files_made_by_root_belong_to_the_service(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        skip_without("root", "run the tests as root")
    os.chown(tmp_path, 4711, 4712)
    chain = filled(tmp_path, 30, max_size=1000)
    for path in (*chain.files(), chain.head_path):
        assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712)


@contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file grow beyond this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_on_a_full_disk_all_or_nothing_is_written(tmp_path: Path) -> None:
    chain = filled(tmp_path, 3)
    before = chain.path.read_bytes()
    with room(len(before) + 100), pytest.raises(OSError, match="too large"):
        chain.append([record(4), record(5)])
    assert chain.path.read_bytes() == before
    chain.append([record(6)])
    assert (chain.verify().problem, chain.verify().lines) == (None, 4)


WRITER = """
import json, sys
from pathlib import Path
from tokenauth.audit.chain import Chain
chain = Chain(Path(sys.argv[1]), max_size=20_000, keep=100)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    chain.append([json.dumps({"writer": sys.argv[2], "number": number}).encode()])
    print(number, flush=True)
"""


@contextmanager
def writers(path: Path, count: int, lines: int) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start processes that append as soon as a line is sent to them."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number), str(lines)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_four_processes_append_to_one_chain(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "audit.jsonl", keep=100)
    with writers(chain.path, 4, 100) as processes:
        for process in processes:
            process.communicate()
    verdict = chain.verify()
    assert (verdict.problem, verdict.lines, verdict.first) == (None, 400, 1)
    assert len(chain.files()) > 3
    lines = [line for path in chain.files() for line in read(path)]
    for writer in "0123":
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(100))


@pytest.mark.extended
def test_writers_killed_at_any_instant_break_nothing(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "audit.jsonl", keep=100)
    answered = [0, 0, 0, 0]
    for _ in range(3):
        with writers(chain.path, 4, 1_000_000) as processes:
            for number, process in enumerate(processes):
                assert process.stdout is not None
                for _ in range(5 + 3 * number):
                    process.stdout.readline()
                process.kill()
                output, _ = process.communicate()
                answered[number] += 5 + 3 * number + output.count("\n")
    chain.append([b'{"writer":"last"}'])
    verdict = chain.verify()
    assert verdict.problem is None
    lines = [line for path in chain.files() for line in read_whole(path)]
    for writer, count in enumerate(answered):
        assert sum(line.get("writer") == str(writer) for line in lines) >= count


def read_whole(path: Path) -> list[dict[str, object]]:
    """Return the lines that were not cut."""
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b'"}')]


def test_a_writer_waits_only_so_long_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = filled(tmp_path, 1)
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.05)
    with chain.head_path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            chain.append([record(2)])
    chain.append([record(2)])
    assert chain.verify().lines == 2


def test_a_check_says_that_there_is_no_head(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "audit.jsonl")
    chain.append([record(1)])
    assert not chain.verify().headless
    chain.head_path.unlink()
    verdict = chain.verify()
    assert (verdict.problem, verdict.headless) == (None, True)


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.head"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        Chain(tmp_path / "audit.jsonl").append([record(1)])
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.head"])
def test_no_file_is_created_through_a_link(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        Chain(tmp_path / "audit.jsonl").append([record(1)])
    assert not elsewhere.exists()
