"""`tokenauth pool`, while a server leases from the same pools."""

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.connections import Connection
from tests.support.pool_users import PoolUser
from tests.support.servers import worker, write_config
from tests.system.test_cli import mistake, output, recorded, run

POOLS = """
[pools.licences]
capacity = 3
lease_ttl = "1h"
[pools.waiting]
token_ttl = "1h"
[pools.permits]
capacity = 1
prefill = true
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a directory with a configuration that has three pools, and a database."""
    with worker(write_config(tmp_path, POOLS)):
        return tmp_path


def test_pool_commands_work_while_a_server_runs(home: Path) -> None:
    with worker(home / "config.toml") as server, Connection(server.port) as connection:
        ann = PoolUser(connection, "ann")
        generated = run(home, "pool", "generate", "licences", "--count", "2")
        assert recorded(generated) == [{"event": "pool_tokens_generated", "pool": "licences", "count": 2}]
        made = output(generated).split()
        assert len(set(made)) == 2
        assert {len(token) for token in made} == {64}
        lease = ann.ask("POST", "/licences/leases").json()
        assert lease["token"] in made
        shown = json.loads(output(run(home, "pool", "show", "licences", "--json")))["tokens"]
        assert [row["token"] for row in shown] == sorted(made)
        [held] = [row for row in shown if row["holder"] is not None]
        assert {key: value for key, value in held.items() if value is not None} == {
            "token": lease["token"],
            "fence": 1,
            "user": "ann",
            "holder": "ann",
            "leased_at": lease["expiry_time"] - 3600,
            "lease_expiry_time": lease["expiry_time"],
        }
        release = ("pool", "release", "licences", lease["token"])
        assert mistake(run(home, *release)) == ("The lease belongs to 'ann', holder 'ann': add --force to end it.")
        assert mistake(run(home, *release, "--force", "--reason", "a\nb")).startswith("reason: ")
        assert "--reason needs --force" in run(home, *release, "--reason", "x").stderr
        assert ann.ask("PUT", f"/licences/leases/{lease['token']}").status == 200
        released = run(home, *release, "--force", "--reason", "device is stuck")
        assert output(released) == "Released 1 token.\n"
        ended = {"user": "ann", "holder": "ann", "fence": 1, "reason": "device is stuck"}
        assert recorded(released) == [{"event": "pool_lease_released", "pool": "licences", **ended}]
        assert ann.ask("PUT", f"/licences/leases/{lease['token']}").status == 409
        assert mistake(run(home, "pool", "release", "licences", lease["token"])).startswith("The token is not leased")
        deleted = run(home, "pool", "delete", "licences", lease["token"])
        assert output(deleted) == "Deleted 1 token.\n"
        assert recorded(deleted) == [{"event": "pool_token_deleted", "pool": "licences"}]
        assert ann.ask("GET", f"/licences/tokens/{lease['token']}").status == 404
        assert mistake(run(home, "pool", "delete", "licences", lease["token"])) == "The pool has no such token."


def test_pools_are_listed_as_a_table_or_as_json(home: Path) -> None:
    output(run(home, "pool", "generate", "waiting"))
    assert json.loads(output(run(home, "pool", "list", "--json")))["pools"] == [
        {"name": "licences", "capacity": 3, "available": 0, "leased": 0, "waiting": 0, "reserved": None},
        {"name": "waiting", "capacity": None, "available": 1, "leased": 0, "waiting": 0, "reserved": None},
        {"name": "permits", "capacity": 1, "available": 1, "leased": 0, "waiting": 0, "reserved": None},
    ]
    head, *rows = output(run(home, "pool", "list")).splitlines()
    assert head.split() == ["name", "capacity", "available", "leased", "waiting"]
    assert [row.split() for row in rows] == [
        ["licences", "3", "0", "0", "0"],
        ["waiting", "1", "0", "0"],
        ["permits", "1", "1", "0", "0"],
    ]


@pytest.mark.parametrize("capacity", [1, 9])
def test_no_command_resizes_the_pool_of_a_running_server(tmp_path: Path, capacity: int) -> None:
    pool = "[pools.permits]\ncapacity = {}\nprefill = true\n"
    with worker(write_config(tmp_path, pool.format(3))) as server, Connection(server.port) as connection:
        write_config(tmp_path, pool.format(capacity))
        for command in (["pool", "list"], ["pool", "show", "permits"], ["tokens", "list"], ["migrate"], ["check"]):
            output(run(tmp_path, *command))
        assert PoolUser(connection).counts("permits") == (3, 0)


def test_a_listing_continues_after_a_token_and_shows_times(home: Path) -> None:
    first, second = sorted(
        json.loads(output(run(home, "pool", "generate", "waiting", "--count", "2", "--json")))["tokens"]
    )
    head, row = output(run(home, "pool", "show", "waiting", "--after", first)).splitlines()
    assert head.split() == ["token", "expires", "fence"]
    assert re.fullmatch(rf"{second[:8]}…  in (59m|1h) +0", row)
    [_, row] = output(run(home, "pool", "show", "waiting", "--after", first, "--full")).splitlines()
    assert row.startswith(f"{second}  in ")


def test_a_listing_that_may_go_on_says_so(home: Path) -> None:
    """On standard error, so that the JSON stays JSON."""
    generate = ("pool", "generate", "waiting", "--count")
    assert run(home, *generate, "999").returncode == 0
    assert run(home, "pool", "show", "waiting", "--json").stderr == ""
    assert run(home, *generate, "2").returncode == 0
    shown = run(home, "pool", "show", "waiting", "--json")
    assert shown.stderr.startswith("There may be more than these 1,000: continue with --after")
    last = json.loads(shown.stdout)["tokens"][-1]["token"]
    assert json.loads(shown.stdout)["next"] == last
    rest = run(home, "pool", "show", "waiting", "--json", "--after", last)
    assert (len(json.loads(rest.stdout)["tokens"]), rest.stderr) == (1, "")
    assert json.loads(rest.stdout)["next"] is None


def test_the_beginning_of_a_token_names_it(home: Path) -> None:
    with closing(sqlite3.connect(home / "tokenauth.db")) as database, database:
        for ending in ("1", "2"):
            row = ("licences", "abcdefgh" + ending * 56)
            database.execute(
                "INSERT INTO pool_tokens (pool, value, free_at, fence, retired) VALUES (?, ?, 0, 0, 0)", row
            )
    both = run(home, "pool", "delete", "licences", "abcdefgh")
    assert mistake(both) == "More than one token begins with that: write more of it."
    assert mistake(run(home, "pool", "delete", "licences", "abcdefg")) == "The pool has no such token."
    assert mistake(run(home, "pool", "release", "licences", "abcdefgh1")) == "The token is not leased."
    assert output(run(home, "pool", "delete", "licences", "abcdefgh1")) == "Deleted 1 token.\n"
    assert output(run(home, "pool", "delete", "licences", "abcdefgh")) == "Deleted 1 token.\n"
    assert output(run(home, "pool", "show", "licences")) == "No tokens.\n"


def test_members_are_shown_by_name_with_their_reservation(tmp_path: Path) -> None:
    text = """
    [pools.phones]
    [[pools.phones.members]]
    name = "pixel-8"
    labels = ["android", "arm"]
    note = "shelf 3"
    [[pools.phones.members]]
    name = "moto"
    """
    with worker(write_config(tmp_path, text)) as server, Connection(server.port) as connection:
        admin, ann = PoolUser(connection), PoolUser(connection, "ann")
        lease = ann.ask("POST", "/phones/leases", {"labels": ["arm"], "holder": "ci-7"}).json()
        reservation = {"until": "2h", "note": "demo", "for": "Bob"}
        until = admin.ask("PUT", "/phones/members/moto/reservation", reservation).json()["reservation"]["until"]
        [counts] = json.loads(output(run(tmp_path, "pool", "list", "--json")))["pools"]
        expected = {"name": "phones", "capacity": 2, "available": 0, "leased": 1, "waiting": 0, "reserved": 1}
        assert counts == expected
        shown = json.loads(output(run(tmp_path, "pool", "show", "phones", "--json")))
        moto, pixel = shown.pop("tokens")
        assert shown == {**expected, "next": None}
        assert list(moto) == list(pixel)
        assert (moto["name"], moto["labels"], moto["user"], moto["note"]) == ("moto", [], None, "")
        assert moto["reservation"] == {"until": until, "note": "demo", "for": "bob", "by": "admin"}
        assert pixel == {
            "name": "pixel-8", "labels": ["android", "arm"], "token": lease["token"], "fence": 1, "user": "ann",
            "holder": "ci-7", "leased_at": lease["expiry_time"] - 60, "lease_expiry_time": lease["expiry_time"],
            "expiry_time": None, "max_expiry_time": None, "reservation": None, "note": "shelf 3",
        }  # fmt: skip
        head, *rows = output(run(tmp_path, "pool", "show", "phones")).splitlines()
        assert head.split()[:3] == ["name", "labels", "token"]
        assert head.split()[-7:] == ["reserved", "until", "reserved", "for", "reserved", "by", "note"]
        assert rows[0].endswith("  bob           admin        demo")
        assert rows[1].endswith("  shelf 3")
        assert [row.split()[0] for row in rows] == ["moto", "pixel-8"]
        assert f"  {lease['token'][:8]}…  " in rows[1]
        deleted = run(tmp_path, "pool", "delete", "phones", "pixel-8")
        assert mistake(deleted).startswith("'pixel-8' is a member: remove it from config.toml")
        release = ("pool", "release", "phones", "pixel-8")
        assert mistake(run(tmp_path, *release)).startswith("The lease belongs to 'ann', holder 'ci-7'")
        assert output(run(tmp_path, *release, "--force")) == "Released 1 token.\n"
        assert ann.ask("PUT", f"/phones/leases/{lease['token']}").status == 409
        assert mistake(run(tmp_path, "pool", "release", "phones", "pixel")) == "The pool has no such token."


def test_members_are_reserved_for_a_user(tmp_path: Path) -> None:
    text = "[pools.phones]\nmembers = [{name = 'moto'}, {name = 'pixel-8'}]"
    with worker(write_config(tmp_path, text)) as server, Connection(server.port) as connection:
        admin, ann, bob = PoolUser(connection), PoolUser(connection, "ann"), PoolUser(connection, "bob")
        reserve = ("pool", "reserve", "phones", "moto")
        done = run(tmp_path, *reserve, "--until", "2h", "--note", "battery swap", "--for", "Bob")
        assert output(done) == "Reserved 1 member.\n"
        [event] = recorded(done)
        until = event.pop("until")
        named = {"pool": "phones", "member": "moto"}
        assert event == {"event": "pool_member_reserved", **named, "user": "bob", "note": "battery swap"}
        moto, _ = admin.members("phones")
        assert moto["reservation"] == {"until": until, "note": "battery swap", "for": "bob", "by": None}
        shown, _ = json.loads(output(run(tmp_path, "pool", "show", "phones", "--json")))["tokens"]
        assert shown["reservation"] == moto["reservation"]
        assert ann.ask("POST", "/phones/leases", {"labels": ["moto"]}).status == 409
        lease = {"labels": ["moto"], "holder": "ci-7"}
        assert bob.ask("POST", "/phones/leases", lease).status == 201
        shown = output(run(tmp_path, *reserve, "--until", "1h"))
        assert re.fullmatch(
            r"Reserved 1 member.\nbob \(holder ci-7\) still has it. The lease ends in \d+[sm] unless its client extends"
            r" it; `tokenauth pool release phones moto --force` ends it now.\n",
            shown,
        )
        assert output(run(tmp_path, *reserve, "--until", "1h", "--for", "bob")) == "Reserved 1 member.\n"
        assert admin.ask("PUT", "/phones/members/moto/reservation", {"until": "1h"}).status == 409
        assert admin.ask("PUT", "/phones/members/moto/reservation?force=true", {"until": "1h"}).status == 200
        refused = mistake(run(tmp_path, *reserve, "--until", "3h"))
        assert re.match(r"admin has reserved this member until \d{4}-\d\d-\d\d \d\d:\d\d UTC: add --force ", refused)
        done = run(tmp_path, *reserve, "--until", "tomorrow")
        assert done.returncode == 2
        assert "write a number and s, m, h or d, such as 30m, 2h or 1d." in " ".join(done.stderr.split())
        assert output(run(tmp_path, *reserve, "--until", "3h", "--force")).startswith("Reserved 1 member.\n")
        ended = run(tmp_path, "pool", "unreserve", "phones", "moto")
        assert output(ended) == "The member is not reserved.\n"
        assert recorded(ended) == [{"event": "pool_member_unreserved", **named}]
        assert "reservation" not in admin.members("phones")[0]


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["nokia", "--until", "1h"], 1, "The pool has no member of this name."),
        (["moto", "--until", "400d"], 1, "until: must be"),
        (["moto", "--until", "1h", "--note", "a\nb"], 1, "note: "),
        (["moto", "--until", "soon"], 2, "'soon' is not a duration from now: write a number and s, m, h or d"),
        (["moto"], 2, "Missing option '--until'"),
    ],
)
def test_a_wrong_reservation_is_one_line(tmp_path: Path, arguments: list[str], status: int, problem: str) -> None:
    with worker(write_config(tmp_path, "[pools.phones]\nmembers = [{name = 'moto'}]")):
        done = run(tmp_path, "pool", "reserve", "phones", *arguments)
        assert done.returncode == status
        assert problem in done.stderr.splitlines()[-1]


def test_the_waiting_line_is_listed_in_order(home: Path) -> None:
    with worker(home / "config.toml") as server, Connection(server.port) as connection:
        admin, ann = PoolUser(connection), PoolUser(connection, "ann")
        assert output(run(home, "pool", "line", "licences")) == "No requests in line.\n"
        assert ann.ask("POST", "/licences/leases", {"wait": 0, "request": "a", "holder": "ci-7"}).status == 202
        first = {"wait": 0, "request": "b", "count": 2, "priority": 5}
        assert admin.ask("POST", "/licences/leases", first).status == 202
        shown = json.loads(output(run(home, "pool", "line", "licences", "--json")))
        assert shown["waiting"] == 2
        first, second = ({**row, "since": 0} for row in shown["requests"])
        assert first == {
            "position": 1, "user": "admin", "holder": "admin", "since": 0, "count": 2, "priority": 5, "labels": [],
            "request": "b",
        }  # fmt: skip
        assert second == {
            "position": 2, "user": "ann", "holder": "ci-7", "since": 0, "count": 1, "priority": 0, "labels": [],
            "request": "a",
        }  # fmt: skip
        head, *rows = output(run(home, "pool", "line", "licences")).splitlines()
        assert head.split() == ["position", "user", "holder", "waits", "since", "count", "priority"]
        assert [row.split()[1] for row in rows] == ["admin", "ann"]


def test_one_command_ends_everything_of_a_user(home: Path) -> None:
    with worker(home / "config.toml") as server, Connection(server.port) as connection:
        ann, bob = PoolUser(connection, "ann"), PoolUser(connection, "bob")
        output(run(home, "pool", "generate", "licences", "--count", "3"))
        leases = [ann.ask("POST", "/licences/leases", {"holder": f"ci-{number}"}).json() for number in (1, 2)]
        others = bob.ask("POST", "/licences/leases").json()
        assert ann.ask("POST", "/permits/leases").status == 201
        assert bob.ask("POST", "/permits/leases", {"wait": 0, "request": "b"}).status == 202
        assert ann.ask("POST", "/permits/leases", {"wait": 0, "request": "a"}).status == 202
        command = ("tokens", "revoke", "--user", "ann")
        assert output(run(home, *command)) == "Revoked 1 token. 3 leases go on: --leases ends them.\n"
        again = run(home, *command)
        problem = "Error: 'ann' has no tokens. 3 leases go on: --leases ends them."
        assert (again.returncode, again.stderr.splitlines()[-1]) == (1, problem)
        ann = PoolUser(connection, "ann")
        assert ann.ask("PUT", f"/licences/leases/{leases[0]['token']}").status == 200
        done = run(home, *command, "--leases", "--reason", "left")
        assert output(done) == "Ended 1 token, 3 leases and 1 place in line of ann.\n"
        *ended, total = recorded(done)
        released = {"event": "pool_lease_released", "user": "ann", "fence": 1, "reason": "left"}
        assert sorted(ended, key=lambda event: str(event["holder"])) == [
            {**released, "pool": "permits", "holder": "ann"},
            {**released, "pool": "licences", "holder": "ci-1"},
            {**released, "pool": "licences", "holder": "ci-2"},
        ]
        counted = {"kind": "all", "count": 1, "leases": 3, "requests": 1}
        assert total == {"event": "tokens_revoked", "user": "ann", **counted}
        ann = PoolUser(connection, "ann")
        lost = ann.ask("PUT", f"/licences/leases/{leases[0]['token']}")
        assert (lost.status, "Reason: left." in lost.json()["error_description"]) == (409, True)
        assert bob.ask("PUT", f"/licences/leases/{others['token']}").status == 200
        assert bob.ask("POST", "/permits/leases", {"wait": 0, "request": "b"}).status == 201, "the next one in line"
        assert output(run(home, *command, "--leases")) == "Ended 1 token, 0 leases and 0 places in line of ann.\n"
        again = run(home, *command, "--leases")
        problem = "Error: 'ann' has no tokens, no lease and no place in line."
        assert (again.returncode, again.stderr.splitlines()[-1]) == (1, problem)
        output(run(home, "user", "remove", "ann"))
        assert mistake(run(home, *command, "--leases")) == (
            "No user 'ann' in config.toml, and no tokens, leases or places in line of a user with that name."
            " `tokenauth user list` shows the names."
        )


def test_leases_end_only_with_those_of_a_user(home: Path) -> None:
    for arguments, problem in (
        (["--all", "--leases"], "--leases needs --user."),
        (["--user", "ann", "--reason", "left"], "--reason needs --leases."),
    ):
        done = run(home, "tokens", "revoke", *arguments)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"Error: {problem}")
    assert "reason: " in mistake(run(home, "tokens", "revoke", "--user", "ann", "--leases", "--reason", "a\nb"))


def test_generating_more_than_fit_is_refused_in_one_line(home: Path) -> None:
    assert mistake(run(home, "pool", "generate", "licences", "--count", "4")).startswith("The pool has no capacity")
    assert mistake(run(home, "pool", "generate", "permits")).startswith("The pool has no capacity")
    for count in ("0", "1001"):
        refused = run(home, "pool", "generate", "waiting", "--count", count)
        assert refused.returncode == 2
        assert f"Error: Invalid value for '--count': {count} is not in the range 1<=x<=1000." in refused.stderr
    assert json.loads(output(run(home, "pool", "show", "licences", "--json")))["tokens"] == []


def test_a_permit_that_is_deleted_is_replaced(home: Path) -> None:
    [before] = json.loads(output(run(home, "pool", "show", "permits", "--json")))["tokens"]
    output(run(home, "pool", "delete", "permits", before["token"]))
    [after] = json.loads(output(run(home, "pool", "show", "permits", "--json")))["tokens"]
    assert after["token"] != before["token"]


@pytest.mark.parametrize("command", ["show", "line", "generate", "release", "reserve", "unreserve", "delete"])
def test_an_unknown_pool_is_one_line(home: Path, command: str) -> None:
    more = {"release": ["x"], "delete": ["x"], "reserve": ["x", "--until", "1h"], "unreserve": ["x"]}.get(command, [])
    assert mistake(run(home, "pool", command, "nowhere", *more)) == (
        "There is no pool 'nowhere' in config.toml; known are: licences, waiting, permits."
    )


ONLY_COMMANDS = {"tokens": {"status"}}
"""What only commands show."""

NAMES = {"tokens": "tokens", "pools": "pools", "members": "tokens", "free": "tokens", "line": "requests"}
"""Under which name the list is, in the JSON of the command and in that of the API."""


def test_json_calls_things_as_http_does(tmp_path: Path) -> None:
    """Each field of a command's JSON is one of the API's, with the same value where both have it."""
    text = """
    [pools.phones]
    members = [{name = "moto", labels = ["arm"], note = "shelf 3"}, {name = "pixel-8"}]
    [pools.plain]
    """
    with worker(write_config(tmp_path, text)) as server, Connection(server.port) as connection:
        admin, ann = PoolUser(connection), PoolUser(connection, "ann")
        assert ann.ask("POST", "/phones/leases", {"labels": ["arm"], "holder": "ci-7"}).status == 201
        admin.ask("PUT", "/phones/members/pixel-8/reservation", {"until": "2h", "note": "demo", "for": "bob"})
        admin.ask("PUT", "/phones/members/moto/reservation", {"until": "1h"})
        assert ann.ask("POST", "/phones/leases", {"wait": 0, "request": "r"}).status == 202
        admin.ask("POST", "/plain/tokens", {"count": 2})
        assert ann.ask("POST", "/plain/leases", {}).status == 201
        with server.client(headers={"X-Token": admin.token}) as client:

            def ask(path: str, kind: str) -> Any:
                return client.get(path).raise_for_status().json()[NAMES[kind]]

            over_http = {
                "tokens": ask("/api/tokens", "tokens"),
                "pools": ask("/api/pools", "pools"),
                "members": ask("/api/pools/phones", "members"),
                "free": ask("/api/pools/plain?limit=1000", "free"),
                "line": ask("/api/pools/phones/requests", "line"),
            }
        commands = {
            "tokens": ("tokens", "list", "--user", "admin"),
            "pools": ("pool", "list"),
            "members": ("pool", "show", "phones"),
            "free": ("pool", "show", "plain"),
            "line": ("pool", "line", "phones"),
        }
        for kind, command in commands.items():
            rows = json.loads(output(run(tmp_path, *command, "--json")))[NAMES[kind]]
            assert len(rows) == len(over_http[kind]) > 0
            fields = {name for same in over_http[kind] for name in same}
            for row, same in zip(rows, over_http[kind], strict=True):
                shown = {name: value for name, value in row.items() if value not in (None, "", [])}
                assert shown.keys() - ONLY_COMMANDS.get(kind, set()) <= fields
                common = shown.keys() & same.keys()
                assert {name: same[name] for name in common} == {name: shown[name] for name in common}
