"""Clients that record the answers that they get, and other helpers of the promise tests."""

import random
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import TypeVar

from tests.support.connections import TIMEOUT, Closed, Connection, NoAnswer, Refused, takes_connections
from tests.support.servers import LONGEST_STEP, HandClock, Server, serve, starting

T = TypeVar("T")


@dataclass
class Journal:
    """The requests of one client and their answers."""

    issued: dict[str, str] = field(default_factory=dict)
    """The state of each token: "live", "ending" (its revocation was sent) or "ended" (its revocation was answered)."""
    unanswered: int = 0
    """Logins that were sent but not answered."""
    contradictions: list[str] = field(default_factory=list)
    """Answers that contradict earlier ones."""

    def check(self, valid: Callable[[str], bool]) -> dict[str, bool]:
        """Check that a server agrees with the answers so far. Return whether it accepts each token."""
        accepts = {token: valid(token) for token in self.issued}
        assert not self.contradictions, self.contradictions
        for token, state in self.issued.items():
            assert state == "ending" or accepts[token] is (state == "live"), f"{state}, but valid is {accepts[token]}"
        return accepts


class Client(threading.Thread):
    """Logs in, probes and logs out at random, and records the answers, until it is stopped or disconnected."""

    def __init__(self, ports: Sequence[int], journal: Journal, seed: int) -> None:
        super().__init__(daemon=True)
        self._ports = ports
        self._journal = journal
        self._random = random.Random(seed)
        self.stopping = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Send requests to random servers, over one connection to each."""
        try:
            with ExitStack() as stack:
                connections = [stack.enter_context(Connection(port)) for port in self._ports]
                while not self.stopping.is_set():
                    self._step(self._random.choice(connections))
        except (Refused, Closed, NoAnswer):
            pass  # the server was killed
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        """Stop. Raises the error of the client, if any."""
        self.stopping.set()
        self.join(TIMEOUT)
        assert not self.is_alive(), "a client hangs"
        if self.error is not None:
            raise self.error

    def _step(self, connection: Connection) -> None:
        journal = self._journal
        choice = self._random.random()
        if choice < 0.5 or not journal.issued:
            journal.unanswered += 1
            token = connection.log_in()
            journal.unanswered -= 1
            journal.issued[token] = "live"
            return
        token = self._random.choice(list(journal.issued)[-50:])
        if choice < 0.75:
            if journal.issued[token] == "live":
                journal.issued[token] = "ending"
            connection.log_out(token)
            journal.issued[token] = "ended"
        elif journal.issued[token] != "ending" and connection.valid(token) is not (journal.issued[token] == "live"):
            journal.contradictions.append(f"wrong answer for a token that is {journal.issued[token]}")


def run_clients(ports: Sequence[int], journals: Sequence[Journal], seed: int) -> list[Client]:
    """Start one client for each journal."""
    clients = [Client(ports, journal, seed * 1000 + number) for number, journal in enumerate(journals)]
    for client in clients:
        client.start()
    return clients


@contextmanager
def workers(config: Path, clock: HandClock | None, count: int) -> Iterator[list[Server]]:
    """Start several workers at the same time on one database."""
    with ExitStack() as stack:
        servers = [stack.enter_context(starting(config, clock)) for _ in range(count)]
        for server in servers:
            server.port = server.wait("test_worker_ready", 60)["port"]
        yield servers


def check_file(database: Path, journals: Sequence[Journal]) -> None:
    """Check that a database is intact, and that its number of tokens agrees with the journals."""
    with sqlite3.connect(database) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = db.execute("SELECT count(*) FROM tokens").fetchone()[0]
    db.close()
    live = sum(state == "live" for journal in journals for state in journal.issued.values())
    possible = sum(sum(state != "ended" for state in one.issued.values()) + one.unanswered for one in journals)
    assert live <= rows <= possible


@contextmanager
def background(work: Callable[[], object], count: int = 1) -> Iterator[None]:
    """Repeat some work in threads. Raises the first error of the work at the end."""
    stopping = threading.Event()
    errors: list[BaseException] = []

    def repeat() -> None:
        try:
            while not stopping.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join(TIMEOUT)
    if errors:
        raise errors[0]


def until(condition: Callable[[], T | None], what: str, seconds: float = 60) -> T:
    """Wait until the condition is true, and return its value. Fails after `seconds`, with `what` in its message."""
    waited, before = 0.0, monotonic()
    pause = threading.Event()
    while not (found := condition()):
        pause.wait(0.02)
        now = monotonic()
        waited, before = waited + min(now - before, LONGEST_STEP), now
        assert waited < seconds, f"not within {seconds:g} seconds: {what}"
    return found


@contextmanager
def locked(database: Path, kind: str = "EXCLUSIVE") -> Iterator[sqlite3.Connection]:
    """Keep a transaction open, as another program could. EXCLUSIVE and IMMEDIATE hold the write lock."""
    db = sqlite3.connect(database, isolation_level=None)
    db.execute(f"BEGIN {kind}")
    try:
        yield db
    finally:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        db.close()


def kill_in_a_loop(config: Path, rounds: int, clients: int, seed: int = 1) -> list[Journal]:
    """Kill two busy workers at random times, several times. After each time all answers so far must hold.

    In every third round one worker is killed before the other, so that the clients' requests fail halfway.
    """
    chance = random.Random(seed)
    past: list[Journal] = []
    journals: list[Journal] = []
    for number in range(rounds):
        with workers(config, None, 2) as servers:
            check_servers(servers, journals)
            past += journals
            journals = [Journal() for _ in range(clients)]
            running = run_clients([server.port for server in servers], journals, seed + number)
            enough = chance.randint(clients, clients * 25)
            until(lambda: sum(len(one.issued) for one in journals) >= enough, "the clients have tokens")  # noqa: B023
            chance.shuffle(servers)
            servers[0].kill()
            if number % 3 == 2:
                for client in running:
                    client.join(TIMEOUT)
            servers[1].kill()
            for client in running:
                client.finish()
    past += journals
    verdicts = []
    for _ in range(2):
        with workers(config, None, 1) as servers:
            verdicts.append(check_servers(servers, past))
            servers[0].kill()
    assert verdicts[0] == verdicts[1], "two restarts disagree about a token"
    check_file(config.with_name("tokenauth.db"), past)
    return past


def check_servers(servers: Sequence[Server], journals: Sequence[Journal]) -> list[dict[str, bool]]:
    """Check each server against the journals. Return whether the last one accepts each token."""
    verdict: list[dict[str, bool]] = []
    for server in servers:
        with Connection(server.port) as connection:
            verdict = [journal.check(connection.valid) for journal in journals]
    return verdict


@contextmanager
def serving(config: Path, *arguments: str) -> Iterator[Server]:
    """Run `tokenauth serve`, and wait for connections: a worker logs its start just before it listens."""
    with serve(config, *arguments) as server:
        until(lambda: takes_connections(server.port), "the server accepts connections")
        yield server


def start_together(config: Path, count: int) -> None:
    """Start many workers at the same time without a database. Each must serve, and all must agree."""
    with workers(config, None, count) as servers:
        tokens = []
        for server in servers:
            with Connection(server.port) as connection:
                tokens.append(connection.log_in())
        for server in servers:
            with Connection(server.port) as connection:
                assert connection.ask("GET", "/readyz").status == 200
                assert all(map(connection.valid, tokens))
        created = [event for server in servers for event in server.events("database_created")]
        assert len(created) == 1, "the schema must be created once"
        errors = [event for server in servers for event in server.events() if event["level"] in {"error", "critical"}]
        assert not errors


def fill(database: Path, rows: int, users: int, issued_at: float, expires_at: Callable[[int], int]) -> None:
    """Insert tokens of `users` users into a database that no server uses."""
    with closing(sqlite3.connect(database)) as db, db:
        db.executemany(
            "INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent)"
            " VALUES (?, ?, 'c', ?, ?, '127.0.0.1', 'test')",
            (
                (sha256(b"%d" % number).digest(), f"user{number % users}", issued_at, expires_at(number))
                for number in range(rows)
            ),
        )
