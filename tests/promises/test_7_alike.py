"""Promise 7: wrong name and wrong password answer alike, in equal time; throttling treats all names alike."""

import re
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.connections import Answer, Connection
from tests.servers import ROOT, HandClock, Server, worker, write_config

TRIES = 30
ROUNDS = 4
PROXIED = '[server]\ntrusted_proxies = ["127.0.0.1"]'


@pytest.fixture(scope="module")
def default_cost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a worker whose user has the password hash, and the cost of it, that tokenauth is shipped with."""
    shipped = tomllib.loads((ROOT / "config.toml").read_text())["users"][0]
    users = f"""[[users]]\nusername = "{shipped["username"]}"\npassword = "{shipped["password"]}"\n"""
    with worker(write_config(tmp_path_factory.mktemp("alike"), PROXIED, users)) as server:
        yield server


def attempt(connection: Connection, username: str, network: int) -> Answer:
    """Try a wrong password from a network of its own."""
    address = f"10.{network >> 8}.{network & 255}.1"
    wrong = {"username": username, "password": "not the password"}
    return connection.ask("POST", "/api/token", wrong, X_Forwarded_For=address)


def without_date(answer: Answer) -> Answer:
    """Leave out the one header that time changes."""
    return answer._replace(head=re.sub(rb"(?i)date: [^\r]*", b"date", answer.head))


def test_wrong_name_and_wrong_password_answer_alike_byte_for_byte(server: Server) -> None:
    with Connection(server.port) as connection:
        answers = {without_date(attempt(connection, name, 1)) for name in ("admin", "nobody", "ann", "ADMIN", "")}
    assert len(answers) == 1
    answer = answers.pop()
    assert (answer.status, answer.body) == (401, b"invalid credentials")


def test_wrong_name_and_wrong_password_answer_in_equal_time(default_cost: Server) -> None:
    """Interleaved, at the default cost; while medians differ by noise alone, more tries bring them together."""
    times: dict[str, list[float]] = {"admin": [], "nobody": []}
    with Connection(default_cost.port) as connection:
        for number in range(ROUNDS):
            for network in range(TRIES):
                for name, taken in times.items():
                    began = time.perf_counter()
                    assert attempt(connection, name, number * TRIES + network).status == 401
                    taken.append(time.perf_counter() - began)
            known, unknown = (median(taken) for taken in times.values())
            if 0.8 < known / unknown < 1.25:
                return
    raise AssertionError(f"a wrong password takes {known * 1000:.1f} ms, a wrong name {unknown * 1000:.1f} ms")


def test_throttling_treats_known_and_unknown_names_alike(tmp_path: Path) -> None:
    """The same tries at the same times: the same answers, and the same times to wait."""
    clock = HandClock(tmp_path / "clock", create=True)
    seen = []
    with worker(write_config(tmp_path, PROXIED), clock) as server, Connection(server.port) as connection:
        for number, name in enumerate(("ann", "nobody", "a name\twith\u00e9 oddities")):
            answers = []
            for _ in range(6):
                answers.append(without_date(attempt(connection, name, number)))
            for _ in range(5):
                clock.advance(int(answers[-1].headers.get("retry-after", 0)))
                answers.append(without_date(attempt(connection, name, number)))
                answers.append(without_date(attempt(connection, name, number)))
            seen.append(answers)
    assert [answer.status for answer in seen[0]] == [401] * 5 + [429] + [401, 429] * 5
    assert seen[0] == seen[1] == seen[2]


def test_a_flood_of_failures_for_a_name_holds_nobody_up_elsewhere(tmp_path: Path) -> None:
    """The owner of the name logs in from another network, and his tokens go on working."""
    with worker(write_config(tmp_path, PROXIED)) as server, Connection(server.port) as connection:
        token = connection.log_in()
        statuses = [attempt(connection, "admin", 1).status for _ in range(10)]
        assert statuses == [401] * 5 + [429] * 5
        assert connection.valid(token)
        assert connection.valid(connection.log_in())
