"""`tokenauth doctor`: what it finds, and that it changes nothing."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Certificate, make_certificate, make_expired
from tests.support.journal import until
from tests.support.ports import free_port
from tests.support.servers import ROOT, TOKENAUTH, serve, write_config
from tests.support.skipping import skip_without
from tests.system.test_cli import environment, mistake, output, run
from tests.system.test_terminal import on_terminal
from tokenauth.cli import doctor
from tokenauth.server.control import AVAILABLE
from tokenauth.server.versions import KNOWN_UVICORN
from tokenauth.stores.schema import HEAD
from tokenauth.stores.sqlite.examination import network_file_system
from tokenauth.stores.sqlite.files import explain_loss


def examined(home: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit status, and what was found by the name of the check. The last one of a name counts."""
    done = run(home, "doctor", "--json", *arguments)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return done.returncode, {found["check"]: found for found in report["checks"]}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a directory with a configuration and a database."""
    write_config(tmp_path, f"[server]\nport = {free_port()}")
    run(tmp_path, "migrate")
    return tmp_path


@contextmanager
def database(home: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(home / "tokenauth.db", isolation_level=None)) as opened:
        yield opened


def test_all_is_well_and_nothing_is_changed(home: Path) -> None:
    before = {path.name: path.read_bytes() for path in home.iterdir()}
    code, found = examined(home)
    assert code == 0
    checks = ["configuration", "exposure", "port", "database", "disk", "clock", "login", "open files", "uvicorn"]
    assert list(found) == checks
    assert {one["status"] for name, one in found.items() if name not in {"disk", "open files"}} == {"ok"}
    assert f"with schema {HEAD}" in found["database"]["text"]
    assert "logins a second on" in found["login"]["text"]
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before


def test_check_deep_is_the_same(home: Path) -> None:
    shown = output(run(home, "check", "--deep"))
    assert shown.startswith("ok       configuration: config.toml has 3 users and 0 pools\n")
    assert shown.endswith("0 errors, 0 warnings.\n")


def test_all_mistakes_are_found_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[server]\nprot = 1\nport = "x"\n\n[tokens]\nidle = 5\n\n[[users]]\nusername = "ann"\n')
    done = run(tmp_path, "doctor", "--json")
    found = [one for one in json.loads(done.stdout)["checks"] if one["check"] == "configuration"]
    assert done.returncode == 1
    assert [(one["line"], one["text"].partition(": ")[0]) for one in found] == [
        (2, "server.prot"),
        (3, "server.port"),
        (6, "tokens.idle"),
        (8, "users[0].password"),
    ]
    assert found[0]["fix"] == "did you mean port?"


def test_a_missing_variable_is_one_finding(tmp_path: Path) -> None:
    config = write_config(tmp_path, f"[server]\nport = {free_port()}")
    config.write_text(config.read_text().replace("tokenauth.db", "${DATABASE}.db"))
    done = run(tmp_path, "doctor", "--json")
    checks = json.loads(done.stdout)["checks"]
    missing = [(one["text"], one["line"] is not None) for one in checks if one["status"] == "error"]
    assert missing == [("database.url: the environment has no DATABASE", True)]
    found = {one["check"]: one for one in checks}
    assert [found[name]["status"] for name in ("port", "login", "uvicorn")] == ["ok"] * 3
    assert (found["database"]["text"], done.returncode) == ("not examined", 1)


MISSING = {
    "a URL": ('database.url = "${A}"', ["database.url"], "database"),
    "two in a string": ('database.url = "sqlite+aiosqlite:///${A}${B}"', ["database.url", "database.url"], "database"),
    "a number": ('server.port = "${A}"', ["server.port"], "server"),
    "a password": ('users = [{username = "ann", password = "${A}"}]', ["users[0].password"], "users"),
    "a file of users": ('users_file = "${A}"', ["users_file.path"], "users"),
    "a file of audit": ('audit.file = "${A}"', ["audit.file"], "audit log"),
}


@pytest.mark.parametrize("name", MISSING)
def test_all_that_needs_no_missing_variable_is_examined(tmp_path: Path, name: str) -> None:
    """And nothing is said that is wrong with the variables only."""
    line, keys, unexamined = MISSING[name]
    port = "" if unexamined == "server" else "server.port = 0\n"
    (tmp_path / "config.toml").write_text(f"{line}\n{port}")
    done = run(tmp_path, "doctor", "--json")
    checks = json.loads(done.stdout)["checks"]
    errors = [one["text"] for one in checks if one["status"] == "error"]
    assert errors == [f"{key}: the environment has no {variable}" for key, variable in zip(keys, "AB", strict=False)]
    assert [one["check"] for one in checks if one["text"] == "not examined"] == [unexamined]
    rest = {"server": "port"}.get(unexamined, unexamined)
    expected = {"port", "database", "login", "open files", "uvicorn"} - {rest}
    assert expected <= {one["check"] for one in checks if one["text"] != "not examined"}
    assert ("nobody can log in" in {one["text"] for one in checks}) == (unexamined != "users")


def test_other_mistakes_are_found_beside_a_missing_variable(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[server]\nport = "${PORT}"\n[tokens]\nidle = 5\n')
    checks = json.loads(run(tmp_path, "doctor", "--json").stdout)["checks"]
    found = [(one["line"], one["text"].partition(": ")[0]) for one in checks if one["check"] == "configuration"]
    assert found == [(2, "server.port"), (4, "tokens.idle")]


@pytest.mark.parametrize("more", ["", '[server]\nhost = "0.0.0.0"\nport = 0'])
def test_a_risk_has_its_line_and_is_an_error_in_public(tmp_path: Path, more: str) -> None:
    path = write_config(tmp_path, f"{more}\n[passwords]\nmemory_kib = 16\ntime_cost = 1", _ONE_USER)
    code, found = examined(tmp_path)
    assert (code, found["risk weak_hash"]["status"]) == ((1, "error") if more else (0, "warning"))
    assert "$m=8,t=1" in path.read_text().splitlines()[found["risk weak_hash"]["line"] - 1]
    assert found["risk weak_hash"]["fix"] == "run `tokenauth user passwd ann`"


_ONE_USER = """
[[users]]
username = "ann"
password = "$argon2id$v=19$m=8,t=1,p=1$ACCE8N47B2DMOYfw/p/zng$ZwQLf+PKlO3PPaSNi0ba7hmCNp5dHfkyEhJ16bQr+KQ"
"""


def test_a_hash_that_cannot_be_used_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[[users]]\nusername = "ann"\npassword = "plain"\n')
    code, found = examined(tmp_path)
    assert (code, found["configuration"]["line"]) == (1, 3)


@pytest.mark.extended
def test_a_port_of_another_program_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        write_config(tmp_path, f"[server]\nport = {other.getsockname()[1]}")
        code, found = examined(tmp_path)
    assert (code, found["port"]["status"]) == (1, "error")
    assert "is in use: stop the other server" in found["port"]["text"]


def test_a_running_server_is_no_error(tmp_path: Path) -> None:
    port = free_port()
    with serve(write_config(tmp_path, f"[server]\nport = {port}"), on_port=False):
        code, found = examined(tmp_path)
    assert (code, found["port"]["text"]) == (0, f"tokenauth serves on 127.0.0.1 port {port}")


def test_a_running_server_that_is_not_ready_is_an_error(tmp_path: Path) -> None:
    port = free_port()
    write_config(tmp_path, f"[server]\nport = {port}")
    with serve(tmp_path / "config.toml", "--workers", "1", on_port=False) as server, server.client() as client:
        (tmp_path / "tokenauth.db").rename(tmp_path / "elsewhere.db")
        until(lambda: client.get("/readyz").status_code == 503, "the server has noticed")
        code, found = examined(tmp_path)
        reason = client.get("/readyz").json()["reason"]
    assert (code, found["port"]["status"]) == (1, "error")
    assert found["port"]["text"] == f"tokenauth serves on 127.0.0.1 port {port}, and is not ready: {reason}"
    assert found["port"]["fix"] == 'docs/production.md, "The database file is gone or was replaced"'
    assert found["database"]["status"] == "error"
    assert "is missing while a server uses it" in found["database"]["text"]
    assert found["database"]["fix"].startswith("put it back, then restart tokenauth")


def test_a_server_of_another_configuration_uses_another_database(tmp_path: Path) -> None:
    if not AVAILABLE:
        skip_without("Linux", "run the tests on Linux")
    port = free_port()
    path = write_config(tmp_path, f"[server]\nport = {port}")
    other = tmp_path / "other.toml"
    other.write_text(path.read_text().replace("tokenauth.db", "other.db"))
    other.chmod(0o600)
    with serve(path, on_port=False) as server:
        server.wait("started")
        _, found = examined(tmp_path, "-c", "other.toml")
    text = f"tokenauth serves on 127.0.0.1 port {port}, but not with other.toml: process"
    assert found["port"]["text"].startswith(text)
    assert found["database"]["status"] == "ok"
    assert "other.db does not exist yet" in found["database"]["text"]


def test_a_unix_socket_is_examined_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    write_config(tmp_path, f'[server]\nsocket = "{path}"\naccept_risks = ["weak_hash"]')
    run(tmp_path, "migrate")
    code, found = examined(tmp_path)
    assert (code, found["socket"]["text"]) == (0, f"{path} is free")
    assert "is for a proxy" in found["exposure"]["text"]
    assert "port" not in found
    assert not path.exists()
    with serve(tmp_path / "config.toml", on_port=False) as server:
        server.wait("started")
        code, found = examined(tmp_path)
        assert (code, found["socket"]["text"]) == (0, f"tokenauth serves on {path}")
    path.unlink(missing_ok=True)
    path.write_text("kept")
    code, found = examined(tmp_path)
    assert (code, found["socket"]["status"]) == (1, "error")
    assert found["socket"]["fix"] == "move it away, or change the path"
    assert "exists and is not a socket" in mistake(run(tmp_path, "check"))
    assert path.read_text() == "kept"


def test_a_certificate_is_examined(tmp_path: Path) -> None:
    def written(certificate: Certificate) -> None:
        write_config(tmp_path, f"[server]\nport = {port}\n{certificate.settings()}")

    port, made = free_port(), make_certificate(tmp_path)
    written(made)
    with serve(tmp_path / "config.toml", on_port=False) as server:
        server.wait("started")
        code, found = examined(tmp_path)
    assert (code, found["port"]["text"]) == (0, f"tokenauth serves on 127.0.0.1 port {port}")
    assert found["certificate"]["text"].startswith("it is for 127.0.0.1, localhost, until 20")
    written(make_expired(tmp_path))
    code, found = examined(tmp_path)
    assert (code, found["certificate"]["status"]) == (1, "error")
    assert found["certificate"]["text"] == "clients refuse it: certificate has expired"
    checked = output(run(tmp_path, "check")).splitlines()
    assert checked[0] == (
        "warning: server.tls_certificate: clients refuse it: certificate has expired; renew it, then reload"
    )
    assert found["certificate"]["line"] == 5
    year_zero = tmp_path / "zero"
    year_zero.mkdir()
    written(make_expired(year_zero, "00000201000000Z"))
    code, found = examined(tmp_path)
    assert (code, found["certificate"]["status"]) == (0, "warning")
    assert found["certificate"]["text"].startswith("its names and its end cannot be read: ")
    written(Certificate(made.certificate, tmp_path / "none"))
    assert "none cannot be read" in mistake(run(tmp_path, "check"))


@pytest.mark.parametrize("before", ["http", "https"])
def test_a_server_that_has_not_read_its_certificate_is_found(tmp_path: Path, before: str) -> None:
    port, made = free_port(), make_certificate(tmp_path)
    plain = f"[server]\nport = {port}\n"
    old, new = (plain, plain + made.settings()) if before == "http" else (plain + made.settings(), plain)
    with serve(write_config(tmp_path, old), on_port=False) as server:
        server.wait("started")
        write_config(tmp_path, new)
        after = "https" if before == "http" else "http"
        code, found = examined(tmp_path)
        assert (code, found["port"]["status"], found["port"]["text"]) == (
            0, "warning", f"tokenauth serves on 127.0.0.1 port {port}, and still speaks {before}, not {after}",
        )  # fmt: skip
        assert found["port"]["fix"] == "the file has changed since then: run `tokenauth reload`"
        asked = run(tmp_path, "health", "--ready")
        assert (asked.returncode, asked.stdout) == (0, "ready\n")
        assert f"127.0.0.1:{port} still speaks {before}, not {after}; the file has changed" in asked.stderr
        output(run(tmp_path, "reload"))
        assert examined(tmp_path)[1]["port"]["status"] == "ok"
        asked = run(tmp_path, "health")
        assert (asked.stdout, asked.stderr) == ("ok\n", "")


def test_a_certificate_that_is_not_served_yet_is_found(tmp_path: Path) -> None:
    port, made = free_port(), make_certificate(tmp_path)
    with serve(write_config(tmp_path, f"[server]\nport = {port}\n{made.settings()}"), on_port=False) as server:
        server.wait("started")
        assert examined(tmp_path)[1]["certificate"]["status"] == "ok"
        renewed = make_expired(tmp_path, "400201000000Z")
        renewed.certificate.replace(made.certificate)
        renewed.key.replace(made.key)
        _, found = examined(tmp_path)
        assert (found["certificate"]["status"], found["certificate"]["fix"]) == ("warning", "reload")
        assert (
            "until 2040-02-01 00:00 UTC, but the server still serves another one, until 20"
            in (found["certificate"]["text"])
        )
        output(run(tmp_path, "reload"))
        assert examined(tmp_path)[1]["certificate"]["status"] == "ok"


@pytest.mark.parametrize(("days", "status"), [(13, "warning"), (15, "ok")])
def test_a_certificate_that_ends_soon_is_a_warning(tmp_path: Path, days: int, status: str) -> None:
    end = time.strftime("%y%m%d%H%M%SZ", time.gmtime(time.time() + days * 86400))
    write_config(tmp_path, f"[server]\nport = {free_port()}\n{make_expired(tmp_path, end).settings()}")
    assert examined(tmp_path)[1]["certificate"]["status"] == status


def test_the_alert_for_a_certificate_is_as_early_as_doctor() -> None:
    alert = (ROOT / "docs" / "metrics.md").read_text()
    assert f"expiry_timestamp_seconds - time() < {doctor.RENEWAL // 86400} * 86400\n" in alert


def test_a_server_of_another_configuration_is_found(tmp_path: Path) -> None:
    """Such as after `init` beside a server that runs."""
    if not AVAILABLE:
        skip_without("Linux", "run the tests on Linux")
    port = free_port()
    with serve(write_config(tmp_path, f"[server]\nport = {port}"), on_port=False) as server:
        server.wait("started")
        (tmp_path / "tokenauth.toml").write_text((tmp_path / "config.toml").read_text())
        (tmp_path / "tokenauth.toml").chmod(0o600)
        _, found = examined(tmp_path)
        assert found["port"]["status"] == "warning"
        text = f"tokenauth serves on 127.0.0.1 port {port}, but not with tokenauth.toml: process"
        assert found["port"]["text"].startswith(text)
        refused = mistake(run(tmp_path, "reload"))
        assert re.search(r" (Process \d+ serves another file|Processes \d.* serve other files): name that", refused)
        assert examined(tmp_path, "-c", "config.toml")[1]["port"]["status"] == "ok"


@pytest.mark.parametrize(
    ("problem", "section"),
    [
        ("it cannot be used: no host is the primary: a:5432 is a standby", "No host is the primary"),
        ("store not writable: commits wait for a synchronous standby", "Commits wait for a standby"),
        ("store not writable: database or disk is full", "The disk is full"),
        ("store not writable: attempt to write a readonly database", "A file has the wrong mode"),
        ("it cannot be used: password authentication failed for user 'tokenauth'", "A secret changes"),
        ("store not writable: disk I/O error: the disk is full, 8 KiB are free", "The disk is full"),
        ("; ".join(explain_loss("/none")), "The database file is gone or was replaced"),
        ("; ".join(explain_loss(__file__)), "The database file is gone or was replaced"),
        ("it cannot be used: ConnectionRefusedError", "The database restarts"),
        ("it cannot be used: disk I/O error: /srv/fullstack/missing/readonly.db", "The database restarts"),
        ("it cannot be read: unable to open /srv/password-store/replaced.db", "The database restarts"),
    ],
)
def test_a_problem_leads_to_its_section(problem: str, section: str) -> None:
    assert f"### {section}\n" in (ROOT / "docs" / "production.md").read_text()
    assert doctor._runbook(problem, "The database restarts") == f'docs/production.md, "{section}"'


def test_a_locked_database_is_an_error(home: Path) -> None:
    with database(home) as other:
        other.execute("BEGIN IMMEDIATE")
        code, found = examined(home)
    assert (code, found["database"]["status"]) == (1, "error")
    assert "cannot be written: database is locked" in found["database"]["text"]
    assert found["database"]["fix"] == 'docs/production.md, "The database is locked"'


def test_a_malformed_database_is_to_be_restored(home: Path) -> None:
    with (home / "tokenauth.db").open("r+b") as file:
        file.seek(100)  # after the header
        file.write(b"\xff" * 900)
    code, found = examined(home)
    assert (code, found["database"]["status"]) == (1, "error")
    assert "cannot be read: database disk image is malformed" in found["database"]["text"]
    assert found["database"]["fix"] == 'docs/production.md, "Backup"'


@pytest.mark.parametrize(("schema", "status", "fix"), [("2.1", "warning", "back it up"), ("9.1", "error", "install")])
def test_another_schema_is_said(home: Path, schema: str, status: str, fix: str) -> None:
    with database(home) as db:
        db.execute("UPDATE alembic_version SET version_num = ?", (schema,))
    code, found = examined(home)
    assert (code, found["database"]["status"]) == (int(status == "error"), status)
    assert found["database"]["fix"].startswith(fix)


def test_a_clock_that_was_set_back_is_an_error(home: Path) -> None:
    with database(home) as db:
        db.execute("INSERT OR REPLACE INTO marks (name, at) VALUES ('clock', 4000000000)")
    code, found = examined(home)
    assert (code, found["clock"]["status"]) == (1, "error")
    assert "behind the latest time in the database" in found["clock"]["text"]
    assert "; if it is right now, it was ahead before, and you can only wait" in found["clock"]["fix"]


def test_a_database_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    write_config(tmp_path, "[server]\nport = 0")
    code, found = examined(tmp_path)
    assert (code, found["database"]["status"]) == (0, "ok")
    assert os.listdir(tmp_path) == ["config.toml"]


def test_a_database_that_was_moved_is_an_error(home: Path) -> None:
    """SQLite deletes the -wal file beside a new database: the latest commits of the one that was moved."""
    with database(home) as db:
        db.execute("DELETE FROM marks")  # so there is a -wal file
        (home / "tokenauth.db").rename(home / "moved.db")
    before = (home / "tokenauth.db-wal").read_bytes()
    assert before
    code, found = examined(home)
    assert (code, found["database"]["status"]) == (1, "error")
    assert "is missing, but its -wal file" in found["database"]["text"]
    assert "is missing, but its -wal file" in mistake(run(home, "migrate"))
    assert (home / "tokenauth.db-wal").read_bytes() == before
    (home / "moved.db").rename(home / "tokenauth.db")
    assert examined(home)[0] == 0


def test_a_file_that_is_no_database_is_an_error(home: Path) -> None:
    (home / "tokenauth.db").write_text("precious")
    code, found = examined(home)
    assert (code, found["database"]["status"]) == (1, "error")
    assert (home / "tokenauth.db").read_text() == "precious"


@pytest.mark.extended
def test_a_disk_that_takes_no_data_is_an_error(home: Path) -> None:
    command = f"ulimit -f 96; {TOKENAUTH} doctor --json"  # blocks of 512 bytes: enough for the -shm file
    done = subprocess.run(["sh", "-c", command], cwd=home, env=environment({}), capture_output=True, check=False)
    found = {one["check"]: one for one in json.loads(done.stdout)["checks"]}
    assert (done.returncode, found["disk"]["status"]) == (1, "error")
    assert "none can be written: File too large" in found["disk"]["text"]
    assert "The disk is full" in found["disk"]["fix"]
    assert f"is readable, but not writable, with schema {HEAD}" in found["database"]["text"]
    assert found["database"]["status"] == "error"


@pytest.mark.extended
def test_few_open_files_are_a_warning(home: Path) -> None:
    command = f"ulimit -n 1000; {TOKENAUTH} doctor --json"
    done = subprocess.run(["sh", "-c", command], cwd=home, env=environment({}), capture_output=True, check=True)
    (found,) = [one for one in json.loads(done.stdout)["checks"] if one["check"] == "open files"]
    assert found["status"] == "warning"
    assert "LimitNOFILE=65536" in found["fix"]


MOUNTS = """overlay / overlay rw 0 0
/dev/sda1 /srv ext4 rw 0 0
nas:/a /srv/my\\040share nfs4 rw 0 0
//nas/b /mnt cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [("/srv/my share/x", "nfs4"), ("/srv/my", None), ("/mnt", "cifs"), ("/mnt2", None), ("/", None)],
)
def test_network_file_systems_are_recognized(tmp_path: Path, directory: str, kind: str | None) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert network_file_system(directory, str(tmp_path / "mounts")) == kind


def test_the_known_releases_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"uvicorn>=0.53,<0.55"' in text
    assert KNOWN_UVICORN == ("0.53.", "0.54.")


@pytest.mark.extended
def test_it_fits_80_columns(home: Path) -> None:
    with on_terminal(home, 'stty cols 80; "$TOKENAUTH" doctor 2>&1; echo "exit $?"') as found:
        found.expect("exit 0")
    assert max(map(len, found.shown.splitlines())) <= 80


def test_migrate_asks_before_a_new_generation(home: Path) -> None:
    with database(home) as db:
        db.execute("UPDATE alembic_version SET version_num = '2.1'")
    with on_terminal(home, '"$TOKENAUTH" migrate 2>&1; echo "exit $?"') as found:
        found.expect("The database has schema 2.1. Upgrading it to")
        found.expect("Stop all servers of an older generation first. Go on? [y/N]: ")
        found.type("n")
        found.expect("Aborted!")
        found.expect("exit 1")
    with database(home) as db:
        assert db.execute("SELECT version_num FROM alembic_version").fetchall() == [("2.1",)]
