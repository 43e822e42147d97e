"""Promise 7: wrong name and wrong password answer alike, in equal time; throttling treats all names alike."""

import re
import tomllib
from pathlib import Path

import pytest
from passlib.hash import argon2, bcrypt, scrypt

from tests.support import servers
from tests.support.connections import Answer, Connection
from tests.support.servers import HandClock, Server, write_config
from tests.support.steps import calls_of_threads, hashes, without_values
from tokenauth.credentials import Candidate
from tokenauth.errors import InvalidCredentials
from tokenauth.service import create_service
from tokenauth.settings import loader

PROXIED = '[server]\ntrusted_proxies = ["127.0.0.1"]'


@pytest.fixture(scope="module")
def settings() -> str:
    """Trust this machine's X-Forwarded-For."""
    return PROXIED


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Expire all failed logins, so that tests do not affect each other."""
    clock.advance(25 * 3600)


def shipped() -> tuple[str, str]:
    """Return the name and the password hash of the user in the shipped configuration."""
    user = tomllib.loads(servers.shipped())["users"][0]
    return user["username"], user["password"]


def with_default_cost(directory: Path) -> Path:
    """Write a configuration with the default password cost."""
    name, hashed = shipped()
    risk = 'accept_risks = ["shipped_password"]'
    return write_config(directory, f"{PROXIED}\n{risk}", f'[[users]]\nusername = "{name}"\npassword = "{hashed}"\n')


def attempt(connection: Connection, username: str, network: int) -> Answer:
    """Try a wrong password from network number `network`. Each of the first 256 is in a region of its own."""
    address = f"10.{network & 255}.{network >> 8}.1"
    wrong = {"username": username, "password": "not the password"}
    return connection.ask("POST", "/api/token", wrong, X_Forwarded_For=address)


def without_date(answer: Answer) -> Answer:
    """Remove the only header that depends on the time."""
    return answer._replace(head=re.sub(rb"(?i)date: [^\r]*", b"date", answer.head))


def test_wrong_name_and_password_get_identical_answers(server: Server) -> None:
    with Connection(server.port) as connection:
        answers = {without_date(attempt(connection, name, 1)) for name in ("admin", "unknown", "ann", "ADMIN", "")}
    assert len(answers) == 1
    answer = answers.pop()
    assert (answer.status, answer.body) == (401, b"invalid credentials")


async def test_wrong_name_and_wrong_password_cost_the_same_hash(tmp_path: Path) -> None:
    """One hash each, at the default cost. `tests/system/faults/test_alike.py` measures the time."""
    known, hashed = shipped()
    service = create_service(loader.load(with_default_cost(tmp_path)))
    costs = []
    with calls_of_threads() as calls:
        async with service.running():
            for name in (known, "unknown", "a name with \u00e9", ""):
                calls.clear()
                with pytest.raises(InvalidCredentials):
                    await service.tokens.issue(name, "not the password", "10.0.0.1", "")
                costs.append(hashes(calls))
    assert costs == [[without_values(hashed)]] * 4


async def test_unknown_names_cost_what_users_do_in_any_scheme(tmp_path: Path) -> None:
    """Also if the header can be decoded in two ways. `tests/unit/test_password_work.py` tests each scheme and cost."""
    cheap = [bcrypt.using(rounds=4), scrypt.using(rounds=4), argon2.using(memory_cost=8, time_cost=1, parallelism=1)]
    users = "".join(
        f'[[users]]\nusername = "user {number}"\npassword = "{each.hash("x")}"\n' for number, each in enumerate(cheap)
    )
    service = create_service(loader.load(write_config(tmp_path, PROXIED, users)))
    known: list[list[str]] = []
    unknown: list[list[str]] = []
    with calls_of_threads() as calls:
        async with service.running():
            for number in range(20):
                for names, seen in ((["user {}", "user+{}"], known), (["unknown {}", "unknown+{}"], unknown)):
                    candidates = [
                        Candidate(name.format(number % 3 if seen is known else number), "wrong") for name in names
                    ]
                    calls.clear()
                    with pytest.raises(InvalidCredentials):
                        await service.credentials.verify_cached(candidates, f"10.0.{number}.1")
                    seen.append(hashes(calls))
    assert {len(works) for works in (*known, *unknown)} == {2}
    costs = {works[0] for works in known}
    assert len(costs) == 3
    assert {cost for works in unknown for cost in works} == costs


def test_throttling_treats_known_and_unknown_names_alike(server: Server, clock: HandClock) -> None:
    """The same attempts at the same times get the same answers and the same Retry-After."""
    seen = []
    with Connection(server.port) as connection:
        for number, name in enumerate(("ann", "unknown", "a name\twith\u00e9 oddities")):
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


def test_failures_for_a_name_slow_no_other_client(server: Server) -> None:
    """The owner of the name can log in from another network, and their tokens stay valid."""
    with Connection(server.port) as connection:
        token = connection.log_in()
        statuses = [attempt(connection, "admin", 1).status for _ in range(10)]
        assert statuses == [401] * 5 + [429] * 5
        assert connection.valid(token)
        assert connection.valid(connection.log_in())
