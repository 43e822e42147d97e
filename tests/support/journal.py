"""Clients that keep a journal of what was answered, and what else tests of promises share."""

import random
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from tests.support.connections import Closed, Connection, NoAnswer, Refused, takes_connections
from tests.support.servers import HandClock, Server, serve, starting


@dataclass
class Journal:
    """What one client has asked for and what of it was answered."""

    issued: dict[str, str] = field(default_factory=dict)
    """Each token that was received: "live", "ending" (a revocation was sent) or "ended" (it was answered)."""
    unanswered: int = 0
    """Logins that were sent and not answered."""
    lies: list[str] = field(default_factory=list)
    """Answers that contradict earlier ones."""

    def check(self, valid: Callable[[str], bool]) -> dict[str, bool]:
        """Hold a server to what was answered; return how it judges each token."""
        judged = {token: valid(token) for token in self.issued}
        assert not self.lies, self.lies
        for token, state in self.issued.items():
            assert state == "ending" or judged[token] is (state == "live"), f"{state}, but valid is {judged[token]}"
        return judged


class Client(threading.Thread):
    """Logs in, probes and logs out at random until it is stopped or cut off, and records the answers."""

    def __init__(self, ports: Sequence[int], journal: Journal, seed: int) -> None:
        super().__init__(daemon=True)
        self._ports = ports
        self._journal = journal
        self._random = random.Random(seed)
        self.stopping = threading.Event()
        self.trouble: BaseException | None = None

    def run(self) -> None:
        """Work with every server in turn, each over a connection of its own."""
        try:
            with ExitStack() as stack:
                connections = [stack.enter_context(Connection(port)) for port in self._ports]
                while not self.stopping.is_set():
                    self._step(self._random.choice(connections))
        except (Refused, Closed, NoAnswer):
            pass  # that is how a killed server ends a connection
        except BaseException as error:
            self.trouble = error

    def finish(self) -> None:
        """Stop; raise what went wrong."""
        self.stopping.set()
        self.join(30)
        assert not self.is_alive(), "a client hangs"
        if self.trouble is not None:
            raise self.trouble

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
            journal.lies.append(f"{journal.issued[token]} token judged otherwise")


def run_clients(ports: Sequence[int], journals: Sequence[Journal], seed: int) -> list[Client]:
    """Start one client for each journal."""
    clients = [Client(ports, journal, seed * 1000 + number) for number, journal in enumerate(journals)]
    for client in clients:
        client.start()
    return clients


@contextmanager
def workers(config: Path, clock: HandClock | None, count: int) -> Iterator[list[Server]]:
    """Start several workers at once on one database."""
    with ExitStack() as stack:
        servers = [stack.enter_context(starting(config, clock)) for _ in range(count)]
        for server in servers:
            server.port = server.wait("test_worker_ready", 60)["port"]
        yield servers


def check_file(database: Path, journals: Sequence[Journal]) -> None:
    """Check a database file against the journals: it is intact and has no unrequested row."""
    with sqlite3.connect(database) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = db.execute("SELECT count(*) FROM tokens").fetchone()[0]
    db.close()
    live = sum(state == "live" for journal in journals for state in journal.issued.values())
    possible = sum(sum(state != "ended" for state in one.issued.values()) + one.unanswered for one in journals)
    assert live <= rows <= possible


@contextmanager
def background(work: Callable[[], object], count: int = 1) -> Iterator[None]:
    """Repeat some work in threads of its own; raise at the end what went wrong in it."""
    stopping = threading.Event()
    troubles: list[BaseException] = []

    def repeat() -> None:
        try:
            while not stopping.is_set():
                work()
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=repeat, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
    if troubles:
        raise troubles[0]


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds; fail if it takes too long."""
    deadline = threading.Event()
    timer = threading.Timer(seconds, deadline.set)
    timer.start()
    try:
        while not condition():
            assert not deadline.wait(0.02), f"not within {seconds:g} seconds: {what}"
    finally:
        timer.cancel()


@contextmanager
def locked(database: Path, kind: str = "EXCLUSIVE") -> Iterator[sqlite3.Connection]:
    """Have a transaction open, as another program on the machine could; EXCLUSIVE and IMMEDIATE hold the write lock."""
    db = sqlite3.connect(database, isolation_level=None)
    db.execute(f"BEGIN {kind}")
    try:
        yield db
    finally:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        db.close()


def kill_in_a_loop(config: Path, rounds: int, clients: int, seed: int = 1) -> list[Journal]:
    """Kill two busy workers at random times, repeatedly; what was answered is still true after each kill.

    In every third round one of them is killed earlier than the other, and the clients' requests fail halfway.
    """
    chance = random.Random(seed)
    past: list[Journal] = []
    journals: list[Journal] = []
    for number in range(rounds):
        with workers(config, None, 2) as servers:
            judge(servers, journals)
            past += journals
            journals = [Journal() for _ in range(clients)]
            running = run_clients([server.port for server in servers], journals, seed + number)
            enough = chance.randint(clients, clients * 25)
            until(lambda: sum(len(one.issued) for one in journals) >= enough, "the clients got tokens")  # noqa: B023
            chance.shuffle(servers)
            servers[0].kill()
            if number % 3 == 2:
                for client in running:
                    client.join(30)
            servers[1].kill()
            for client in running:
                client.finish()
    past += journals
    verdicts = []
    for _ in range(2):
        with workers(config, None, 1) as servers:
            verdicts.append(judge(servers, past))
            servers[0].kill()
    assert verdicts[0] == verdicts[1], "a second restart judges otherwise than the first"
    check_file(config.with_name("tokenauth.db"), past)
    return past


def judge(servers: Sequence[Server], journals: Sequence[Journal]) -> list[dict[str, bool]]:
    """Hold every one of some servers to the journals; return how the last of them judges each token."""
    verdict: list[dict[str, bool]] = []
    for server in servers:
        with Connection(server.port) as connection:
            verdict = [journal.check(connection.valid) for journal in journals]
    return verdict


@contextmanager
def serving(config: Path, *arguments: str) -> Iterator[Server]:
    """Run `tokenauth serve` until it takes connections: a worker logs that it has started just before it listens."""
    with serve(config, *arguments) as server:
        until(lambda: takes_connections(server.port), "the server takes connections")
        yield server


def start_together(config: Path, count: int) -> None:
    """Start many workers at the same moment on a database that is not there; each serves, and all agree."""
    with workers(config, None, count) as servers:
        tokens = []
        for server in servers:
            with Connection(server.port) as connection:
                tokens.append(connection.log_in())
        for server in servers:
            with Connection(server.port) as connection:
                assert connection.ask("GET", "/readyz").status == 200
                assert all(map(connection.valid, tokens))
        upgrades = [event for server in servers for event in server.events("schema_upgraded")]
        assert len(upgrades) == 1, "the schema was made once"
        troubles = [event for server in servers for event in server.events() if event["level"] in {"error", "critical"}]
        assert not troubles


def fill(database: Path, rows: int, users: int, issued_at: float, expires_at: Callable[[int], int]) -> None:
    """Put tokens, of as many users as wanted, into a database that a server has made and left."""
    with closing(sqlite3.connect(database)) as db, db:
        db.executemany(
            "INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent)"
            " VALUES (?, ?, 'c', ?, ?, '127.0.0.1', 'test')",
            (
                (sha256(b"%d" % number).digest(), f"user{number % users}", issued_at, expires_at(number))
                for number in range(rows)
            ),
        )
