"""The audit log of `tokenauth serve` with two workers: each act is one line, with who, to whom, from where and how."""

import json
import os
import resource
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.promises.test_3_held_log_outs import fill_the_disk, limit_files
from tests.support.auditing import read_audit, wait_for
from tests.support.journal import fill, until
from tests.support.main_process import workers_of
from tests.support.servers import Server, log_in, serve, worker, write_config
from tests.support.suspended import suspended
from tokenauth.audit.chain import Chain

SETTINGS = """
[server]
workers = 2
trusted_proxies = ["127.0.0.1"]
accept_risks = ["shipped_password", "weak_hash", "no_trusted_proxy"]
[throttle]
free = 100
[audit]
file = "{directory}/audit.jsonl"
[pools.phones]
capacity = 3
[[pools.devices.members]]
name = "pixel"
"""

TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
TRACED = {"trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331"}
REQUEST_ID = "7d1c1b7e-7c9b-4a6e-9d2a-7d1c1b7e7c9b"
SENT = {"X-Forwarded-For": "192.0.2.7", "User-Agent": "probe/1.0", "X-Request-ID": REQUEST_ID, **TRACE}
FROM = {"via": "http", "address": "192.0.2.7", "user_agent": "probe/1.0", "request_id": REQUEST_ID, **TRACED}


OTHER_PROCESS = "cannot be written by another process: the log has the reason"

OTHER_NETWORKS = iter(range(200))


class Audited:
    """A server, a client, and what was audited since the last look."""

    def __init__(self, server: Server, client: httpx.Client, file: Path) -> None:
        self.server = server
        self.client = client
        self.file = file
        self._seen = len(read_audit(file))

    def new(self, count: int) -> list[dict[str, Any]]:
        """Wait for that many records since the last call, and check that they say where they come from."""
        records = wait_for(self.file, self._seen + count)[self._seen :]
        self._seen += len(records)
        assert len(records) == count
        for record in records:
            assert FROM.items() <= record.items()
        return [{key: record[key] for key in record if key in SHOWN} for record in records]


SHOWN = {"action", "result", "by", "user", "target", "by_token", "details"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    directory = tmp_path_factory.mktemp("audit")
    with serve(write_config(directory, SETTINGS.format(directory=directory))) as server:
        wait_for(directory / "audit.jsonl", action="upgrade_schema")
        yield server, directory / "audit.jsonl"


@pytest.fixture
def audited(running: tuple[Server, Path]) -> Iterator[Audited]:
    server, file = running
    with server.client(headers=SENT) as client:
        yield Audited(server, client, file)


def id_of(client: httpx.Client, token: str) -> str:
    return str(client.get("/api/me", headers={"X-Token": token}).json()["id"])


def test_login_and_logout_name_the_user(audited: Audited) -> None:
    token = log_in(audited.client)
    id_ = id_of(audited.client, token)
    audited.client.delete("/api/token", headers={"X-Token": token}).raise_for_status()
    assert audited.new(2) == [
        {"action": "login", "result": "ok", "by": "admin", "user": "admin", "target": id_},
        {"action": "logout", "result": "ok", "user": "admin", "target": id_},
    ]


@pytest.mark.parametrize(("name", "shown"), [("ANN", "ann"), ("hunter2-typed-as-name", "(unknown)")])
def test_a_failed_login_names_only_users(audited: Audited, name: str, shown: str) -> None:
    answer = audited.client.post("/api/token", json={"username": name, "password": "wrong"})
    assert answer.status_code == 401
    assert audited.new(1) == [{"action": "login", "result": "invalid_credentials", "user": shown}]
    assert "hunter2" not in audited.file.read_text()


def test_tokens_are_issued_rotated_and_revoked_by_whom(audited: Audited) -> None:
    login = {"X-Token": log_in(audited.client, "ann", "ann-secret")}
    mine = id_of(audited.client, login["X-Token"])
    made = audited.client.post("/api/tokens", json={"name": "ci", "scopes": ["read"]}, headers=login).json()
    named = made["id"]
    successor = audited.client.post(f"/api/tokens/{named}/rotate", json={"overlap": "1h"}, headers=login).json()
    new = successor["id"]
    audited.client.delete(f"/api/tokens/{new}", headers=login).raise_for_status()
    audited.client.delete("/api/tokens?keep=current", headers=login).raise_for_status()
    by = {"result": "ok", "by": "ann", "user": "ann", "by_token": mine}
    assert audited.new(5)[1:] == [
        {
            "action": "issue_token", "target": named, **by,
            "details": {"name": "ci", "scopes": ["read"], "expires_at": made["expiry_time"]},
        },
        {
            "action": "rotate_token", "target": named, **by,
            "details": {
                "new_id": new, "name": "ci", "scopes": ["read"], "expires_at": successor["expiry_time"],
                "overlap": 3600,
            },
        },
        {"action": "revoke_token", "target": new, **by},
        {"action": "revoke_tokens", "target": "login", "details": {"count": 0}, **by},
    ]  # fmt: skip


def test_an_admin_who_revokes_is_not_the_owner(audited: Audited) -> None:
    log_in(audited.client, "ann", "ann-secret")
    admin = {"X-Token": log_in(audited.client)}
    audited.client.delete("/api/tokens?user=ann", headers=admin).raise_for_status()
    *_, revoked = audited.new(3)
    assert (revoked["action"], revoked["by"], revoked["user"]) == ("revoke_tokens", "admin", "ann")
    assert revoked["details"]["count"] >= 1


def test_a_revocation_that_fails_halfway_is_an_act(tmp_path: Path) -> None:
    file, database = tmp_path / "audit.jsonl", tmp_path / "tokenauth.db"
    with worker(write_config(tmp_path, f'[audit]\nfile = "{file}"')) as server, server.client() as client:
        admin = {"X-Token": log_in(client)}
        fill(database, 10_001, 1, time.time(), lambda _: int(time.time()) + 3600)  # one more than a step deletes
        with closing(sqlite3.connect(database)) as db, db:
            db.execute("UPDATE tokens SET username = 'ann' WHERE username = 'user0'")
            last = "NOT EXISTS (SELECT 1 FROM tokens LIMIT 1 OFFSET 2)"
            db.execute(f"CREATE TRIGGER fault BEFORE DELETE ON tokens WHEN {last} BEGIN SELECT json('no JSON'); END")
        assert client.delete("/api/tokens?user=ann", headers=admin).status_code == 503
        act = wait_for(file, action="revoke_tokens")[-1]
    assert (act["result"], act["by"], act["user"], act["target"]) == ("interrupted", "admin", "ann", "login")
    assert act["details"] == {"count": 10_000}


@pytest.mark.parametrize("path", ["/api/tokens?user=admin", "/auth?scope=admin", "/api/pools/phones/tokens"])
def test_a_missing_scope_is_an_act(audited: Audited, path: str) -> None:
    token = log_in(audited.client, "ann", "ann-secret")
    method = "POST" if path.startswith("/api/pools") else "GET"
    answer = audited.client.request(method, path, headers={"X-Token": token})
    assert answer.status_code == 403
    _, refused = audited.new(2)
    assert (refused["action"], refused["result"], refused["by"]) == ("access", "insufficient_scope", "ann")
    assert refused["by_token"] == id_of(audited.client, token)
    assert refused["details"] == {"scope": "admin"}


def test_managers_of_pools_are_audited(audited: Audited) -> None:
    admin = {"X-Token": log_in(audited.client)}
    pool = "/api/pools/devices"
    reservation = f"{pool}/members/pixel/reservation"
    lease = audited.client.post(f"{pool}/leases", json={"holder": "ci-7"}, headers=admin).json()["token"]
    audited.client.put(reservation, json={"until": "1h", "note": "repair"}, headers=admin).raise_for_status()
    audited.client.delete(reservation, headers=admin).raise_for_status()
    forced = audited.client.request(
        "DELETE", f"{pool}/leases/{lease}?force=true", json={"reason": "stuck"}, headers=admin
    )
    forced.raise_for_status()
    made = audited.client.post("/api/pools/phones/tokens", json={"count": 2}, headers=admin).json()["tokens"]
    audited.client.delete(f"/api/pools/phones/tokens/{made[0]}", headers=admin).raise_for_status()
    records = audited.new(6)[1:]
    assert [(record["action"], record["target"], record["by"]) for record in records] == [
        ("reserve_member", "devices/pixel", "admin"),
        ("unreserve_member", "devices/pixel", "admin"),
        ("end_lease", "devices/pixel", "admin"),
        ("generate_pool_tokens", "phones", "admin"),
        ("delete_pool_token", "phones", "admin"),
    ]
    assert records[0]["details"]["note"] == "repair"
    assert records[2]["details"]["reason"] == "stuck"
    assert records[3]["details"] == {"count": 2}
    text = audited.file.read_text()
    assert not [value for value in (lease, *made) if value in text]


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        ("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-ever", True),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", False),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", False),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", False),
        ("hunter2", False),
        ("", False),
    ],
)
def test_only_a_valid_traceparent_is_logged(audited: Audited, sent: str, found: bool) -> None:
    before = len(audited.server.events("login_failed")), len(read_audit(audited.file))
    headers = {"traceparent": sent, "X-Forwarded-For": f"198.51.{next(OTHER_NETWORKS)}.1"}  # or it would be counted
    audited.client.post("/api/token", json={"username": "ann", "password": "wrong"}, headers=headers)
    record = wait_for(audited.file, before[1] + 1)[-1]
    until(lambda: len(audited.server.events("login_failed")) > before[0], "the failure is logged")
    line = audited.server.events("login_failed")[before[0]]
    for each in (record, line):
        assert (TRACED.items() <= each.items()) is found
        assert ("trace_id" in each) is found


def test_two_traceparents_are_ignored(audited: Audited) -> None:
    before = len(read_audit(audited.file))
    headers = [*(SENT | {"X-Forwarded-For": "203.0.113.7"}).items(), *TRACE.items()]
    httpx.post(f"{audited.server.url}/api/token", json={"username": "ann", "password": "wrong"}, headers=headers)
    assert "trace_id" not in wait_for(audited.file, before + 1)[-1]


def test_a_token_in_an_agent_is_hidden(audited: Audited) -> None:
    token = log_in(audited.client)
    audited.new(1)
    before = len(wait_for(audited.file, action="login", by="admin"))
    log_in(audited.client, headers={"User-Agent": f"me/{token} (x)", "X-Request-ID": token})
    record = wait_for(audited.file, before + 1, action="login", by="admin")[-1]
    assert record["user_agent"] == "me/(token) (x)"
    assert "request_id" not in record


def test_an_address_is_believed_of_proxies_only(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with serve(write_config(tmp_path, f'[audit]\nfile = "{file}"\n')) as server, server.client(headers=SENT) as client:
        log_in(client)
        [record] = wait_for(file, action="login")
    assert record["address"] == "127.0.0.1"


def test_a_flood_of_wrong_logins_rotates_nothing_away(tmp_path: Path) -> None:
    """Its lines are few, and say how many requests they stand for."""
    settings = f'[throttle]\nfree = 3\n[audit]\nfile = "{tmp_path}/audit.jsonl"\n'
    with serve(write_config(tmp_path, settings), "--workers", "2") as server, server.client() as client:
        statuses = [
            client.post("/api/token", json={"username": name, "password": "wrong"}).status_code
            for name in ("ann", "typed-as-name") * 200
        ]
        assert server.stop() == 0
    assert set(statuses) == {401, 429}
    logins = [record for record in read_audit(tmp_path / "audit.jsonl") if record["action"] == "login"]
    assert sum(record.get("details", {}).get("count", 1) for record in logins) == 400
    assert len(logins) <= 2 * 2 * 2 * 2  # by worker, name and result: the first, and all others
    assert {record["user"] for record in logins} == {"ann", "(unknown)"}
    refused = sum(
        record.get("details", {}).get("count", 1) for record in logins if record["result"] == "too_many_attempts"
    )
    assert refused == statuses.count(429)


def test_start_reload_and_stop_are_audited(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    config = write_config(tmp_path, f'[audit]\nfile = "{file}"\n')
    with serve(config) as server:
        [start] = wait_for(file, action="start")
        server.process.send_signal(signal.SIGHUP)
        wait_for(file, action="reload", result="ok")
        config.write_text(config.read_text() + "\n[nonsense]\n")
        server.process.send_signal(signal.SIGHUP)
        [refused] = wait_for(file, action="reload", result="refused")
        assert "nonsense" in refused["details"]["detail"]
        assert server.stop() == 0
    [stop] = wait_for(file, action="stop")
    assert {record["via"] for record in (start, refused, stop)} == {"server"}
    assert Chain(file).verify().problem is None


def test_a_stop_writes_all_acts(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with serve(write_config(tmp_path, f'[audit]\nfile = "{file}"\n'), "--workers", "2") as server:
        with server.client() as client:
            for _ in range(20):
                log_in(client)
        assert server.stop() == 0
    assert sum(record["action"] == "login" for record in read_audit(file)) == 20
    assert Chain(file).verify().problem is None


def test_a_killed_worker_breaks_no_line(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with serve(write_config(tmp_path, f'[audit]\nfile = "{file}"\n'), "--workers", "2") as server:
        for count in (1, 2, 3):
            with server.client() as client:
                log_in(client)
            wait_for(file, count, action="login")
            os.kill(workers_of(server)[0], signal.SIGKILL)
        with server.client() as client:
            log_in(client)
        assert server.stop() == 0
    verdict = Chain(file).verify()
    assert verdict.problem is None
    assert len(wait_for(file, action="login")) == 4


def test_logins_go_on_without_the_directory(tmp_path: Path) -> None:
    """What waits is written when the directory is there; `/readyz` says it, and stays 200."""
    directory = tmp_path / "later"
    file = directory / "audit.jsonl"
    with serve(write_config(tmp_path, f'[audit]\nfile = "{file}"\n')) as server:
        with server.client() as client:
            token = log_in(client)
            client.delete("/api/token", headers={"X-Token": token}).raise_for_status()
            until(lambda: len(server.events("audit_not_writable")) == 2, "the main process and the worker log it")
            ready = client.get("/readyz")
            assert ready.status_code == 200
            assert ready.json() == {"status": "ready", "audit": "cannot be written: No such file or directory"}
            directory.mkdir()
            until(lambda: len(server.events("audit_writable_again")) == 2, "both can write again")
            assert client.get("/readyz").json() == {"status": "ready"}
        wait_for(file, action="start")
        wait_for(file, action="logout")
        assert server.stop() == 0
        assert len(server.events("audit_not_writable")) == 2
    assert Chain(file).verify().problem is None


def test_each_worker_says_that_another_cannot_write(tmp_path: Path) -> None:
    """Only the one that has created the database had an act."""
    config = write_config(tmp_path, f'[audit]\nfile = "{tmp_path}/later/audit.jsonl"\n')
    with serve(config, "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        one, other = workers_of(server)

        def said() -> set[str | None]:
            """Return what each worker says, while the other one is stopped and takes no connection."""
            found = set()
            for stopped in (one, other):
                with suspended([stopped]), server.client() as client:
                    found.add(client.get("/readyz").raise_for_status().json().get("audit"))
            return found

        own = "cannot be written: No such file or directory"
        until(lambda: said() == {own, OTHER_PROCESS}, "both say it")


def test_a_full_disk_stops_no_login(tmp_path: Path) -> None:
    """The file is longer than the server may make any file; its database is not."""
    file = tmp_path / "audit.jsonl"
    chain = Chain(file)
    chain.append([json.dumps({"action": "test", "text": "x" * 800_000}).encode()] * 10)
    with serve(write_config(tmp_path, f'[audit]\nfile = "{file}"\n')) as server, server.client() as client:
        wait_for(file, 12)  # with the schema and the start
        limit_files(server, file.stat().st_size)
        token = log_in(client)
        client.delete("/api/token", headers={"X-Token": token}).raise_for_status()
        server.wait("audit_not_writable", reason="File too large")
        assert client.get("/readyz").json() == {"status": "ready", "audit": "cannot be written: File too large"}
        log_in(client)
        limit_files(server, resource.RLIM_INFINITY)
        wait_for(file, 2, action="login")
        assert server.stop() == 0
    assert [record["action"] for record in read_audit(file)][12:15] == ["login", "logout", "login"]
    assert chain.verify().problem is None


def test_a_held_logout_is_not_of_a_later_request(tmp_path: Path) -> None:
    """It is written by a task that outlives the request."""
    file = tmp_path / "audit.jsonl"
    with serve(write_config(tmp_path, f'[audit]\nfile = "{file}"\n')) as server, server.client(headers=SENT) as client:
        token, *_ = [log_in(client) for _ in range(30)]
        fill_the_disk(server, tmp_path / "tokenauth.db")
        client.delete("/api/token", headers={"X-Token": token}).raise_for_status()
        [held] = wait_for(file, action="logout", result="held")
        assert TRACED.items() <= held.items()
        limit_files(server, resource.RLIM_INFINITY)
        [late] = wait_for(file, action="logout", result="ok")
        assert (late["via"], late["details"]["late"], late["target"]) == ("server", True, held["target"])
        line = server.wait("token_revoked")
        assert "trace_id" not in {**late, **line}


def test_a_login_that_is_one_too_many_says_which_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    config = write_config(tmp_path, f'[audit]\nfile = "{file}"\n[tokens]\nper_user = 1\n')
    with serve(config) as server, server.client() as client:
        log_in(client)
        log_in(client)
        server.wait("token_revoked", user="admin", reason="per_user", by="admin")
        [ended] = wait_for(file, action="revoke_token")
    first, _ = (record for record in read_audit(file) if record["action"] == "login")
    assert (ended["target"], ended["by"], ended["user"]) == (first["target"], "admin", "admin")
    assert ended["details"] == {"reason": "per_user"}


def test_an_oauth_client_that_revokes_is_named(audited: Audited) -> None:
    token = log_in(audited.client, "ann", "ann-secret")
    answer = audited.client.post("/oauth/revoke", data={"token": token}, auth=("bob", "bob-secret"))
    assert answer.status_code == 200
    _, revoked = audited.new(2)
    assert (revoked["action"], revoked["by"], revoked["user"]) == ("revoke_token", "bob", "ann")


def test_an_admin_clears_a_user_and_a_network(audited: Audited) -> None:
    admin = {"X-Token": log_in(audited.client)}
    audited.client.post("/api/token", json={"username": "bob", "password": "wrong"})
    freed = audited.client.delete("/api/throttle", params={"user": "bob", "address": "192.0.2.7"}, headers=admin)
    assert freed.status_code == 204
    *_, record = audited.new(3)
    assert (record["action"], record["by"], record["user"]) == ("clear_throttle", "admin", "bob")
    assert (record.get("target"), record["details"]) == (None, {"addresses": "192.0.2.0/24"})
    before = len(read_audit(audited.file))
    # nobody has logged in there: a failure of a known user does not count for its network
    network = f"198.51.{next(OTHER_NETWORKS)}"
    headers = {"X-Forwarded-For": f"{network}.1"}
    audited.client.post("/api/token", json={"username": "bob", "password": "wrong"}, headers=headers)
    freed = audited.client.delete("/api/throttle", params={"network": f"{network}.0/24"}, headers=admin)
    assert freed.status_code == 204
    *_, record = wait_for(audited.file, before + 2)
    assert (record["action"], record["by"], record["target"]) == ("clear_throttle", "admin", f"{network}.0/24")
    assert "user" not in record
    assert "details" not in record


def reload(server: Server) -> None:
    before = len(server.events("reloaded"))
    server.process.send_signal(signal.SIGHUP)
    until(lambda: len(server.events("reloaded")) > before, "it has reloaded")


def test_what_a_reload_cannot_write_is_written_later(tmp_path: Path) -> None:
    file = tmp_path / "none" / "audit.jsonl"
    with serve(write_config(tmp_path, f'[audit]\nfile = "{file}"\n'), "--workers", "2") as server:
        for _ in range(2):
            with server.client() as client:
                token = log_in(client)
            reload(server)
        with server.client(headers={"X-Token": token}) as client:  # of a worker that had no act
            ready, status = {"status": "ready", "audit": OTHER_PROCESS}, {"up": False, "lost": 0}
            until(lambda: client.get("/readyz").raise_for_status().json() == ready, "the main process has tried")
            assert client.get("/api/status").raise_for_status().json()["audit"] == status
        file.parent.mkdir()
        wait_for(file, action="reload")
        assert server.stop() == 0
        assert server.events("audit_lines_lost") == []
    actions = [record["action"] for record in read_audit(file)]
    assert {name: actions.count(name) for name in ("start", "login", "reload", "stop")} == {
        "start": 1, "login": 2, "reload": 2, "stop": 1,
    }  # fmt: skip
    assert Chain(file).verify().problem is None


def test_what_a_stop_cannot_write_is_counted(tmp_path: Path) -> None:
    with serve(write_config(tmp_path, f'[audit]\nfile = "{tmp_path}/none/audit.jsonl"\n')) as server:
        with server.client() as client:
            log_in(client)
        server.wait("audit_not_writable")
        assert server.stop() == 0
        assert sum(line["count"] for line in server.events("audit_lines_lost")) >= 3
