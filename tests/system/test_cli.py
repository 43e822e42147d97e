"""The command line. Each command runs in a new process, some of them with a new interpreter."""

import json
import os
import pwd
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

import pytest
from passlib.hash import argon2

from tests.support.processes import Forked
from tests.support.servers import ROOT, TOKENAUTH, USERS, Server, log_in, probe, serve, spawn, worker, write_config
from tests.support.skipping import skip_without
from tokenauth import build
from tokenauth.settings import loader
from tokenauth.stores.schema import HEAD


class Encoding(TypedDict):
    """Text encoding that preserves bytes that are not UTF-8."""

    encoding: str
    errors: str


COMMANDS = [
    "serve", "init", "check", "reload", "doctor", "health", "systemd-unit", "migrate", "copy", "hash-password",
    "user add", "user passwd", "user set-scopes", "user remove", "user list",
    "tokens list", "tokens issue", "tokens rotate", "tokens scan", "tokens revoke",
    "pool list", "pool show", "pool line", "pool generate", "pool release",
    "pool reserve", "pool unreserve", "pool delete", "throttle list", "throttle clear", "audit verify", "audit tail",
]  # fmt: skip
PRIVATE = (
    "Only this machine can reach the service."
    " If a reverse proxy passes requests on to it, set server.trusted_proxies.\n"
)
WORD = "a long password\n"

TEXT: Encoding = {"encoding": "utf-8", "errors": "surrogateescape"}
Done = subprocess.CompletedProcess[str]


def run(directory: Path, *arguments: str, stdin: str = "", **env: str) -> Done:
    """Run a command in a directory, in a forked process that has already imported the service."""
    with TemporaryDirectory() as scratch:
        streams = [Path(scratch) / name for name in ("in", "out", "err")]
        streams[0].write_text(stdin, **TEXT)
        process = Forked("tests.support.serving", ["tokenauth", *arguments], directory, streams, environment(env))
        code = process.wait(60)
        out, err = (path.read_text(**TEXT) for path in streams[1:])
    return Done(arguments, code, out, err)


def script(directory: Path, *arguments: str, stdin: str = "", program: str = TOKENAUTH, **env: str) -> Done:
    """Run a command in a directory with a new interpreter, as an operator does."""
    return subprocess.run(
        [program, *arguments],
        cwd=directory,
        env={**environment(env), "PYTHONUTF8": "1"},
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
        **TEXT,
    )


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of this process plus `more`, without TOKENAUTH_CONFIG."""
    return {name: value for name, value in os.environ.items() if name != "TOKENAUTH_CONFIG"} | dict(more)


def output(done: Done) -> str:
    """Return the output of a command that succeeded."""
    assert done.returncode == 0, done
    recorded(done)
    return done.stdout


def recorded(done: Done) -> list[dict[str, Any]]:
    """Return the log events of a command. It must write nothing else to standard error."""
    events = [json.loads(line) for line in done.stderr.splitlines()]
    for event in events:
        assert (event["by"], event["level"]) == (
            os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name,
            "info",
        )
        assert event["timestamp"].endswith("Z")
    return [{key: event[key] for key in event if key not in {"by", "level", "timestamp"}} for event in events]


def mistake(done: Done) -> str:
    """Return the one line of a command's error."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("Error: ").rstrip("\n")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a directory with a valid configuration."""
    write_config(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(tmp_path: Path, command: str) -> None:
    text = " ".join(output(run(tmp_path, *command.split(), "--help")).split())
    assert f"Usage: tokenauth {command} [OPTIONS]" in text
    assert "Example" in text
    assert f": tokenauth {command}" in text or f"| tokenauth {command}" in text
    assert ("--config FILE" in text) != (command == "systemd-unit")


def test_the_help_lists_the_commands(tmp_path: Path) -> None:
    text = output(run(tmp_path, "-h"))
    assert all(f"\n  {command.partition(' ')[0]} " in text for command in COMMANDS)
    for group in ((), ("user",), ("tokens",), ("pool",), ("throttle",)):
        assert "..." not in output(run(tmp_path, *group, "--help")).partition("Commands:")[2], "a summary is cut"
    assert output(script(tmp_path, "--version")) == f"tokenauth, version {build()}\n"


def test_the_version_ignores_the_files_of_editors(tmp_path: Path) -> None:
    package = tmp_path.resolve() / "tokenauth"
    shutil.copytree(ROOT / "tokenauth", package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (package / ".#pools.py").symlink_to("ann@host.1234:5678")
    (package / "stores/.changed.py").write_text("while it is written")
    (package / "gone.py").symlink_to("nothing")
    command = [sys.executable, "-c", "import tokenauth; print(tokenauth.__file__, tokenauth.build())"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{package / '__init__.py'} {build()}\n", "")


def test_check_reports_a_valid_configuration(home: Path) -> None:
    assert output(run(home, "check")) == PRIVATE + "config.toml: ok, 3 users, 0 pools, 0 risks\n"
    assert json.loads(output(run(home, "check", "--json"))) == {"ok": True, "error": None, "risks": []}
    assert os.listdir(home) == ["config.toml"], "must create no file"


@pytest.mark.extended
def test_output_that_cannot_be_written_is_one_line(home: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [str(TOKENAUTH), "tokens", "list", "--json", "--config", str(home / "config.toml")],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sever]", "config.toml: sever: there is no such key; did you mean server?"),
        ("database.url = 'mysql://x/y'", "config.toml: database.url: 'mysql' is not supported"),
    ],
)
def test_check_names_a_mistake_as_text_and_as_json(home: Path, text: str, message: str) -> None:
    (home / "config.toml").write_text(text)
    done = run(home, "check", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["risks"]) == (1, False, [])
    assert report["error"].startswith(message)
    assert report["error"] in done.stderr


def test_a_loopback_address_that_is_mapped_to_ipv6_is_one(home: Path) -> None:
    metrics = '[metrics]\nlisten = "[{}]:9180"\n'
    write_config(home, '[server]\nhost = "::ffff:127.0.0.1"\n' + metrics.format("::ffff:127.0.0.1"))
    found = run(home, "doctor").stdout
    assert "only this machine can reach the service" in found
    assert "metrics.listen" not in found
    write_config(home, '[server]\nhost = "::ffff:10.0.0.1"\n' + metrics.format("::ffff:10.0.0.1"))
    found = run(home, "doctor").stdout
    assert "only this machine" not in found
    assert "metrics.listen" in found


def test_check_lists_risks_and_fails_on_public_ones(home: Path) -> None:
    text = USERS.replace("memory_kib = 8\n", "memory_kib = 16\n")
    write_config(home, users=text)
    *risks, verdict, summary = output(run(home, "check")).splitlines()
    assert [line[:24] for line in risks] == ["risk: weak_hash: the pas"]
    assert summary == "config.toml: ok, 3 users, 0 pools, 1 risk"
    assert verdict + "\n" == PRIVATE
    write_config(home, '[server]\nhost = "0.0.0.0"', text)
    done = run(home, "check", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert (report["ok"], [risk["name"] for risk in report["risks"]]) == (False, ["weak_hash", "no_tls"])
    assert report["error"] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("listen", "open_"), [("127.0.0.1:9180", False), ("[::1]:9180", False), ("0.0.0.0:9180", True)]
)
def test_check_and_doctor_say_who_can_read_the_metrics(home: Path, listen: str, open_: bool) -> None:
    write_config(home, f'[metrics]\nlisten = "{listen}"')
    said = f"metrics.listen: '{listen}' answers anyone who can reach it, without a login"
    assert (said in output(run(home, "check"))) == open_
    checks = json.loads(run(home, "doctor", "--json").stdout)["checks"]
    assert (said in [check["text"] for check in checks]) == open_


PATHS = {
    "init -c": ("init", "--yes", "-c"),
    "check -c": ("check", "-c"),
    "doctor -c": ("doctor", "-c"),
    "serve -c": ("serve", "-c"),
    "reload -c": ("reload", "-c"),
    "health -c": ("health", "-c"),
    "migrate -c": ("migrate", "-c"),
    "user add -c": ("user", "add", "eve", "--password-stdin", "-c"),
    "user list -c": ("user", "list", "-c"),
    "tokens list -c": ("tokens", "list", "-c"),
    "tokens scan": ("tokens", "scan"),
    "pool list -c": ("pool", "list", "-c"),
    "throttle list -c": ("throttle", "list", "-c"),
    "copy -c": ("copy", "--to", "sqlite+aiosqlite:///t.db", "-c"),
    "audit tail -c": ("audit", "tail", "-c"),
    "audit verify": ("audit", "verify"),
}


@pytest.mark.parametrize("path", ["none/x", "config.toml/x", "loop", "directory"])
@pytest.mark.parametrize("command", PATHS)
def test_a_path_that_cannot_be_used_is_one_plain_line(home: Path, command: str, path: str) -> None:
    (home / "loop").symlink_to("loop")
    (home / "directory").mkdir()
    if command == "tokens scan":
        assert run(home, "migrate").returncode == 0
    done = run(home, *PATHS[command], path, stdin=WORD)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert path.partition("/")[0] in said
    assert "Errno" not in said
    assert "Traceback" not in said


def test_option_then_variable_then_directory_find_the_file(home: Path) -> None:
    (home / "other.toml").write_text("users = []")
    assert "other.toml: ok, 0" in output(run(home, "check", TOKENAUTH_CONFIG="other.toml"))
    assert "config.toml: ok, 3" in output(run(home, "check", "--config", "config.toml", TOKENAUTH_CONFIG="other.toml"))


def test_a_password_is_hashed_at_the_configured_cost(home: Path) -> None:
    hashed = output(run(home, "hash-password", "--password-stdin", stdin=WORD)).rstrip("\n")
    assert hashed.startswith("$argon2id$v=19$m=8,t=1,p=1$")
    assert argon2.verify(WORD.rstrip("\n"), hashed)


def test_without_a_file_a_password_gets_the_default_cost(tmp_path: Path) -> None:
    done = run(tmp_path, "hash-password", "--password-stdin", stdin="жанна жанна\r\nmore")
    assert output(done).startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert argon2.verify("жанна жанна", done.stdout.rstrip("\n"))


def test_users_are_added_changed_and_removed(home: Path) -> None:
    path = home / "config.toml"
    added = run(home, "user", "add", "Eve", "--scope", "a", "--scope", "b", "--password-stdin", stdin=WORD)
    reload = "`tokenauth reload`, or `systemctl reload tokenauth`."
    assert output(added) == f"Saved. 'Eve' can log in once you reload: {reload}\n"
    assert recorded(added) == [{"event": "user_added", "user": "Eve", "scopes": ["a", "b"]}]
    before = loader.load(path).users_by_name["eve"]
    assert argon2.verify(WORD.rstrip("\n"), before.password_hash)
    changed = run(home, "user", "passwd", "eve", "--password-stdin", stdin="another password\n")
    assert output(changed) == f"Saved. Existing logins stay valid until you reload: {reload}\n"
    assert recorded(changed) == [{"event": "user_password_changed", "user": "eve"}]
    after = loader.load(path).users_by_name["eve"]
    assert argon2.verify("another password", after.password_hash)
    assert after.credential != before.credential
    row = {"username": "eve", "scopes": ["a", "b"], "file": "config.toml"}
    assert row in json.loads(output(run(home, "user", "list", "--json")))["users"]
    shown = [line.split() for line in output(run(home, "user", "list")).splitlines()]
    assert shown == [["user", "scopes"], ["admin", "admin"], ["ann", "read", "write"], ["bob"], ["eve", "a", "b"]]
    scoped = run(home, "user", "set-scopes", "eve", "--scope", "c")
    assert output(scoped) == f"Saved. The scopes change when you reload: {reload}\n"
    assert recorded(scoped) == [
        {"event": "user_scopes_changed", "user": "eve", "scopes": ["c"], "scopes_before": ["a", "b"]}
    ]
    eve = loader.load(path).users_by_name["eve"]
    assert (eve.scopes, eve.credential) == (("c",), after.credential)
    output(run(home, "user", "set-scopes", "eve"))
    assert loader.load(path).users_by_name["eve"].scopes == ()
    removed = run(home, "user", "remove", "EVE")
    then = "Then `tokenauth tokens revoke --user EVE --leases` ends what is left.\n"
    assert output(removed) == output(changed) + then
    assert recorded(removed) == [{"event": "user_removed", "user": "EVE", "scopes_before": []}]
    assert "ok, 3 users" in output(run(home, "check"))


def test_migrate_creates_a_database_and_is_repeatable(home: Path) -> None:
    for events in (["database_created"], []):
        done = run(home, "migrate")
        assert (done.returncode, done.stdout) == (0, f"The database has schema {HEAD}.\n")
        assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == events
    assert (home / "tokenauth.db").stat().st_mode & 0o777 == 0o600
    assert output(run(home, "tokens", "list")) == "No tokens.\n"


NEED_A_DATABASE = [
    ["tokens", "list"], ["tokens", "revoke", "--user", "ann"], ["tokens", "revoke", "--all"],
    ["tokens", "revoke", "--id", "0" * 24], ["pool", "list"], ["pool", "show", "p"], ["pool", "generate", "p"],
    ["pool", "release", "p", "x"], ["pool", "delete", "p", "x"],
]  # fmt: skip


@pytest.mark.parametrize("empty", [False, True], ids=["no file", "empty file"])
@pytest.mark.parametrize("command", NEED_A_DATABASE, ids=" ".join)
def test_in_a_wrong_directory_a_command_creates_nothing(tmp_path: Path, command: list[str], empty: bool) -> None:
    write_config(tmp_path, "[pools.p]")
    if empty:
        (tmp_path / "tokenauth.db").touch()
    before = sorted(os.listdir(tmp_path))
    assert mistake(run(tmp_path, *command)) == (
        f"There is no database at {tmp_path / 'tokenauth.db'}."
        " Run this in the directory of the service, or make database.url absolute."
    )
    assert sorted(os.listdir(tmp_path)) == before


def test_revoke_distinguishes_unknown_and_logged_out_users(home: Path) -> None:
    run(home, "migrate")
    done = run(home, "tokens", "revoke", "--user", "ANN")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "Error: 'ann' has no tokens."
    assert run(home, "tokens", "revoke", "--all").stderr.splitlines()[-1] == "Error: No tokens."
    error = mistake(run(home, "tokens", "revoke", "--user", "anne"))
    assert error == (
        "No user 'anne' in config.toml, and no tokens of a user with that name. `tokenauth user list` shows the names."
    )


READS = [["tokens", "list"], ["pool", "list"], ["pool", "show", "p"]]


def test_reading_commands_work_on_a_locked_database(tmp_path: Path) -> None:
    write_config(tmp_path, "[pools.p]")
    run(tmp_path, "migrate")
    with closing(sqlite3.connect(tmp_path / "tokenauth.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for command in READS:
            output(run(tmp_path, *command))
        done = run(tmp_path, "tokens", "revoke", "--all")
        assert done.returncode == 1
        assert "database is locked. Another program holds a lock on" in done.stderr
        assert f"`fuser -v {tmp_path / 'tokenauth.db'}`" in done.stderr


USER_ADD = ["user", "add", "eve", "--password-stdin"]

MISTAKES: dict[str, tuple[list[str], str, str]] = {
    "no such file": (
        ["check", "--config", "no.toml"],
        "",
        "no.toml: no such file; write one with `tokenauth init`, or",
    ),
    "a hash": (
        ["check", "--config", "hash.toml"],
        "",
        "users[0].password: the password of 'ann' is not a hash that",
    ),
    "a store": (["check", "--config", "store.toml"], "", "database.url: 'mysql' is not supported"),
    "no file name": (["check", "--config", ""], "", "--config: is empty; name a file, or leave the option out"),
    "no terminal": (USER_ADD[:3], "", "There is no terminal to ask for the password. Pass it with --password-stdin."),
    "no directory": (
        ["migrate", "--config", "nowhere.toml"],
        "",
        "the database /no/such/place.db cannot be used: the directory /no/such does not exist; create it, or change",
    ),
    "not a database": (["tokens", "list", "--config", "text.toml"], "", "cannot be used: file is not a database"),
    "a short password": (USER_ADD, "short\n", "The password must have 8 to 1,024 characters"),
    "a long password": (
        ["hash-password", "--password-stdin"],
        "x" * 1025,
        "The password must have 8 to 1,024 characters",
    ),
    "a NUL": (USER_ADD, "pass\0word1\n", "password: has a NUL character"),
    "a NUL, to change": (["user", "passwd", "ann", USER_ADD[-1]], "pass\0word1\n", "password: has a NUL character"),
    "a NUL, to hash": (["hash-password", "--password-stdin"], "\0" * 9, "password: has a NUL character"),
    "bytes for a password": (["hash-password", "--password-stdin"], "\udcff" * 9, ""),
    "bytes for a name": ([*USER_ADD[:2], "\udcff", USER_ADD[3]], WORD, "users[3].username: must not have control"),
    "no such token": (
        ["tokens", "revoke", "--id", "0" * 24],
        "",
        "There is no token with this id. `tokenauth tokens list` shows the ids.",
    ),
    "no such id": (["tokens", "revoke", "--id", "\udcff"], "", "There is no"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_no_traceback(home: Path, name: str) -> None:
    for file, text in {
        "key": "[server]\nprot = 1",
        "hash": "[[users]]\nusername = 'ann'\npassword = 'hers'",
        "store": "[database]\nurl = 'mysql://x'",
        "nowhere": "[database]\nurl = 'sqlite+aiosqlite:////no/such/place.db'",
        "text": "[database]\nurl = 'sqlite+aiosqlite:///text.toml'" + "\n# no database" * 100,
    }.items():
        (home / f"{file}.toml").write_text(text)
    before = (home / "config.toml").read_text()
    arguments, stdin, expected = MISTAKES[name]
    if "revoke" in arguments:
        run(home, "migrate")
    assert expected in mistake(run(home, *arguments, stdin=stdin))
    assert (home / "config.toml").read_text() == before


@pytest.mark.parametrize(
    "arguments",
    [["tokens", "revoke"], ["tokens", "revoke", "--all", "--user", "ann"], ["serve", "--port", "x"], ["user", "add"],
     ["no-such-command"], ["check", "--no-such-option"]],
)  # fmt: skip
def test_an_invalid_command_shows_its_usage(home: Path, arguments: list[str]) -> None:
    done = run(home, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: tokenauth ")
    assert "Error: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["list", "revoke"])
def test_an_impossible_name_has_no_tokens(home: Path, command: str) -> None:
    done = run(home, "tokens", command, "--user", "\udcff")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run `tokenauth serve` with two workers."""
    with serve(write_config(tmp_path_factory.mktemp("served")), "--workers", "2") as running:
        yield running


def issue(server: Server, *names: str) -> list[str]:
    """Log in once for each name."""
    with server.client() as client:
        return [log_in(client, name, "admin" if name == "admin" else f"{name}-secret") for name in names]


def valid(server: Server, values: list[str]) -> list[bool]:
    """Probe tokens on several connections, so that both workers answer. They must agree."""
    answers = set()
    for _ in range(4):
        with server.client() as client:
            answers.add(tuple(probe(client, value) for value in values))
    assert len(answers) == 1, "the workers disagree"
    return list(answers.pop())


def listed(server: Server, *arguments: str) -> list[dict[str, Any]]:
    listed = json.loads(output(run(server.log.parent, "tokens", "list", "--json", *arguments)))
    rows: list[dict[str, Any]] = listed["tokens"]
    return rows


def test_tokens_are_listed_by_id_and_never_by_value(served: Server) -> None:
    values = issue(served, "ann", "bob")
    rows = listed(served, "--user", "ANN")
    assert [set(row) for row in rows] == [
        {
            "id", "user", "kind", "name", "scopes", "issued_at", "expiry_time", "last_used_at", "address",
            "user_agent", "status",
        }
        for _ in rows
    ]  # fmt: skip
    assert {row["user"] for row in rows} == {"ann"}
    assert {row["user"] for row in listed(served)} >= {"ann", "bob"}
    assert rows[0]["expiry_time"] - rows[0]["issued_at"] == 24 * 3600
    assert rows[0]["address"] == "127.0.0.1"
    table = output(run(served.log.parent, "tokens", "list"))
    assert rows[0]["id"] in table
    with served.client() as client:
        log_in(client, "ann", "ann-secret", headers={"User-Agent": "y" * 100})
    heading, *lines = output(run(served.log.parent, "tokens", "list")).splitlines()
    assert heading.split() == ["id", "user", "kind", "issued", "expires", "last", "use", "address", "agent"]
    assert lines[0].endswith(f" {'y' * 39}…")
    assert "  none noted  127.0.0.1  " in lines[0]
    assert not any(line.endswith(" ") for line in (heading, *lines))
    assert listed(served)[0]["user_agent"] == "y" * 100
    for value in values:
        assert value not in table + str(rows)


def test_workers_refuse_at_once_what_the_cli_revoked(served: Server) -> None:
    home = served.log.parent
    values = issue(served, "ann", "ann", "bob", "admin")
    assert valid(served, values) == [True] * 4
    newest = next(row["id"] for row in listed(served, "--user", "bob"))
    revoked = run(home, "tokens", "revoke", "--id", newest)
    assert output(revoked) == "Revoked 1 token.\n"
    assert recorded(revoked) == [{"event": "token_revoked", "user": "bob", "id": newest}]
    assert valid(served, values) == [True, True, False, True]
    revoked = run(home, "tokens", "revoke", "--user", "Ann")
    assert re.fullmatch(r"Revoked [2-9] tokens\.\n", output(revoked))
    [event] = recorded(revoked)
    assert (event["event"], event["user"]) == ("tokens_revoked", "ann")
    assert event["count"] > 1
    assert valid(served, values) == [False, False, False, True]
    assert re.fullmatch(r"Revoked [1-9] tokens?\.\n", output(run(home, "tokens", "revoke", "--all")))
    assert valid(served, values) == [False] * 4
    assert listed(served) == []


def test_tokens_that_end_at_the_next_reload_are_marked(tmp_path: Path) -> None:
    with worker(write_config(tmp_path)) as server:
        values = issue(server, "ann", "bob", "admin")
        output(run(tmp_path, "user", "remove", "ann"))
        output(run(tmp_path, "user", "passwd", "bob", "--password-stdin", stdin=WORD))
        rows = {row["user"]: row["status"] for row in listed(server)}
        assert rows == {"ann": "user_removed", "bob": "password_changed", "admin": "valid"}
        assert valid(server, values) == [True] * 3, "must stay valid until the reload"
        assert [row["status"] for row in listed(server, "--user", "ann")] == ["user_removed"]
        output(run(tmp_path, "tokens", "revoke", "--user", "ann"))
        assert valid(server, values) == [False, True, True]
        assert listed(server, "--user", "ann") == []


def test_commands_that_run_at_once_lose_no_edit(home: Path) -> None:
    add = [["user", "add", f"u{number}", "--password-stdin"] for number in range(4)]
    commands = [*add, ["user", "remove", "ann"], ["user", "passwd", "bob", "--password-stdin"]]
    before = loader.load(home / "config.toml").users_by_name
    with ThreadPoolExecutor(len(commands)) as pool:
        for done in pool.map(lambda command: run(home, *command, stdin=WORD), commands):
            output(done)
    after = loader.load(home / "config.toml").users_by_name
    assert set(after) == {"admin", "bob", "u0", "u1", "u2", "u3"}
    assert after["bob"].credential != before["bob"].credential
    assert sorted(os.listdir(home)) == ["config.toml"]


@cache
def list_unsafe() -> list[str]:
    """List all characters that control a terminal or change how a line is displayed."""
    unsafe = {"Cc", "Cf", "Zl", "Zp"}
    return [letter for letter in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(letter) in unsafe]


@pytest.mark.parametrize("command", [["tokens", "list"], ["pool", "show", "p"]], ids=" ".join)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_no_listing_lets_a_client_control_the_terminal(tmp_path: Path, command: list[str], options: list[str]) -> None:
    write_config(tmp_path, "[pools.p]")
    run(tmp_path, "migrate")
    output(run(tmp_path, "pool", "generate", "p"))
    sent = "".join(list_unsafe())
    with closing(sqlite3.connect(tmp_path / "tokenauth.db")) as database, database:
        now = int(time.time())
        row = (b"d" * 32, "ann", "c", now, now + 1000, sent, sent)
        database.execute(
            "INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        database.execute("UPDATE pool_tokens SET holder = ?, free_at = ?", (sent, now + 1000))
    shown = output(run(tmp_path, *command, *options))
    assert [letter for letter in shown if letter in list_unsafe() and letter != "\n"] == []
    escapes = [r"\u009b" if options else r"\x9b", r"\u202e", r"\u001b" if options else r"\x1b"]
    assert [escape for escape in escapes if escape not in shown] == [], "must show the characters escaped"


@pytest.mark.parametrize("letter", ["\x1b", "\x7f", "\x9b", "\u202e", "\u2028", "\n"], ids=ascii)
def test_no_error_lets_arguments_control_the_terminal(home: Path, letter: str) -> None:
    for command in (
        ["check", "--config", f"no{letter}.toml"],
        ["user", "remove", f"a{letter}"],
        ["pool", "show", letter],
    ):
        assert mistake(run(home, *command)).isprintable()
    (home / f"{letter}.toml").write_text((home / "config.toml").read_text())
    lines = output(run(home, "check", "--config", f"{letter}.toml")).splitlines()
    assert len(lines) == 3
    assert "".join(lines).isprintable()


def test_a_second_server_on_one_port_is_refused(served: Server, home: Path) -> None:
    done = run(home, "serve", "--port", str(served.port))
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    event = json.loads(done.stderr)
    detail = f"Port {served.port} is in use: stop the other server or pass --port."
    assert (event["event"], event["detail"]) == ("start_failed", detail)
    assert not (home / "tokenauth.db").exists(), "must create no database"


def test_a_risky_configuration_is_not_served_in_public(home: Path) -> None:
    write_config(home, '[server]\nhost = "0.0.0.0"\nport = 0', USERS.replace("memory_kib = 8\n", "memory_kib = 16\n"))
    done = run(home, "serve")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "weak_hash" in done.stderr
    assert '"started"' not in done.stderr


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize(
    ("name", "mode", "risk"), [("config.toml", 0o644, "readable_config"), ("tokenauth.db", 0o644, "exposed_database")]
)
def test_a_readable_file_is_not_served_behind_a_proxy(
    home: Path, command: str, name: str, mode: int, risk: str
) -> None:
    write_config(home, '[server]\nport = 0\ntrusted_proxies = ["127.0.0.1"]')
    (home / name).touch()
    (home / name).chmod(mode)
    done = run(home, command)
    assert done.returncode != 0
    assert f"this risk is not accepted: '{risk}'; " in done.stderr.splitlines()[-1]
    assert '"listening"' not in done.stderr


def test_a_readable_file_is_only_a_warning_on_loopback(home: Path) -> None:
    (home / "config.toml").chmod(0o644)
    assert output(run(home, "check")).startswith(
        "risk: readable_config: config.toml contains password hashes, and all users"
    )


@pytest.mark.parametrize("name", ["${HOME}", "a${b:-c}", "${"])
def test_a_name_that_is_a_variable_is_refused(home: Path, name: str) -> None:
    path = home / "config.toml"
    before = path.read_bytes()
    refused = run(home, "user", "add", name, "--password-stdin", stdin=WORD)
    assert refused.returncode == 1
    assert "a user name cannot contain '${'" in refused.stderr
    assert path.read_bytes() == before


UNUSABLE = {
    "no directory": ("", "/no/such/place.db", "database.url: the directory /no/such does not exist; create it, or"),
    "a file for a directory": ("", "{home}/config.toml/x.db", "config.toml is not a directory; change database.url"),
    "a directory": ("", "{home}", " is a directory; add a file name to database.url"),
    "another file": ("", "{home}/config.toml", "config.toml is not an SQLite database; move it away, or change"),
    "an unknown host": ("example.invalid", "{home}/t.db", "server.host: 'example.invalid' cannot be resolved: "),
    "a foreign address": ("192.0.2.7", "{home}/t.db", "server.host: '192.0.2.7' cannot be listened on: "),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_check_refuses_what_serve_cannot_use(tmp_path: Path, name: str) -> None:
    host, database, says = UNUSABLE[name]
    server = f"server = {{host = '{host}', accept_risks = ['weak_hash', 'no_tls']}}\n" if host else ""
    url = f"sqlite+aiosqlite:///{database.format(home=tmp_path)}"
    path = tmp_path / "config.toml"
    path.write_text(f"{server}database.url = '{url}'\n{USERS}")
    path.chmod(0o600)
    done = run(tmp_path, "check")
    assert (done.returncode, done.stderr[:20]) == (1, "Error: config.toml: ")
    assert says in done.stderr
    assert os.listdir(tmp_path) == ["config.toml"], "it only looks"
    served = run(tmp_path, "serve", *(() if host else ("--port", "0")))
    assert served.returncode == 3
    assert name == "another file" or says.removeprefix("database.url: ") in served.stderr


@pytest.mark.extended
def test_check_refuses_a_directory_that_is_not_writable(home: Path) -> None:
    home.chmod(0o500)
    done = run_as_user(home, "check")
    home.chmod(0o700)
    assert f"database.url: the directory {home} is not writable for this user; run this as the user" in mistake(done)


@pytest.mark.extended
def test_files_that_are_not_writable_say_how_to_mend_them(home: Path) -> None:
    """SQLite gives the -shm file the mode of the database file, and does not change it later."""
    file, *others = (home / f"tokenauth.db{suffix}" for suffix in ("", "-wal", "-shm"))
    both = " ".join(map(str, others))
    run(home, "migrate")

    def reason() -> str:
        with spawn([*as_user(), TOKENAUTH, "serve", "--port", "0", "--workers", "1"], home) as server:
            server.wait("started")
            server.port = server.wait("listening")["port"]
            with server.client() as client:
                assert client.post("/api/token", json={"username": "ann", "password": "ann-secret"}).status_code == 503
            return str(server.wait("store_not_writable")["reason"])

    file.chmod(0o400)
    assert reason().endswith(f"run `chmod u+rw {file} {both}`, then reload tokenauth")
    assert mistake(run_as_user(home, "check")).endswith(f"run `chmod u+rw {file} {both}`")
    file.chmod(0o600)
    assert f"{others[-1]}`, then reload tokenauth" in reason(), "the -wal file may have been made again"
    for other in others:
        other.chmod(0o600)
    assert output(run_as_user(home, "check"))


@pytest.mark.extended
def test_log_outs_before_a_mode_is_mended_are_not_lost(home: Path) -> None:
    """After the documented `chmod` and reload. A restart would lose them: its workers cannot write any more."""
    database = home / "tokenauth.db"
    with worker(home / "config.toml") as before, before.client() as client:
        token = log_in(client, "ann", "ann-secret")
    database.chmod(0o400)
    with spawn([*as_user(), TOKENAUTH, "serve", "--port", "0", "--workers", "1"], home) as server:
        server.wait("started")
        server.port = server.wait("listening")["port"]
        with server.client() as client:
            headers = {"Authorization": f"Bearer {token}"}
            assert probe(client, token)
            assert client.delete("/api/token", headers=headers).status_code == 200
            held = server.wait("revocation_held_in_memory")
            reason = server.wait("store_not_writable")["reason"]
            chmod, _, then = reason.rpartition("run `")[2].partition("`, then ")
            assert then == "reload tokenauth"
            subprocess.run(chmod.split(), check=True)
            assert run_as_user(home, "reload").returncode == 0
            assert server.wait("token_revoked", late=True)["id"] == held["id"]
        with server.client() as client:
            assert log_in(client, "ann", "ann-secret")
    with worker(home / "config.toml") as after, after.client() as client:
        assert not probe(client, token)


def as_user() -> list[str]:
    """Return the begin of a command as a service's user runs it: without root's capability to write anywhere."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        skip_without("setpriv", "install util-linux")
    return [setpriv, *(["--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else [])]


def run_as_user(home: Path, *arguments: str) -> Done:
    command = [*as_user(), TOKENAUTH, *arguments]
    return subprocess.run(command, cwd=home, capture_output=True, check=False, text=True, env=environment({}))


def with_database(directory: Path, url: str, more: str = "") -> None:
    """Write a configuration with a database at a URL."""
    path = directory / "config.toml"
    path.write_text(f"database.url = '{url}'\n{more}\n{USERS}")
    path.chmod(0o600)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


ODD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "/t.db is not a regular file; move it away, or change database.url"),
    "a socket": (bind_socket, "/t.db is not a regular file; move it"),
    "a device": (lambda path: path.symlink_to("/dev/null"), "/dev/null is not a regular file; move it away, or change"),
    "a loop": (lambda path: path.symlink_to(path), "/t.db cannot be opened: Too many levels of symbolic links; change"),
    "a dangling link": (lambda path: path.symlink_to("/no/such/x"), "the directory /no/such does not exist; create"),
    "a directory for the log": (lambda path: Path(f"{path}-wal").mkdir(), "/t.db-wal is not a regular file; move it"),
}


@pytest.mark.parametrize("what", ODD_FILES)
def test_check_refuses_files_that_are_no_database(tmp_path: Path, what: str) -> None:
    make, says = ODD_FILES[what]
    with_database(tmp_path, f"sqlite+aiosqlite:///{tmp_path / 't.db'}")
    make(tmp_path / "t.db")
    done = run(tmp_path, "check")
    assert done.returncode == 1
    assert says in done.stderr
    assert run(tmp_path, "serve", "--port", "0").returncode == 3


@pytest.mark.parametrize("name", ["a b", "a%20b", "p%q", "ж"])
def test_check_looks_at_the_file_that_serve_opens(tmp_path: Path, name: str) -> None:
    """SQLAlchemy decodes the path of a URL."""
    url = f"sqlite+aiosqlite:///{tmp_path}/{name}.db"
    with_database(tmp_path, url)
    assert run(tmp_path, "migrate").returncode == 0
    (found,) = tmp_path.glob("*.db")
    found.chmod(0o666)
    with_database(tmp_path, url, "server.trusted_proxies = ['127.0.0.1']")
    assert f"{found} has mode 0666" in run(tmp_path, "check").stdout


@pytest.mark.extended
def test_check_refuses_a_port_that_needs_a_right(home: Path) -> None:
    config = home / "config.toml"
    config.write_text(f"server.port = 80\n{config.read_text()}")
    if sys.platform != "linux" or int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 80:
        assert run(home, "check").returncode == 0, "every user may listen on each port of this machine"
        return
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        skip_without("setpriv", "install util-linux")
    less = ["--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service"] if os.geteuid() == 0 else []
    for command in ("check", "serve"):
        line = [setpriv, *less, TOKENAUTH, command]
        done = subprocess.run(line, cwd=home, capture_output=True, check=False, text=True, env=environment({}))
        assert done.returncode == {"check": 1, "serve": 3}[command]
        assert "server.port: 80 cannot be listened on by this user: Permission denied; use a port from 1024" in (
            done.stderr
        )


def test_check_and_serve_read_an_address_alike(home: Path) -> None:
    """No IPv6 socket of the server takes IPv4 connections."""
    config = home / "config.toml"
    accepted = "server.accept_risks = ['weak_hash', 'no_tls']"
    config.write_text(f"server.host = '::ffff:127.0.0.1'\n{accepted}\n{config.read_text()}")
    config.chmod(0o600)
    says = "server.host: '::ffff:127.0.0.1' cannot be listened on: "
    assert says in run(home, "check").stderr
    assert says in run(home, "serve").stderr


@pytest.mark.parametrize("port", [89526, 65536])
def test_a_database_port_that_cannot_exist_is_refused(tmp_path: Path, port: int) -> None:
    for url in (f"u@h:{port}/d", f"u@/d?host=h:{port}", f"u@/d?host=a:1&host=h:{port}", f"u@/d?host=h&port={port}"):
        with_database(tmp_path, f"postgresql+asyncpg://{url}")
        assert "database.url: has a port that is not from 1 to 65535" in mistake(run(tmp_path, "check"))


def test_a_wrong_configuration_is_a_log_event_at_start(tmp_path: Path) -> None:
    """Whatever is wrong with it: an operator watches for one event."""
    for text in ("[serve]", "server.port = '${NONE}'", "[", "database.url = 'mysql://x'", None):
        if text is not None:
            (tmp_path / "config.toml").write_text(text)
        done = run(tmp_path, "serve", "--config", "config.toml" if text else "none.toml")
        line = done.stderr.splitlines()[-1]
        assert done.returncode == 3
        assert json.loads(line)["event"] == "configuration_refused"
        assert ".toml: " in json.loads(line)["detail"]


@pytest.mark.extended
def test_output_is_escaped_where_it_cannot_be_shown(home: Path) -> None:
    latin = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    assert "Saved." in script(home, *USER_ADD[:2], "жук", USER_ADD[3], stdin=WORD, **latin).stdout
    listed = script(home, "user", "list", **latin)
    assert listed.returncode == 0
    assert r"\u0436\u0443\u043a" in listed.stdout


@pytest.mark.extended
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["user", "--help"], ["check"]])
def test_a_full_disk_under_the_output_is_one_line(home: Path, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [TOKENAUTH, *arguments], cwd=home, stdout=full, stderr=subprocess.PIPE, check=False, text=True
        )
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


@pytest.mark.extended
def test_a_closed_or_empty_input_has_no_password(home: Path) -> None:
    for command, closed in product(("hash-password", "user add eve", "user passwd ann"), ("<&-", "</dev/null")):
        line = f"{TOKENAUTH} {command} --password-stdin {closed}"
        done = subprocess.run(line, shell=True, cwd=home, capture_output=True, check=False, text=True)  # noqa: S602
        assert mistake(done) == "The standard input is empty: pass the password in its first line."


def test_check_says_that_nobody_can_log_in(tmp_path: Path) -> None:
    write_config(tmp_path, users="")
    lines = output(run(tmp_path, "check")).splitlines()
    assert lines[-2:] == [
        "Nobody can log in: add a user with `tokenauth user add NAME`.",
        "config.toml: ok, 0 users, 0 pools, 0 risks",
    ]
