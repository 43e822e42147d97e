"""Clients that wait in line for leases while workers are killed and paused, and what must be true of their history.

Each client asks with an id of its own, and repeats the request, at any worker, until it is answered with leases. The
database says in which order the requests came and were granted.
"""

import json
import os
import signal
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from threading import Event, Lock
from time import monotonic, time
from typing import Any, NamedTuple

from tests.support.connections import Answer, Closed, Connection, NoAnswer, Refused
from tests.support.journal import until
from tests.support.pool_users import PASSWORDS
from tests.support.servers import Server, worker

LEASE_TTL = 2
POOLS = f"""
[pools.one]
capacity = 1
prefill = true
lease_ttl = {LEASE_TTL}
[pools.three]
capacity = 3
prefill = true
lease_ttl = {LEASE_TTL}
"""
CAPACITIES = {"one": 1, "three": 3}

_LONGEST_OUTAGE = 180
"""Seconds after which a client gives up: no fault of these tests lasts for so long."""

WAIT = 0.2
"""Seconds that a client waits for each answer."""

# The numbers are the order in which requests joined, and fences that in which they were granted: workers read their
# clocks before they get the lock, and one may be stopped in between.
ORDER = "SELECT id, since, leases FROM pool_requests WHERE pool = '{}' ORDER BY number"


class Held(NamedTuple):
    """A lease, from the answer until the earliest instant at which it can have ended."""

    request: str
    token: str
    fence: int
    start: float
    end: float


@dataclass
class Line:
    """The clients of a pool and their history."""

    pool: str
    ports: list[int]
    tokens: Sequence[str]
    chance: Random
    held: list[Held] = field(default_factory=list)
    told: dict[str, float] = field(default_factory=dict)
    """When a request was first told its place, by the clock of the system."""
    lost: list[str] = field(default_factory=list)
    asks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What became of each attempt to ask for a request."""
    over: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def job(self, id: str) -> None:
        """Wait for leases, hold them for a moment, and release them."""
        number = len(self.told) + len(self.held)
        count = 1 if self.pool == "one" else 1 + number % 3
        token = self.tokens[hash(id) % len(self.tokens)]
        sent, answer = self._lease(id, token, count)
        if answer.status == 409:
            assert answer.json()["error"] == "lease_lost", answer
            with self.lock:
                self.lost.append(id)
            return
        received, leases = monotonic(), answer.json()["leases"]
        assert len(leases) == count
        self.over.wait(self.chance.uniform(0, 0.03))
        release_sent = monotonic()
        with self.lock:
            self.held += [
                Held(id, each["token"], each["fence"], received, min(release_sent, sent + each["expires_in"]))
                for each in leases
            ]
        for each in leases:
            path = f"/api/pools/{self.pool}/leases/{each['token']}"
            released = self._until_answered("DELETE", path, {"fence": each["fence"]}, token)
            assert released.status in {204, 409, 403}, released  # 403: it is another user's by now

    def _lease(self, id: str, token: str, count: int) -> tuple[float, Answer]:
        terms = {"request": id, "wait": WAIT, "count": count}
        while True:
            sent = monotonic()
            answer = self._until_answered("POST", f"/api/pools/{self.pool}/leases", terms, token, self.asks[id])
            if answer.status != 202:
                assert answer.status in {201, 409}, answer
                return sent, answer
            with self.lock:
                self.told.setdefault(id, time())

    def _until_answered(
        self, method: str, path: str, document: object, token: str, asks: list[str] | None = None
    ) -> Answer:
        began = monotonic()
        while True:
            assert monotonic() < began + _LONGEST_OUTAGE, "only refused"
            sent = time()
            port = self.chance.choice(self.ports)
            try:
                with Connection(port, timeout=30) as connection:
                    answer = connection.ask(method, path, document, X_Token=token)
            except (Refused, NoAnswer, Closed) as error:
                if asks is not None:
                    asks.append(f"{sent:.3f} +{time() - sent:.3f} {port} {error!r}")
                self.over.wait(0.01)
                continue
            if asks is not None:
                asks.append(f"{sent:.3f} +{time() - sent:.3f} {port} {answer.status}")
            if answer.status != 503:
                return answer
            self.over.wait(0.05)


def check(line: Line, order: Sequence[tuple[str, float, str | None]], jobs: Sequence[str]) -> None:
    """Check that no promise was broken. `order` has the requests as they stand in the database."""
    by_token: dict[str, list[Held]] = defaultdict(list)
    for held in line.held:
        by_token[held.token].append(held)
    assert len(by_token) <= CAPACITIES[line.pool]
    for leases in by_token.values():
        leases.sort(key=lambda held: held.fence)
        for one, other in pairwise(leases):
            assert one.fence < other.fence, f"two requests have one lease: {one}, {other}"
            assert one.end <= other.start, f"two leases at once: {one}, {other}"
    served = {held.request for held in line.held}
    assert served | {*line.lost} == {*jobs}, "a place was lost"
    since = {id: at for id, at, _ in order}
    late = [id for id, at in line.told.items() if since[id] > at + 0.001]
    seen = [(id, f"since {since[id]:.3f}, told {line.told[id]:.3f}", line.asks[id]) for id in late]
    assert late == [], f"a place was lost, and got again at the end of the line: {seen}"
    if line.pool == "one":
        fences = [fence for _, _, leases in order if leases is not None for _, fence in json.loads(leases)]
        assert len(fences) == len(jobs)
        assert fences == sorted(fences), "someone was passed"


def all_can_be_leased(line: Line, token: str) -> bool:
    """Return whether all tokens can be leased together, and release them."""
    terms = {"count": CAPACITIES[line.pool], "wait": LEASE_TTL + 1}
    answer = line._until_answered("POST", f"/api/pools/{line.pool}/leases", terms, token)
    if answer.status != 201:
        return False
    for each in answer.json()["leases"]:
        line._until_answered("DELETE", f"/api/pools/{line.pool}/leases/{each['token']}", None, token)
    return True


class Workers:
    """Workers that are killed and paused. Their ports change."""

    def __init__(self, configs: Sequence[Path], stack: ExitStack) -> None:
        self._configs = configs
        self._stack = stack
        self.servers: list[Server] = [stack.enter_context(worker(config)) for config in configs]
        self.ports = [server.port for server in self.servers]
        self._pauses = 0

    def kill(self, number: int) -> None:
        """Kill a worker, and start another one."""
        self.servers[number].kill()
        self.servers[number] = self._stack.enter_context(worker(self._configs[number]))
        self.ports[number] = self.servers[number].port

    def pause(self, number: int, seconds: float, over: Event) -> None:
        """Stop a worker for a while: to others it looks dead."""
        self._pauses += 1
        os.kill(self.servers[number].process.pid, signal.SIGSTOP)
        over.wait(seconds)
        os.kill(self.servers[number].process.pid, signal.SIGCONT)

    def check_logs(self) -> None:
        """Check the errors. A worker that is stopped during a commit keeps SQLite locked: that is an outage for all."""
        for server in self.servers:
            outages = server.events("store_not_writable")
            assert outages == server.errors(), server.errors()
            assert len(outages) <= self._pauses, outages
            until(lambda: len(server.events("store_writable_again")) == len(outages), "the outages end")  # noqa: B023


def run_queue(
    configs: Sequence[Path],
    order: Callable[[str], Sequence[tuple[str, float, str | None]]],
    seed: int,
    clients: int,
    jobs: int,
    faults: int,
) -> Mapping[str, Line]:
    """Let clients of two pools wait for leases while workers fail, and check their histories.

    configs: one for each worker. order: the requests of a pool, from the database, in their order.
    """
    chance = Random(seed)
    with ExitStack() as stack:
        workers = Workers(configs, stack)
        tokens = []
        with Connection(workers.ports[0]) as connection:
            tokens = [connection.log_in(name, password) for name, password in PASSWORDS.items()]
        lines = {pool: Line(pool, workers.ports, tokens, Random(seed)) for pool in CAPACITIES}
        with ThreadPoolExecutor(2 * clients) as threads:
            running = [
                threads.submit(_work, line, [f"{client}-{number}" for number in range(jobs)])
                for line in lines.values()
                for client in range(clients)
            ]
            try:
                for fault in range(faults):
                    served = len(lines["one"].held)
                    until(lambda: len(lines["one"].held) > served + jobs // 2, "clients are served")  # noqa: B023
                    number = chance.randrange(len(configs))
                    if fault % 2:
                        workers.pause(number, chance.uniform(0.5, LEASE_TTL * 1.5), lines["one"].over)
                    else:
                        workers.kill(number)
                for each in running:
                    each.result()
            finally:
                for line in lines.values():
                    line.over.set()
        names = [f"{client}-{number}" for client in range(clients) for number in range(jobs)]
        for pool, line in lines.items():
            check(line, order(pool), names)
            assert all_can_be_leased(line, tokens[0]), f"a token of {pool} is out of use"
            assert len(line.lost) <= faults * clients
        workers.check_logs()
    return lines


def _work(line: Line, ids: Sequence[str]) -> None:
    for id in ids:
        line.job(id)


def sqlite_order(file: Path) -> Callable[[str], Sequence[tuple[str, float, str | None]]]:
    """Return how to read the order of a pool's requests from a SQLite file."""

    def order(pool: str) -> list[Any]:
        with closing(sqlite3.connect(file)) as db:
            return db.execute(ORDER.format(pool)).fetchall()

    return order
