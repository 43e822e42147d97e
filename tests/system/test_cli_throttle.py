"""`tokenauth throttle`, beside a running server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from tests.support.auditing import read_audit
from tests.support.journal import until
from tests.support.servers import Server, serve, write_config
from tests.support.skipping import skip_without
from tests.system.test_cli import mistake, output, recorded, run

SETTINGS = """
[server]
trusted_proxies = ["127.0.0.1"]
[throttle]
free = 5
network_free = 20
delay = "10m"
[audit]
file = "{directory}/audit.jsonl"
"""
HOME = "203.0.113.7"
TYPED = "hunter2-is-my-password"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serve(write_config(tmp_path, SETTINGS.format(directory=tmp_path)), "--workers", "2") as running:
        yield running


@pytest.fixture
def home(server: Server) -> Path:
    return server.log.parent


def log_in(server: Server, name: str, address: str = HOME, password: str = "wrong") -> int:
    with server.client() as client:
        body = {"username": name, "password": password}
        return client.post("/api/token", json=body, headers={"X-Forwarded-For": address}).status_code


def throttle(server: Server, name: str, address: str = HOME) -> None:
    """Fail until an attempt is refused: each of two workers lets through one more, at most."""
    assert any(log_in(server, name, address) == httpx.codes.TOO_MANY_REQUESTS for _ in range(30))


def listed(home: Path) -> list[dict[str, Any]]:
    return list(json.loads(output(run(home, "throttle", "list", "--json")))["throttled"])


def test_a_throttled_user_is_listed_and_cleared(server: Server, home: Path) -> None:
    assert output(run(home, "throttle", "list")) == "No throttled logins.\n"
    for address in (HOME, "198.51.100.7"):
        throttle(server, "ann", address)
    throttle(server, "bob")
    throttle(server, TYPED)
    until(lambda: len(listed(home)) == 4, "the workers have reported")
    found = listed(home)
    assert {(each["kind"], each["user"], each["address"]) for each in found} == {
        ("user", "ann", HOME), ("user", "ann", "198.51.100.7"), ("user", "bob", HOME),
        ("unknown", None, "203.0.113.0/24"),
    }  # fmt: skip
    assert {each["failures"] for each in found} == {5}
    heading, *rows = output(run(home, "throttle", "list")).splitlines()
    assert heading.split() == ["who", "address", "failures", "wait", "ends"]
    assert sorted(row.split()[0] for row in rows) == ["(unknown", "ann", "ann", "bob"]
    assert all(re.search(r" in ([5-9]|10)m$", row) for row in rows), rows
    assert TYPED not in output(run(home, "throttle", "list", "--json"))

    done = run(home, "throttle", "clear", "ANN")
    assert sorted(output(done).splitlines()) == [
        f"ann can log in from {each} again." for each in ("198.51.100.7", HOME)
    ]
    events = sorted(recorded(done), key=str)
    assert events == [
        {"event": "throttle_cleared", "user": "ann", "addresses": network}
        for network in ("198.51.100.0/24", "203.0.113.0/24")
    ]
    assert log_in(server, "ann", password="ann-secret") == 200
    assert log_in(server, "bob", password="bob-secret") == 429
    assert output(run(home, "throttle", "clear", "bob", "--from", HOME)) == f"bob can log in from {HOME} again.\n"
    assert log_in(server, "bob", password="bob-secret") == 200
    acts = [act for act in read_audit(home / "audit.jsonl") if act["action"] == "clear_throttle"]
    assert [(act["user"], act["via"], "target" in act) for act in acts] == [
        ("ann", "command", False), ("ann", "command", False), ("bob", "command", False),
    ]  # fmt: skip


@pytest.mark.extended
def test_a_user_whose_wait_is_over_is_cleared_too(tmp_path: Path) -> None:
    """The failures count still: the next one would make a longer wait."""
    settings = SETTINGS.format(directory=tmp_path).replace("10m", "4s")
    with serve(write_config(tmp_path, settings)) as server:
        throttle(server, "ann")
        until(lambda: listed(tmp_path) != [], "the worker has reported")
        until(lambda: listed(tmp_path) == [], "the wait is over")
        assert output(run(tmp_path, "throttle", "clear", "ann")) == f"ann can log in from {HOME} again.\n"
        assert mistake(run(tmp_path, "throttle", "clear", "ann")) == "No failed login is counted there."


def test_a_throttled_network_is_listed_and_cleared(server: Server, home: Path) -> None:
    for number in range(40):
        if log_in(server, f"name{number}", f"203.0.113.{number}") == 429:
            break
    until(lambda: len(listed(home)) == 1, "the workers have reported")
    [found] = listed(home)
    assert (found["kind"], found["user"], found["address"]) == ("network", None, "203.0.113.0/24")
    assert "(everyone)  203.0.113.0/24" in output(run(home, "throttle", "list"))
    done = run(home, "throttle", "clear", "203.0.113.0/24")
    assert output(done) == "The failed logins from 203.0.113.0/24 are forgotten. Those of each name there stay.\n"
    assert recorded(done) == [{"event": "throttle_cleared", "range": "203.0.113.0/24"}]
    assert log_in(server, "ann", password="ann-secret") == 200
    assert listed(home) == []
    assert mistake(run(home, "throttle", "clear", "203.0.113.0/24")) == "No failed login is counted there."
    [act] = [act for act in read_audit(home / "audit.jsonl") if act["action"] == "clear_throttle"]
    assert (act["target"], "user" in act) == ("203.0.113.0/24", False)


def test_what_cannot_be_cleared_is_one_line(server: Server, home: Path) -> None:
    assert mistake(run(home, "throttle", "clear", "ann")) == (
        "'ann' is not throttled, as far as the servers of this machine know. Pass --from ADDRESS to clear an address."
    )
    assert mistake(run(home, "throttle", "clear", "ann", "--from", HOME)) == "No failed login is counted there."
    assert mistake(run(home, "throttle", "clear", TYPED)) == (
        f"'{TYPED}' is no user in config.toml, and no network such as 203.0.113.0/24."
        " `tokenauth throttle list` shows who has to wait."
    )
    for arguments, problem in (
        (["ann", "--from", "home"], "must be an IP address."),
        (["203.0.113.0/24", "--from", HOME], "--from needs the name of a user."),
    ):
        done = run(home, "throttle", "clear", *arguments)
        assert done.returncode == 2
        assert problem in done.stderr


def test_without_a_server_the_list_says_so(tmp_path: Path) -> None:
    write_config(tmp_path)
    run(tmp_path, "migrate")
    problem = "No server of this user serves config.toml: start one with `tokenauth serve`."
    assert mistake(run(tmp_path, "throttle", "list")).startswith(problem)
    assert mistake(run(tmp_path, "throttle", "clear", "ann")).startswith(problem)
    assert mistake(run(tmp_path, "throttle", "clear", "ann", "--from", HOME)) == "No failed login is counted there."


def test_another_user_gets_no_list() -> None:
    """Root and the user of the service are answered, and no other user, who could connect."""
    if os.geteuid() != 0:
        skip_without("root", "run the tests as root")
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        config = write_config(Path(name))
        become = "from pathlib import Path; import os; os.setgid(65534); os.setuid(65534)"
        ask = (
            f"from tokenauth.server import control; control._is_ours = lambda *_: True; {become};"
            f" control.ask_who_is_throttled(Path({str(config)!r}))"
        )
        with serve(config) as server:
            done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=False)
            assert f"process {server.process.pid} has ended, or does not take orders of this user" in done.stderr
            assert output(run(Path(name), "throttle", "list")) == "No throttled logins.\n"
