"""Three machines, each with etcd, Patroni and PostgreSQL, that run on loopback with the files of docs/scaling.md.

Patroni reaches etcd through TCP proxies, which a test can cut. All files are in one directory in memory, and all
processes end when the test does, or is killed.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from tests.support.journal import until
from tests.support.ports import free_port
from tests.support.postgres import directory_for
from tests.support.postgres_programs import give, identity
from tests.support.servers import ROOT
from tests.support.skipping import skip_without
from tests.support.tcp_proxy import Proxy

DOCUMENT = ROOT / "docs" / "scaling.md"

NAMES = ("db1", "db2", "db3")

PASSWORD = "choose-a-third"
"""The password of the role `tokenauth`."""

_POSTGRES_PASSWORD = "choose-one"

# At end of file without a line, the process that started this has ended without cleaning up. Patroni ends first: it
# would start PostgreSQL again.
_WATCH = """
read -r line && exit
for file in "$1"/*/patroni.pid "$1"/*/etcd.pid "$1"/*/*/postmaster.pid; do
    test -e "$file" && kill -KILL "$(head -n 1 "$file")"
done
rm -rf "$1"
"""


@cache
def documented() -> Mapping[str, str]:
    """Return the files that the document shows, by their path, which is written before each."""
    found = re.findall(r"^`(/[^`]+)`[^\n]*:\n\n```\w*\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == len(dict(found))
    return dict(found)


def replaced(path: str, values: Mapping[str, object]) -> str:
    """Return a file of the document with other addresses and paths. Each must be in it."""
    text = documented()[path]
    for old, new in values.items():
        assert old in text, f"{old} is no longer in {path}"
        text = text.replace(old, str(new))
    return text


def _program(name: str, package: str) -> str:
    return shutil.which(name) or skip_without(name, f"apt-get install {package}")


def _postgresql() -> Path:
    """Return the directory of Debian's PostgreSQL, with which Patroni was packaged."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else skip_without("Debian's PostgreSQL", "apt-get install postgresql")


class Ports(NamedTuple):
    """The ports of one machine."""

    postgres: int
    rest: int
    etcd: int
    peers: int


class Machine:
    """One machine. `links` are the ways from its Patroni to each etcd."""

    def __init__(self, name: str, directory: Path, ports: Ports, links: Sequence[Proxy]) -> None:
        self.name = name
        self.directory = directory
        self.ports = ports
        self.links = links
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def log(self) -> str:
        """What Patroni and PostgreSQL have logged."""
        return (self.directory / "patroni.log").read_text(errors="replace")

    def start(self, program: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with (self.directory / f"{program}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env={"PATH": os.environ["PATH"], "HOME": str(self.directory), "TZ": "UTC", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **identity(),
            )
        self._processes[program] = process
        (self.directory / f"{program}.pid").write_text(f"{process.pid}\n")

    def start_patroni(self) -> None:
        """Start Patroni, which starts PostgreSQL."""
        self.start("patroni", [_program("patroni", "patroni"), str(self.directory / "patroni.yml")], {})

    def stop_patroni(self) -> None:
        """Stop Patroni, which stops PostgreSQL."""
        self._end("patroni", signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to Patroni, PostgreSQL and their children, the parents first."""
        postmaster = self.directory / "data" / "postmaster.pid"
        pids = [self._processes["patroni"].pid] if "patroni" in self._processes else []
        with suppress(FileNotFoundError):
            pids.append(int(postmaster.read_text().split("\n", 1)[0]))
        for pid in pids:
            for one in _family(pid):
                with suppress(ProcessLookupError):
                    os.kill(one, number)

    def kill(self) -> None:
        """Kill Patroni and PostgreSQL, as if the machine had lost its power, except that connections are reset."""
        self.send(signal.SIGKILL)
        self._end("patroni", signal.SIGKILL)

    def kill_patroni(self) -> None:
        """Kill Patroni alone."""
        self._end("patroni", signal.SIGKILL)

    def kill_postgres(self) -> None:
        """Kill PostgreSQL alone."""
        postmaster = int((self.directory / "data" / "postmaster.pid").read_text().split("\n", 1)[0])
        for one in list(_family(postmaster)):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)

    def cut(self) -> None:
        """Cut Patroni off from etcd."""
        for link in self.links:
            link.cut()

    def heal(self) -> None:
        for link in self.links:
            link.heal()

    def close(self) -> None:
        self.kill()
        self._end("etcd", signal.SIGKILL)

    def _end(self, program: str, number: signal.Signals) -> None:
        process = self._processes.pop(program, None)
        if process is not None:
            process.send_signal(number)
            process.wait(60)
            (self.directory / f"{program}.pid").unlink()

    def promotions(self) -> list[float]:
        """Return when this PostgreSQL became the primary, each time, in seconds of the monotonic clock."""
        found = []
        behind = time.time() - time.monotonic()
        promoted = False
        for line in self.log.splitlines():
            if "selected new timeline ID" in line:
                promoted = True
            elif promoted and "database system is ready to accept connections" in line:
                promoted = False
                day, hour, zone, *_ = line.split()
                assert zone.endswith("UTC"), line
                found.append(datetime.fromisoformat(f"{day} {hour}+00:00").timestamp() - behind)
        return found

    def state(self) -> Mapping[str, Any]:
        """Return what Patroni says of itself; nothing if it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports.rest}/patroni", timeout=2) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))
        except OSError:
            return {}


def _family(pid: int) -> Iterator[int]:
    """Return a process and its descendants."""
    yield pid
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


class Machines(tuple[Machine, ...]):
    """The three machines."""

    def named(self, name: str) -> Machine:
        return next(machine for machine in self if machine.name == name)

    def cluster(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the members as Patroni of any machine shows them, by their name."""
        for machine in self:
            address = f"http://127.0.0.1:{machine.ports.rest}/cluster"
            with suppress(OSError), urllib.request.urlopen(address, timeout=2) as answer:
                return {member["name"]: member for member in json.load(answer)["members"]}
        return {}

    def with_role(self, *roles: str) -> list[Machine]:
        """Return the machines that run in one of these roles: leader, sync_standby, replica."""
        members = self.cluster()
        running = {name for name, member in members.items() if member["state"] in {"running", "streaming"}}
        return [machine for machine in self if machine.name in running and members[machine.name]["role"] in roles]

    @property
    def primary(self) -> Machine:
        until(lambda: len(self.with_role("leader")) == 1, "there is one primary")
        return self.with_role("leader")[0]

    @property
    def standby(self) -> Machine:
        """The synchronous standby."""
        until(lambda: len(self.with_role("sync_standby")) == 1, "there is one synchronous standby")
        return self.with_role("sync_standby")[0]

    def settled(self, count: int = 3) -> bool:
        """Return whether this number of machines run: one is the primary, and one the synchronous standby."""
        leaders, synchronous = self.with_role("leader"), self.with_role("sync_standby")
        running = self.with_role("leader", "sync_standby", "replica")
        return (len(leaders), len(synchronous)) == (1, 1) and len(running) >= count

    def settle(self, count: int = 3) -> None:
        until(lambda: self.settled(count), f"{count} machines replicate", 120)

    def promotions(self) -> list[float]:
        return sorted(at for machine in self for at in machine.promotions())

    def control(self, *arguments: str) -> None:
        """Run patronictl, as on the first machine."""
        command = [_program("patronictl", "patroni"), "-c", str(self[0].directory / "patroni.yml"), *arguments]
        done = subprocess.run(
            command, check=False, cwd=self[0].directory, capture_output=True, text=True, timeout=60, **identity()
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def execute(self, machine: Machine, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser."""
        return asyncio.run(_fetch(machine.ports.postgres, sql, database))

    def hosts(self) -> Sequence[int]:
        return [machine.ports.postgres for machine in self]


async def _fetch(port: int, sql: str, database: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(
        host="127.0.0.1", port=port, user="postgres", password=_POSTGRES_PASSWORD, database=database, timeout=20
    )
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


@contextmanager
def machines() -> Iterator[Machines]:
    """Run three machines until one of them is the primary and the others replicate it."""
    etcd, programs = _program("etcd", "etcd-server"), _postgresql()
    _program("patroni", "patroni")
    directory = directory_for("tokenauth-failover-", in_memory=True)
    watch = subprocess.Popen(
        ["sh", "-c", _WATCH, "watch", directory],
        cwd="/",
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with ExitStack() as stack:
            made = [stack.enter_context(_machine(name, directory)) for name in NAMES]
            for machine in made:
                machine.start("etcd", [etcd], _etcd_environment(machine, made))
            until(lambda: all(map(_etcd_is_ready, made)), "etcd has a leader")
            for machine in made:
                machine.links = [stack.enter_context(Proxy(other.ports.etcd)) for other in made]
                _write_patroni(machine, programs)
                machine.start_patroni()
            running = Machines(made)
            try:
                running.settle()
                primary = running.primary
                running.execute(primary, f"CREATE ROLE tokenauth LOGIN PASSWORD '{PASSWORD}'")
                running.execute(primary, "CREATE DATABASE tokenauth OWNER tokenauth ENCODING 'UTF8' TEMPLATE template0")
                running.execute(primary, "REVOKE ALL ON DATABASE tokenauth FROM PUBLIC")
                yield running
            except BaseException:
                for machine in made:
                    print(f"== {machine.name}", machine.log[-6000:], sep="\n")
                raise
    finally:
        watch.communicate(b"\n")
        shutil.rmtree(directory)


@contextmanager
def _machine(name: str, directory: Path) -> Iterator[Machine]:
    own = directory / name
    own.mkdir()
    give(own)
    machine = Machine(name, own, Ports(*(free_port() for _ in Ports._fields)), [])
    try:
        yield machine
    finally:
        machine.close()


def _etcd_is_ready(machine: Machine) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{machine.ports.etcd}/health", timeout=2) as answer:
            return bool(json.load(answer) == {"health": "true"})
    except OSError:
        return False


def _etcd_environment(machine: Machine, every: Sequence[Machine]) -> Mapping[str, str]:
    peers = ",".join(f"{one.name}=http://127.0.0.1:{one.ports.peers}" for one in every)
    text = replaced(
        "/etc/default/etcd",
        {
            "db1=http://10.0.0.1:2380,db2=http://10.0.0.2:2380,db3=http://10.0.0.3:2380": peers,
            'ETCD_NAME="db1"': f'ETCD_NAME="{machine.name}"',
            "http://10.0.0.1:2380": f"http://127.0.0.1:{machine.ports.peers}",
            "http://10.0.0.1:2379": f"http://127.0.0.1:{machine.ports.etcd}",
            "/var/lib/etcd/tokenauth": machine.directory / "etcd",
        },
    )
    return dict(re.findall(r'^(ETCD_\w+)="(.*)"$', text, re.MULTILINE))


def _write_patroni(machine: Machine, programs: Path) -> None:
    links = ",".join(f"127.0.0.1:{link.port}" for link in machine.links)
    text = replaced(
        "/etc/patroni/config.yml",
        {
            # Otherwise Patroni would ask etcd for the addresses, and pass by the proxies.
            "hosts: 10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379": f"hosts: {links}\n  use_proxies: true",
            "name: db1": f"name: {machine.name}",
            "10.0.0.1:8008": f"127.0.0.1:{machine.ports.rest}",
            "10.0.0.1:5432": f"127.0.0.1:{machine.ports.postgres}",
            "10.0.0.0/24": "127.0.0.1/32",
            "/var/lib/postgresql/15/main": machine.directory / "data",
            "/var/lib/postgresql/.pgpass_patroni": machine.directory / "pgpass",
            "/usr/lib/postgresql/15/bin": programs,
            "/var/run/postgresql": machine.directory,
        },
    )
    file = machine.directory / "patroni.yml"
    file.write_text(text)
    file.chmod(0o600)
    give(file)
