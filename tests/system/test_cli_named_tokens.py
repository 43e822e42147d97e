"""The commands for named tokens, beside a running server."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import Server, log_in, probe, worker, write_config
from tests.system.test_cli import Done, mistake, output, recorded, run

DAY = 24 * 3600


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with worker(write_config(tmp_path_factory.mktemp("named"))) as running:
        yield running


@pytest.fixture
def home(server: Server) -> Path:
    return server.log.parent


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected
        for user in ("admin", "ann"):
            token = log_in(connected, user, "admin" if user == "admin" else f"{user}-secret")
            connected.delete("/api/tokens?kind=all", headers={"X-Token": token})


def issue(home: Path, name: str = "nightly", *options: str, user: str = "ann") -> str:
    text = output(run(home, "tokens", "issue", "--user", user, "--name", name, *options))
    assert re.fullmatch(r"tkn[A-Za-z0-9]{61}\n", text), "must print nothing but the token"
    return text.rstrip("\n")


def me(client: httpx.Client, token: str) -> Any:
    return client.get("/api/me", headers={"X-Token": token}).json()


def listed(home: Path, *options: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(output(run(home, "tokens", "list", "--json", *options)))["tokens"]
    return rows


def test_the_list_can_be_of_one_kind(home: Path, client: httpx.Client) -> None:
    issue(home)
    log_in(client)
    shown = {kind: {row["kind"] for row in listed(home, "--kind", kind)} for kind in ("login", "named")}
    assert shown == {"login": {"login"}, "named": {"named"}}
    assert {row["kind"] for row in listed(home)} == {"login", "named"}
    assert listed(home, "--user", "admin", "--kind", "named") == []
    assert run(home, "tokens", "list", "--kind", "all").returncode == 2


def test_an_issued_token_works_on_a_running_server(home: Path, client: httpx.Client) -> None:
    done = run(home, "tokens", "issue", "--user", "ANN", "--name", "nightly", "--scope", "read", "--ttl", "2d")
    token = output(done).rstrip("\n")
    found = me(client, token)
    assert (found["username"], found["name"], found["scopes"]) == ("ann", "nightly", ["read"])
    assert found["expiry_time"] - found["issued_at"] == 2 * DAY
    assert recorded(done) == [
        {
            "event": "named_token_issued", "user": "ann", "id": found["id"], "name": "nightly", "scopes": ["read"],
            "expires_at": found["expiry_time"],
        }
    ]  # fmt: skip
    row = next(row for row in listed(home) if row["name"] == "nightly")
    assert (row["id"], row["kind"], row["scopes"], row["last_used_at"]) == (found["id"], "named", ["read"], None)
    assert token not in output(run(home, "tokens", "list")) + done.stderr


def test_without_options_it_has_all_scopes_and_90_days(home: Path, client: httpx.Client) -> None:
    found = me(client, issue(home))
    assert found["scopes"] == ["read", "write"]
    assert found["expiry_time"] - found["issued_at"] == 90 * DAY


MISTAKES = {
    "no such user": (["--user", "anne", "--name", "x"], "No user 'anne' in "),
    "a scope that the user lacks": (
        ["--user", "ann", "--name", "x", "--scope", "reports"],
        "The user 'ann' does not have the scope 'reports'. Theirs are: read write.",
    ),
    "no scope": (["--user", "ann", "--name", "x", "--scope", "a b"], "scopes: each must be a word"),
    "too long": (["--user", "ann", "--name", "x", "--ttl", "366d"], "ttl: must be a duration from 1s to 365d"),
    "no duration": (["--user", "ann", "--name", "x", "--ttl", "never"], "ttl: must be a duration"),
    "no name": (["--user", "ann", "--name", ""], "name: must have 1 to 64 visible characters"),
    "not UTF-8": (["--user", "ann", "--name", "\udcff"], "not UTF-8"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_issues_no_token(home: Path, client: httpx.Client, case: str) -> None:
    arguments, problem = MISTAKES[case]
    assert problem in mistake(run(home, "tokens", "issue", *arguments))
    assert [row for row in listed(home) if row["kind"] == "named"] == []


def test_a_taken_name_is_a_mistake(home: Path, client: httpx.Client) -> None:
    token = issue(home)
    assert "You have a token of this name." in mistake(
        run(home, "tokens", "issue", "--user", "ann", "--name", "nightly")
    )
    assert probe(client, token)


@pytest.mark.parametrize("overlap", [(), ("--overlap", "1h")])
def test_a_rotated_token_is_printed(home: Path, client: httpx.Client, overlap: tuple[str, ...]) -> None:
    old = issue(home, "nightly", "--scope", "read")
    id = me(client, old)["id"]
    done = run(home, "tokens", "rotate", id, *overlap)
    new = output(done).rstrip("\n")
    assert re.fullmatch(r"tkn[A-Za-z0-9]{61}\n", done.stdout), "must print nothing but the token"
    found = me(client, new)
    assert (found["name"], found["scopes"]) == ("nightly", ["read"])
    assert probe(client, old) is bool(overlap)
    assert recorded(done) == [
        {
            "event": "named_token_rotated", "user": "ann", "id": id, "new_id": found["id"], "name": "nightly",
            "scopes": ["read"], "expires_at": found["expiry_time"],
        }
    ]  # fmt: skip


def test_what_cannot_be_rotated_is_a_mistake(home: Path, client: httpx.Client) -> None:
    log_in(client)
    login = next(row["id"] for row in listed(home) if row["kind"] == "login")
    for id in ("0" * 24, login, "nightly"):
        assert "There is no named token with this id." in mistake(run(home, "tokens", "rotate", id))


def scan(home: Path, *arguments: str, stdin: str = "") -> Done:
    return run(home, "tokens", "scan", *arguments, stdin=stdin)


def test_a_scan_names_the_live_tokens_in_a_text(home: Path, client: httpx.Client) -> None:
    named, login, ended = issue(home), log_in(client), log_in(client)
    client.delete("/api/token", headers={"X-Token": ended})
    text = f"curl -H 'X-Token: {named}'\n{login}{'x' * 9}\nGET /?token%3D{login}\n{ended} {'y' * 64}\n"
    done = scan(home, "--json", stdin=text)
    assert done.returncode == 3
    rows = json.loads(done.stdout)["tokens"]
    assert [(row["file"], row["user"], row["kind"], row["name"], row["status"]) for row in rows] == [
        ("-", "ann", "named", "nightly", "valid"),
        ("-", "admin", "login", None, "valid"),
    ]
    table = scan(home, stdin=text)
    assert table.returncode == 3
    assert rows[0]["id"] in table.stdout
    assert abs(rows[0]["issued_at"] - time.time()) < 300
    assert (rows[1]["address"], rows[1]["last_used_at"]) == ("127.0.0.1", None)
    heading, *lines = table.stdout.splitlines()
    assert "last use" in heading
    assert [line for line in lines if "none noted" not in line] == []
    for value in (named, login, ended):
        assert value not in done.stdout + done.stderr + table.stdout + table.stderr
    assert probe(client, named), "only --revoke ends them"


def test_a_scan_that_revokes_ends_what_it_finds(home: Path, client: httpx.Client) -> None:
    named, login = issue(home), log_in(client)
    id = me(client, named)["id"]
    (home / "leak.txt").write_text(f"token: {named}\n")
    (home / "clean.txt").write_text("nothing\n")
    done = scan(home, "--revoke", "clean.txt", "leak.txt", "--json")
    assert done.returncode == 3
    assert [(row["file"], row["id"], row["status"]) for row in json.loads(done.stdout)["tokens"]] == [
        ("leak.txt", id, "revoked")
    ]
    assert recorded(done) == [{"event": "token_revoked", "user": "ann", "id": id}]
    assert not probe(client, named)
    assert probe(client, login)
    again = scan(home, "--revoke", "leak.txt")
    assert (again.returncode, again.stdout) == (0, "No live tokens.\n")


def test_a_token_at_the_border_of_two_parts_is_found(home: Path, client: httpx.Client) -> None:
    token = issue(home)
    for offset in (-70, -64, -40, -1, 0, 1):
        (home / "large.txt").write_text(" " * ((1 << 20) + offset) + token + " " * (1 << 20))
        done = scan(home, "large.txt", "--json")
        assert (done.returncode, len(json.loads(done.stdout)["tokens"])) == (3, 1), offset


def test_a_scan_of_nothing_finds_nothing(home: Path, client: httpx.Client) -> None:
    assert output(scan(home)) == "No live tokens.\n"
    assert json.loads(output(scan(home, "--json"))) == {"tokens": []}
    unreadable = scan(home, "--json", "missing.txt")
    assert (unreadable.returncode, json.loads(unreadable.stdout)) == (1, {"tokens": []})
    assert mistake(scan(home, "missing.txt")) == "missing.txt: cannot be read: No such file or directory."


@pytest.mark.parametrize("revoke", [(), ("--revoke",)])
def test_an_unreadable_file_hides_no_finding(home: Path, client: httpx.Client, revoke: tuple[str, ...]) -> None:
    token = issue(home)
    id = me(client, token)["id"]
    (home / "leak.txt").write_text(f"\x1b[32m{token}\x1b[0m")
    done = scan(home, "missing.txt", "leak.txt", "/nonexistent", "--json", *revoke)
    assert done.returncode == 3
    assert [(row["file"], row["id"]) for row in json.loads(done.stdout)["tokens"]] == [("leak.txt", id)]
    for file in ("missing.txt", "/nonexistent"):
        assert f"Error: {file}: cannot be read: No such file or directory.\n" in done.stderr
    assert probe(client, token) is not bool(revoke)
