"""Promise 1, at the system calls: nothing is acknowledged before it is on the disk, also when the disk fails."""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.connections import LOGIN, Connection
from tests.support.servers import Server, spawn, worker, write_config
from tests.support.skipping import skip_without
from tests.support.syscalls import ERRORS, survive

WAL = "tokenauth.db-wal"


@pytest.fixture(autouse=True)
def _strace() -> None:
    if shutil.which("strace") is None:
        skip_without("strace", "apt-get install strace")


@contextmanager
def traced(config: Path, *options: str) -> Iterator[Server]:
    """Run a worker under strace. The port is 0 if it could not start."""
    command = ["strace", "-f", "-o", str(config.with_name("trace")), *options]
    with spawn([*command, sys.executable, "-m", "tests.support.worker", str(config), "-"], config.parent) as server:
        try:
            server.port = server.wait("test_worker_ready", 60)["port"]
        except AssertionError:
            assert server.process.poll() not in {None, 0}
        yield server


def test_no_answer_leaves_before_its_commit_is_synced(tmp_path: Path) -> None:
    """At each answer to a login or a revocation, the write-ahead log has been synced since its last write.

    A power failure, unlike kill -9, loses what was not synced.
    """
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    calls = "trace=pwrite64,pwritev,fdatasync,fsync,write,writev,sendto,sendmsg"
    with traced(config, "-y", "-s", "400", "-e", calls) as server, Connection(server.port) as connection:
        for _ in range(30):
            token = connection.log_in()
            listed = connection.ask("GET", "/api/tokens", X_Token=token).json()["tokens"]
            assert connection.ask("DELETE", f"/api/tokens/{listed[0]['id']}", X_Token=token).status == 204
            connection.log_out(connection.log_in())
    dirty, answers = False, 0
    for line in completed((tmp_path / "trace").read_text(errors="replace")):
        if WAL in line and re.search(r"\bpwritev?(64)?\(", line):
            dirty = True
        elif WAL in line and re.search(r"\bf(data)?sync\(.*= 0", line):
            dirty = False
        elif "HTTP/1.1 20" in line:
            answers += 1
            assert not dirty or answers < 10, line  # in the beginning the sweeper may write, too
    assert answers >= 150


def completed(trace: str) -> Iterator[str]:
    """Join the two lines of an interrupted system call at its end. A write is also yielded at its beginning."""
    open_calls: dict[str, str] = {}
    for line in trace.splitlines():
        process, _, call = line.partition(" ")
        if call.rstrip().endswith("<unfinished ...>"):
            open_calls[process] = call.partition("<unfinished")[0]
            if "sync(" not in call:
                yield call
        elif "resumed>" in call:
            yield open_calls.pop(process, "") + call.partition("resumed>")[2]
        else:
            yield call


@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
@pytest.mark.parametrize("when", ["1+", "3+", "9+", "41+", "2", "7"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_a_failed_write_is_never_acknowledged(tmp_path: Path, call: str, when: str, error: str) -> None:
    """The disk fails at the n-th call, or from then on. Logins get 503, probes work, and nothing is lost."""
    config = write_config(tmp_path, "[tokens]\nper_user = 0")
    with worker(config) as server, Connection(server.port) as connection:
        live, ended = [connection.log_in() for _ in range(5)], []
        server.kill()
    with traced(config, "-e", f"trace={call}", f"--inject={call}:error={error}:when={when}") as server:
        if server.port:
            with Connection(server.port) as connection:
                failed = 0
                for number in range(40):
                    answer = connection.ask("POST", "/api/token", LOGIN)
                    assert answer.status in {200, 503}, answer
                    failed += answer.status == 503
                    if answer.status == 200:
                        assert not (failed and when.endswith("+")), "acknowledged although the disk fails"
                        live.append(answer.json()["token"])
                    assert connection.valid(live[number % len(live)])
                    if number % 4 == 0:
                        listed = connection.ask("GET", "/api/tokens", X_Token=live[0]).json()["tokens"]
                        one = next(row["id"] for row in listed if not row["current"])
                        revoked = connection.ask("DELETE", f"/api/tokens/{one}", X_Token=live[0])
                        assert revoked.status in {204, 503}, revoked
                        if revoked.status == 204:
                            ended += [token for token in live if not connection.valid(token)]
                            live = [token for token in live if token not in ended]
                assert failed or not when.endswith("+")
        server.kill()
    for _ in range(2):
        with worker(config) as server, Connection(server.port) as connection:
            assert all(map(connection.valid, live))
            assert not any(map(connection.valid, ended))
            server.kill()


def test_any_call_of_a_commit_may_fail(tmp_path: Path) -> None:
    """Each in turn, once and from then on: every answer is 503 or true, and service resumes by itself."""
    assert survive(tmp_path, ERRORS, step=1) > 20
