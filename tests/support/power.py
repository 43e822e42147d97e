"""Records what workers write to the files of a database, and makes the states that a power failure may leave.

A write is durable once a later sync of its file has ended. Of the others any subset may be on the disk, each of them
complete or torn between sectors. The -shm file is not durable at all.
"""

import os
import random
import re
import shutil
import sqlite3
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import spawn, worker, write_config
from tests.support.skipping import skip_without

SECTOR = 512
LATER = 10_000.0
"""Lifetime of a lease: none lapses during a test, even if the machine is suspended meanwhile."""

SETTINGS = f"""
[tokens]
per_user = 0

[pools.permits]
capacity = 6
prefill = true
lease_ttl = {LATER:g}
"""

_WORKERS = """
import os
os.fork()
from tokenauth.stores.sqlite import writer
writer._PRAGMAS = tuple(p.replace("autocheckpoint = 4000", "autocheckpoint = 40") for p in writer._PRAGMAS)
from tests.support.worker import main
main()
"""
"""Two workers that copy the write-ahead log into the database a hundred times as often as usual, and begin it again."""


@contextmanager
def recorded(config: Path, trace: Path) -> Iterator[list[int]]:
    """Run two workers, record their system calls, and yield their ports."""
    calls = "trace=openat,unlink,pwrite64,pwritev,ftruncate,fallocate,fsync,fdatasync,write,writev,sendto,sendmsg"
    command = ["strace", "-f", "--seccomp-bpf", "-yy", "-xx", "-s", "100000", "-e", calls, "-e", "signal=none"]
    command += ["-o", str(trace), sys.executable, "-c", _WORKERS, str(config), "-"]
    with spawn(command, config.parent) as server:
        until(lambda: len(server.events("test_worker_ready")) == 2, "both workers serve")
        yield [event["port"] for event in server.events("test_worker_ready")]
        server.kill()


# What clients did

Kind = Literal["login", "log-out", "assign", "keep-alive", "release"]


class Act(NamedTuple):
    """One request. `value` is its token; a lease has a fence, and an instant until which it lasts."""

    kind: Kind
    value: str = ""
    fence: int = 0
    until: int = 0


class Client(threading.Thread):
    """Sends requests one after the other over one connection, and records them in their order."""

    def __init__(self, port: int, number: int, requests: int) -> None:
        super().__init__()
        self._connection = Connection(port)
        self._random = random.Random(number)
        self._requests = requests
        self.port = self._connection._socket.getsockname()[1]
        self.acts: list[Act] = []

    def run(self) -> None:
        user = PoolUser(self._connection)
        self.acts.append(Act("login", user.token))
        live: list[str] = []
        while len(self.acts) < self._requests:
            choice = self._random.random()
            if choice < 0.35:
                live.append(self._connection.log_in())
                self.acts.append(Act("login", live[-1]))
            elif choice < 0.6 and live:
                token = live.pop(self._random.randrange(len(live)))
                self._connection.log_out(token)
                self.acts.append(Act("log-out", token))
            else:
                self._lease(user)
        self._connection.close()

    def _lease(self, user: PoolUser) -> None:
        lease = user.assign("permits")
        self.acts.append(Act("assign", lease.token, lease.fence, lease.expiry_time))
        if self._random.random() < 0.5:
            status, kept = user.keep_alive("permits", lease.token)
            assert status == 200, kept
            self.acts.append(Act("keep-alive", lease.token, lease.fence, kept["expiry_time"]))
        assert user.release("permits", lease.token) == (204, None)
        self.acts.append(Act("release", lease.token, lease.fence))


def run_clients(ports: Sequence[int], requests: int) -> list[Client]:
    """Run two clients for each worker until each has sent its requests."""
    clients = [Client(port, number, requests) for number, port in enumerate([*ports, *ports])]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
        assert len(client.acts) >= requests, "a client failed"
    return clients


# What was recorded


class Write(NamedTuple):
    """A change of a file: data at an offset, or without data its new length."""

    begun: int
    file: str
    offset: int
    data: bytes | None
    synced: list[int]
    """When a sync of the file has ended that began after this; empty if none did."""


class Answer(NamedTuple):
    """An answer began to leave, for the client with this port."""

    at: int
    port: int


@dataclass
class Recording:
    """The stream of writes, syncs and answers. Instants are numbers of lines of the trace."""

    length: int = 0
    writes: list[Write] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    created: dict[str, int] = field(default_factory=dict)
    """When a file was created."""
    listed: dict[str, int] = field(default_factory=dict)
    """When a sync of the directory has ended that began after that."""


_CALL = re.compile(r"(\d+) +(?:(\w+)\((.*)|<\.\.\. (\w+) resumed>(.*))")
_FILE = re.compile(r"\d+<([^>]*)>")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def _text(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


def parse(trace: Path, database: Path) -> Recording:
    """Read a trace of the files of a database."""
    recording = Recording()
    open_calls: dict[str, tuple[int, str, str]] = {}
    with trace.open(errors="replace") as lines:
        for at, line in enumerate(lines):
            recording.length = at + 1
            match = _CALL.match(line)
            if match is None:
                continue
            process, name, arguments, resumed, rest = match.groups()
            if resumed:
                begun, name, arguments = open_calls.pop(process)
                _ended(recording, database, (begun, at), name, arguments + rest)
            else:
                _begun(recording, database, at, name, arguments)
                if arguments.endswith("<unfinished ...>"):
                    open_calls[process] = (at, name, arguments.removesuffix("<unfinished ...>"))
                else:
                    _ended(recording, database, (at, at), name, arguments)
    return recording


def _path(text: str) -> Path:
    """Return the path of a descriptor or an argument, which strace may have escaped."""
    return Path(os.fsdecode(_text(text) if text.startswith("\\x") else text.encode()))


def _begun(recording: Recording, database: Path, at: int, name: str, arguments: str) -> None:
    """Note a write or an answer, which takes effect at its beginning at the earliest."""
    descriptor = _FILE.match(arguments)
    if descriptor is None:
        return
    if name in {"write", "writev", "sendto", "sendmsg"}:
        peer = re.search(r"TCP:\[127\.0\.0\.1:\d+->127\.0\.0\.1:(\d+)\]", arguments)
        if peer and (sent := _STRING.search(arguments)) and _text(sent[1]).startswith(b"HTTP/1.1 "):
            recording.answers.append(Answer(at, int(peer[1])))
        return
    path = _path(descriptor[1])
    if path.name not in {database.name, f"{database.name}-wal"}:
        return
    assert name not in {"pwritev", "fallocate"}, f"SQLite did not use {name} when this was written"
    if name == "pwrite64":
        text = _STRING.search(arguments)
        assert text is not None
        data = _text(text[1])
        size, offset = map(int, re.findall(r", (\d+)(?= |,|\))", arguments[text.end() :] + " ")[:2])
        assert len(data) == size
        recording.writes.append(Write(at, path.name, offset, data, []))
    elif name == "ftruncate":
        found = re.search(r">, (\d+)", arguments)
        assert found is not None
        recording.writes.append(Write(at, path.name, int(found[1]), None, []))


def _ended(recording: Recording, database: Path, span: tuple[int, int], name: str, call: str) -> None:
    """Note what has ended: a sync, or the creation of a file."""
    begun, ended = span
    if name == "openat" and "O_CREAT" in call and (opened := re.search(r"= \d+<([^>]*)>", call)):
        path = _path(opened[1])
        if path == Path(f"{database}-wal"):
            recording.created.setdefault(path.name, ended)
    elif name in {"fsync", "fdatasync"} and "= 0" in call and (descriptor := _FILE.match(call)):
        path = _path(descriptor[1])
        for write in recording.writes:
            if write.file == path.name and write.begun < begun and not write.synced:
                write.synced.append(ended)
        if path == database.parent:
            for created, at in recording.created.items():
                if at < begun:
                    recording.listed.setdefault(created, ended)
    assert name != "unlink" or database.name.encode() not in _text(_STRING.findall(call)[0]), "a file was removed"


_LATELY = 100
"""Lines of a trace in which clients get about three answers."""


class States:
    """The states that a power failure may leave, at random."""

    def __init__(self, before: Mapping[str, bytes], recording: Recording, seed: int) -> None:
        """`before` has the files' content when the recording began."""
        self._before = before
        self._recording = recording
        self._random = random.Random(seed)

    def __iter__(self) -> Iterator[tuple[int, dict[str, bytes]]]:
        """Yield instants of the recording, and the content of each file that a power failure then leaves.

        Half of the instants are just before or after an answer. In two thirds of the states, what was written until
        some instant has reached the disk in order, in half of them until one just before; of the rest, any of it has.
        """
        while True:
            at = self._random.randrange(self._recording.length + 1)
            if self._random.random() < 0.5:
                at = self._random.choice(self._recording.answers).at + self._random.choice([0, 1, 1])
            yield at, self._left(at)

    def _left(self, at: int) -> dict[str, bytes]:
        files = defaultdict(bytearray, {name: bytearray(content) for name, content in self._before.items()})
        share = self._random.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        torn = self._random.choice([0.0, 0.5])
        in_order = self._random.choice([0, self._random.randrange(at + 1), at - self._random.randrange(_LATELY)])
        for write in self._recording.writes:
            if write.begun >= at:
                break
            if write.begun < in_order or (write.synced and write.synced[0] < at):
                _apply(files[write.file], write.offset, write.data)
            elif self._random.random() < share:
                for offset, data in self._pieces(write, torn):
                    _apply(files[write.file], offset, data)
        for name, created in self._recording.created.items():
            listed = self._recording.listed.get(name, self._recording.length + 1)
            if created < at <= listed and name not in self._before and self._random.random() < 0.5:
                files.pop(name, None)
        return {name: bytes(content) for name, content in files.items()}

    def _pieces(self, write: Write, torn: float) -> Iterator[tuple[int, bytes | None]]:
        """Yield all of a write, or only some of its sectors."""
        if write.data is None or self._random.random() >= torn:
            yield write.offset, write.data
            return
        at, end = write.offset, write.offset + len(write.data)
        while at < end:
            following = min(end, (at // SECTOR + 1) * SECTOR)
            if self._random.random() < 0.5:
                yield at, write.data[at - write.offset : following - write.offset]
            at = following


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
    else:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


# What must be there


def write_state(directory: Path, files: Mapping[str, bytes], shm: bytes | None) -> Path:
    """Write the files of a state, and return the path of the database."""
    for name, content in files.items():
        (directory / name).write_bytes(content)
    database = directory / "tokenauth.db"
    if shm is not None:
        Path(f"{database}-shm").write_bytes(shm)
    return database


def lost(database: Path, clients: Sequence[Client], recording: Recording, at: int) -> list[str]:
    """Open a state with SQLite. Return a sentence for each answer before the power failure that it contradicts."""
    answered: dict[int, int] = defaultdict(int)
    for answer in recording.answers:
        answered[answer.port] += answer.at < at
    found: list[str] = []
    with closing(sqlite3.connect(database)) as db:
        try:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            digests = {row[0] for row in db.execute("SELECT digest FROM tokens")}
            rows = db.execute("SELECT value, fence, holder, free_at FROM pool_tokens").fetchall()
        except (sqlite3.DatabaseError, AssertionError) as error:
            return [f"the database is damaged: {error}"]
    leases = defaultdict(lambda: (0, None, 0.0), {value: lease for value, *lease in rows})
    for client in clients:
        done, asked = client.acts[: answered[client.port]], client.acts[: answered[client.port] + 1]
        ended = {act.value for act in asked if act.kind == "log-out"}
        for act in done:
            there = sha256(act.value.encode()).digest() in digests
            if act.kind == "login" and not there and act.value not in ended:
                found.append("a token is gone")
            elif act.kind == "log-out" and there:
                found.append("a revoked token is back")
            elif act.kind == "assign" and leases[act.value][0] < act.fence:
                found.append(f"a lease is gone: fence {leases[act.value][0]} instead of {act.fence}")
        if done and done[-1].fence:
            found += _lease_faults(done[-1], leases[done[-1].value], pending=asked[-1])
    return found


def _lease_faults(last: Act, row: tuple[int, str | None, float], pending: Act) -> Iterator[str]:
    """Compare the row of a token with the last answer about its lease."""
    fence, holder, free_at = row
    if fence != last.fence:
        if last.kind != "release":
            yield f"leased twice: fence {fence} instead of {last.fence}"
    elif last.kind == "release":
        if holder is not None:
            yield "a released lease is back"
    elif pending.kind != "release" and (holder is None or free_at < last.until - 1):
        yield f"a lease ends early: at {free_at}, and {last.until} was answered"


def check_service(port: int, clients: Sequence[Client], recording: Recording, at: int) -> None:
    """Check that a worker that started on a state accepts what was issued, and refuses what was revoked."""
    with Connection(port) as connection:
        for client in clients:
            count = sum(answer.port == client.port and answer.at < at for answer in recording.answers)
            ended = {act.value for act in client.acts[: count + 1] if act.kind == "log-out"}
            for act in client.acts[:count]:
                if act.kind == "log-out" or (act.kind == "login" and act.value not in ended):
                    assert connection.valid(act.value) is (act.kind == "login"), act.kind


class Recorded(NamedTuple):
    """A recording, what its clients did, and the files when it began."""

    directory: Path
    before: Mapping[str, bytes]
    recording: Recording
    clients: Sequence[Client]

    def faults(self, count: int, booted: int = 0) -> Iterator[str]:
        """Make states, and yield what is wrong with each. With `booted` of them a worker starts."""
        chance = random.Random(1)
        for number, (at, files) in enumerate(islice(States(self.before, self.recording, 1), count)):
            state = self.directory / f"state-{number}"
            state.mkdir()
            database = write_state(state, files, chance.choice([None, b"", chance.randbytes(32768)]))
            if number < booted:
                with worker(write_config(state, SETTINGS)) as server:
                    check_service(server.port, self.clients, self.recording, at)
            for fault in lost(database, self.clients, self.recording, at):
                yield f"state {number}, line {at}: {fault}"
            shutil.rmtree(state)

    def without_syncs(self) -> "Recorded":
        """Return the same as if no sync had ended."""
        writes = [write._replace(synced=[]) for write in self.recording.writes]
        return self._replace(recording=replace(self.recording, writes=writes))


def record(directory: Path, requests: int) -> Recorded:
    """Record workers while each of four clients sends its requests."""
    if shutil.which("strace") is None:
        skip_without("strace", "apt-get install strace")
    config = write_config(directory, SETTINGS)
    database, trace = directory / "tokenauth.db", directory / "trace"
    with worker(config) as first:
        first.stop()
    assert not Path(f"{database}-wal").exists()
    before = {database.name: database.read_bytes()}
    with recorded(config, trace) as ports:
        clients = run_clients(ports, requests)
    recording = parse(trace, database)
    trace.unlink()
    check_recording(recording, clients)
    return Recorded(directory, before, recording, clients)


def check_recording(recording: Recording, clients: Sequence[Client]) -> None:
    """Check that the recording has all that it must have: answers, syncs, and copies of the log into the database."""
    for client in clients:
        answers = sum(answer.port == client.port for answer in recording.answers)
        assert answers >= len(client.acts), (answers, len(client.acts))
    copied = sum(write.file == "tokenauth.db" for write in recording.writes)
    restarts = sum(write.file == "tokenauth.db-wal" and write.offset == 0 for write in recording.writes)
    assert copied > 10, "the log was hardly copied"
    assert restarts > 1, "the log did not begin again"
    assert recording.listed.keys() == {"tokenauth.db-wal"}, "the directory was not synced"
