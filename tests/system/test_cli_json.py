"""What commands print with --json has the keys that its document shows."""

import json
import re
from pathlib import Path
from typing import Any

import click

from tests.support.connections import Connection
from tests.support.documents import blocks, read, rows
from tests.support.journal import until
from tests.support.pool_users import PoolUser
from tests.support.servers import USERS, Server, serve, write_config
from tests.system.test_cli import Done, output, run
from tests.unit.test_documents import commands
from tokenauth.cli.main import main

DOCUMENT = read("docs/command-line-json.md")

SETTINGS = """
[throttle]
free = 1
delay = "10m"
[audit]
file = "{directory}/audit.jsonl"
[pools.licences]
lease_max = "8h"
[pools.phones]
members = [{{name = "moto", labels = ["arm"], note = "shelf 3"}}, {{name = "pixel-8"}}]
"""

COMMANDS = {
    "check": ["check"],
    "doctor": ["doctor"],
    "copy": ["copy", "--to", "sqlite+aiosqlite:///copy.db"],
    "user list": ["user", "list"],
    "tokens list": ["tokens", "list"],
    "tokens scan": ["tokens", "scan", "app.log"],
    "pool list": ["pool", "list"],
    "pool show": ["pool", "show", "phones"],
    "pool line": ["pool", "line", "phones"],
    "pool generate": ["pool", "generate", "licences", "--count", "2"],
    "throttle list": ["throttle", "list"],
    "audit verify": ["audit", "verify", "broken.jsonl"],
}


def shape(document: Any) -> Any:
    """Return the keys of a document, and those of the objects in it. The objects of a list are taken together."""
    if isinstance(document, dict):
        return {key: shape(value) for key, value in document.items()}
    if isinstance(document, list):
        merged: dict[str, Any] = {}
        for each in document:
            for key, value in (shape(each) or {}).items():
                merged[key] = value or merged.get(key)
        return merged
    return None


def shown(command: str) -> Any:
    """Return the output of a command as the document shows it."""
    [printed] = [block for block in blocks(DOCUMENT, "console") if block.startswith(f"$ tokenauth {command} ")]
    return json.loads(printed.partition("--json\n")[2].replace("\n", " "))


def test_each_command_with_json_is_shown_or_named() -> None:
    offered = {
        path.removeprefix("tokenauth ")
        for path, command in commands(main, "tokenauth")
        if any("--json" in option.opts for option in command.params if isinstance(option, click.Option))
    }
    assert offered == {*COMMANDS, "audit tail"}, "audit tail prints lines of the audit log"


def test_each_key_that_is_shown_has_a_row() -> None:
    def keys(found: dict[str, Any] | None) -> set[str]:
        return set() if found is None else set(found).union(*map(keys, found.values()))

    in_tables = {key for cell, *_ in rows(DOCUMENT) for key in re.findall(r"`(\w+)`", cell)}
    assert in_tables == {key for command in COMMANDS for key in keys(shape(shown(command)))}


def test_the_output_has_the_keys_that_are_shown(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, SETTINGS.format(directory=tmp_path), USERS.replace("memory_kib = 8\n", "memory_kib = 16\n")
    )
    with serve(config, "--workers", "1") as server:
        fill(server, tmp_path)
        printed = {command: run(tmp_path, *COMMANDS[command], "--json") for command in COMMANDS}
        assert server.stop() == 0
    for command, done in printed.items():
        assert shape(json.loads(done.stdout)) == shape(shown(command)), command


def fill(server: Server, home: Path) -> None:
    """Make what each list has at least one of."""
    with Connection(server.port) as connection:
        admin, ann = PoolUser(connection), PoolUser(connection, "ann")
        assert ann.ask("POST", "/phones/leases", {"labels": ["arm"]}).status == 201
        assert admin.ask("PUT", "/phones/members/pixel-8/reservation", {"until": "2h"}).status == 200
        assert ann.ask("POST", "/phones/leases", {"wait": 0, "request": "r"}).status == 202
        (home / "app.log").write_text(ann.token)
        refused = {"username": "bob", "password": "wrong"}
        assert any(connection.ask("POST", "/api/token", refused).status == 429 for _ in range(30))

    def throttled() -> Done | None:
        done = run(home, "throttle", "list", "--json")
        return done if json.loads(output(done))["throttled"] else None

    until(throttled, "the worker has reported whom it refuses")
    output(run(home, "user", "remove", "bob"))
    output(run(home, "user", "set-scopes", "ann"))
    lines = (home / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (home / "broken.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
