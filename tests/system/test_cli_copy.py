"""`tokenauth copy`: while a server runs, after a kill, and what it prints."""

import asyncio
import json
import os
import random
import re
import signal
import sqlite3
import sys
import threading
from asyncio import to_thread
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from subprocess import TimeoutExpired

import pytest

from tests.support import population
from tests.support.journal import until
from tests.support.postgres import Cluster
from tests.support.processes import Forked
from tests.support.servers import Server, log_in, probe, worker, write_config
from tests.system.postgres.nodes import fetch
from tests.system.test_cli import mistake, run, script
from tests.system.test_terminal import on_terminal
from tokenauth.stores.schema import HEAD
from tokenauth.stores.tables import metadata

INTERRUPTED = """
import signal
from tokenauth.cli.main import main
from tokenauth.stores.copying import _Copy
from tokenauth.stores.sqlite.copying import SqliteSide

method = {kind}.{name}

async def interrupted(*arguments):
    signal.raise_signal(signal.SIGINT)
    return await method(*arguments)

{kind}.{name} = interrupted
main(prog_name="tokenauth")
"""
"""`tokenauth` that gets Ctrl-C when it calls a method."""

AGAIN = "Interrupted. Run the same command again: it goes on, unless the copy has finished.\n"

POOL = """
[pools.phones]
lease_ttl = "1h"
capacity = 1000
prefill = true
"""


@pytest.mark.extended
@pytest.mark.parametrize(("rows", "growth"), [(500, 1.7), pytest.param(3000, 1.2, marks=pytest.mark.faults)])
async def test_a_killed_copy_goes_on(tmp_path: Path, database: str, rows: int, growth: float) -> None:
    """It is killed again and again, each time a little later."""
    first = f"sqlite+aiosqlite:///{tmp_path}/tokens.db"
    urls = [first, database, f"sqlite+aiosqlite:///{tmp_path}/back.db"]
    await population.create(first)
    await population.write(first, population.generate(4, rows))
    for source, target in pairwise(urls):
        kills, delay = 0, 0.05
        while not await is_copied(tmp_path, source, target, delay):
            kills, delay = kills + 1, delay * growth
        assert kills > 0
        assert await population.read(target) == await population.read(first)


async def is_copied(directory: Path, source: str, target: str, seconds: float) -> bool:
    """Let the command run for some seconds and kill it; return whether it was done before."""
    process = start(directory, "copy", "--from", source, "--to", target)
    try:
        code = await to_thread(process.wait, seconds)
    except TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False
    assert code == 0, (directory / "err").read_text()
    return True


def start(directory: Path, *arguments: str) -> Forked:
    streams = [Path(os.devnull), directory / "out", directory / "err"]
    return Forked("tests.support.serving", ["tokenauth", *arguments], directory, streams, os.environ)


class Clients:
    """Clients of a server that log in and out, and lease, until the server stops. They note what was acknowledged."""

    def __init__(self, server: Server) -> None:
        self.live = set[str]()
        self.revoked = set[str]()
        self.leases = dict[str, int]()
        self._server = server
        self._stopping = False
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(3)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join()

    def work(self) -> None:
        """Wait until some more was acknowledged."""
        revoked, leases = len(self.revoked) + 5, len(self.leases) + 2
        until(lambda: len(self.revoked) > revoked and len(self.leases) > leases, "log-outs and leases")

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        own: list[str] = []
        with self._server.client() as client:
            while not self._stopping:
                token = log_in(client, "ann", "ann-secret")
                self.live.add(token)
                own.append(token)
                if chance.random() < 0.5:
                    gone = own.pop(chance.randrange(len(own)))
                    self.live.discard(gone)  # before: it may be gone although the answer is lost
                    client.delete("/api/token", headers={"X-Token": gone}).raise_for_status()
                    self.revoked.add(gone)
                if own and chance.random() < 0.1:
                    answer = client.post("/api/pools/phones/leases", json={}, headers={"X-Token": own[0]})
                    if answer.status_code == 201:
                        self.leases[answer.json()["token"]] = answer.json()["fence"]


@contextmanager
def serving(directory: Path, url: str) -> Iterator[Server]:
    config = write_config(directory, f"[tokens]\nper_user = 0\n{POOL}")
    config.write_text(re.sub(r"(?m)^url = .*", f'url = "{url}"', config.read_text(), count=1))
    with worker(config) as server:
        yield server


def check(server: Server, clients: Clients) -> None:
    """Check that everything that was acknowledged is there, and nothing that was ended."""
    with server.client() as client:
        assert [token for token in clients.live if not probe(client, token)] == []
        assert [token for token in clients.revoked if probe(client, token)] == []
        login = {"X-Token": min(clients.live)}
        for token, fence in clients.leases.items():
            answer = client.put(f"/api/pools/phones/leases/{token}", json={"fence": fence}, headers=login)
            assert (answer.status_code, answer.json()["fence"]) == (200, fence)


@pytest.mark.extended
def test_nothing_is_lost_that_a_running_server_answers(tmp_path: Path, database: str) -> None:
    """To PostgreSQL, and from there to a new file, with clients all the time but in the final stop."""
    urls = [f"sqlite+aiosqlite:///{tmp_path}/tokenauth.db", database, f"sqlite+aiosqlite:///{tmp_path}/back.db"]
    everyone: list[Clients] = []
    for source, target in pairwise(urls):
        with serving(tmp_path, source) as server:
            for clients in everyone:
                check(server, clients)
            with Clients(server) as clients:
                clients.work()
                done = run(tmp_path, "copy", "--to", target)
                assert done.returncode == 3, done
                assert "Stop the server and run the same command again" in done.stderr
                clients.work()
            everyone.append(clients)
            server.stop()
        done = run(tmp_path, "copy", "--to", target)
        assert done.returncode == 0, done
    with serving(tmp_path, urls[-1]) as server:
        for clients in everyone:
            check(server, clients)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Return the URL of a database with a row of each kind, which is that of the configuration."""
    write_config(tmp_path)
    url = f"sqlite+aiosqlite:///{tmp_path}/tokenauth.db"
    asyncio.run(population.create(url))
    asyncio.run(population.write(url, population.generate(5, 3)))
    return url


def test_the_summary_has_a_line_for_each_table(tmp_path: Path, source: str) -> None:
    done = run(tmp_path, "copy", "--from", source, "--to", f"sqlite+aiosqlite:///{tmp_path}/b.db")
    assert done.returncode == 0, done
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["table", "rows", "added", "changed", "SHA-256", "of", "both"]
    tables = {line.split()[0]: line.split()[1:] for line in lines[: len(metadata.tables)]}
    assert {name: cells[:3] for name, cells in tables.items()} == {name: ["3", "3", "0"] for name in metadata.tables}
    equal = f"{tmp_path}/b.db has the {3 * len(tables)} rows of {tmp_path}/tokenauth.db: both are equal. It took "
    assert lines[-2].startswith(equal)
    assert lines[-1] == "Set database.url before you start the server."
    assert "copying tokens: 0 of 3\n" in done.stderr


def test_the_source_is_that_of_the_configuration(tmp_path: Path, source: str) -> None:
    done = run(tmp_path, "copy", "--to", f"sqlite+aiosqlite:///{tmp_path}/b.db", "--json")
    report = json.loads(done.stdout)
    assert (report["from"], report["to"]) == (f"{tmp_path}/tokenauth.db", f"{tmp_path}/b.db")
    assert (report["finished"], report["in_use"], done.returncode) == (True, None, 0)
    assert {table["name"] for table in report["tables"]} == {*metadata.tables}
    assert all(len(table["sha256"]) == 64 for table in report["tables"])


@pytest.mark.parametrize(("where", "status"), [("_Copy._add", 130), ("SqliteSide.finish", 0)], ids=["early", "late"])
def test_ctrl_c_says_whether_a_copy_has_finished(tmp_path: Path, source: str, where: str, status: int) -> None:
    """Ctrl-C comes too late once the copy is about to finish."""
    command = "copy", "--to", f"sqlite+aiosqlite:///{tmp_path}/b.db"
    kind, name = where.split(".")
    done = script(tmp_path, "-c", INTERRUPTED.format(kind=kind, name=name), *command, program=sys.executable)
    assert done.returncode == status, done
    assert ("both are equal" in done.stdout) is (status == 0)
    assert done.stderr.endswith(AGAIN) is (status != 0)
    again = run(tmp_path, *command)
    assert again.returncode == 0, again
    assert "both are equal" in again.stdout


@pytest.mark.parametrize(
    ("name", "copied"), [("_Copy.check", True), ("SqliteSide.close", False)], ids=["check", "close"]
)
def test_ctrl_c_does_not_call_a_finished_copy_unfinished(tmp_path: Path, source: str, name: str, copied: bool) -> None:
    """Neither while it is compared once more, nor while the databases are closed."""
    command = "copy", "--to", f"sqlite+aiosqlite:///{tmp_path}/b.db"
    if copied:
        assert run(tmp_path, *command).returncode == 0
    kind, method = name.split(".")
    done = script(tmp_path, "-c", INTERRUPTED.format(kind=kind, name=method), *command, program=sys.executable)
    assert done.returncode == 130, done
    assert done.stderr.endswith(AGAIN)
    assert "both are equal" in run(tmp_path, *command).stdout


def test_a_copy_is_for_its_owner_only(tmp_path: Path, source: str) -> None:
    assert run(tmp_path, "copy", "--to", f"sqlite+aiosqlite:///{tmp_path}/b.db").returncode == 0
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("b.db*")} == dict.fromkeys(
        [path.name for path in tmp_path.glob("b.db*")], 0o600
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nonsense", "--to: not a URL such as"),
        ("sqlite:///b.db", "--to: 'sqlite' is not supported"),
        ("sqlite+aiosqlite:///", "--to: names no file"),
        ("sqlite+aiosqlite:///no/b.db", "--to: the directory {directory}/no does not exist"),
        ("sqlite+aiosqlite:///config.toml", "--to: {directory}/config.toml is not an SQLite database"),
        ("sqlite+aiosqlite:///./tokenauth.db", "--from and --to are the same database"),
        (
            "postgresql+asyncpg://u:secret-word@127.0.0.1:1/b",
            "--to: b at 127.0.0.1: it cannot be used: Connection",
        ),
        ("postgresql+asyncpg://u:secret-word@127.0.0.1:1/b?x=1", "--to: has no option 'x'"),
        ("postgresql+asyncpg://u:secret-word@127.0.0.1:b/b", "--to: not a URL such as"),
    ],
)
def test_a_wrong_target_is_named(tmp_path: Path, source: str, where: str, message: str) -> None:
    """And the password of its URL is not."""
    done = run(tmp_path, "copy", "--to", where)
    assert mistake(done).startswith(message.format(directory=tmp_path)), done
    assert "secret-word" not in done.stderr


def test_a_url_can_have_variables(tmp_path: Path, source: str) -> None:
    """As in the configuration: the password of the service is in its environment, and in no list of processes."""
    (tmp_path / "secret").write_text("b\n")
    url = f"sqlite+aiosqlite:///{tmp_path}/${{NAME}}.db"
    done = run(tmp_path, "copy", "--from", source, "--to", url, "--json", NAME_FILE=str(tmp_path / "secret"))
    assert json.loads(done.stdout)["to"] == f"{tmp_path}/b.db"
    assert mistake(run(tmp_path, "copy", "--to", url)).startswith("--to: the environment has no NAME; set it")
    assert mistake(run(tmp_path, "copy", "--from", "${NAME", "--to", url)).startswith("--from: has a '${' that begins")


def test_a_wrong_source_is_named(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing.db", tmp_path / "empty.db"
    empty.touch()
    target = f"sqlite+aiosqlite:///{tmp_path}/b.db"
    for path, problem in (
        (missing, "there is no database at"),
        (empty, "it has no tables of tokenauth: there is"),
    ):
        assert problem in mistake(run(tmp_path, "copy", "--from", f"sqlite+aiosqlite:///{path}", "--to", target))
    assert not (tmp_path / "b.db").exists()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_tables_of_another_program_are_refused(
    tmp_path: Path, source: str, postgres: Cluster, database: str, kind: str
) -> None:
    target, name = (database, database.rpartition("/")[2])
    if kind == "sqlite":
        target = f"sqlite+aiosqlite:///{tmp_path}/b.db"
        name = str(tmp_path / "b.db")
    for table, taken in (("customers", ""), ("tokens", ", tokens")):
        sql = f"CREATE TABLE {table} (number INTEGER)"
        if kind == "sqlite":
            with closing(sqlite3.connect(tmp_path / "b.db")) as db:
                db.execute(sql)
        else:
            postgres.execute(sql, name)
        shown = f"customers{taken}"
        found = mistake(run(tmp_path, "copy", "--to", target))
        assert found.endswith(f" has tables of another program, {shown}; use a database of its own"), found
    config = tmp_path / "config.toml"
    config.write_text(re.sub("(?m)^url = .*", f'url = "{target}"', config.read_text(), count=1))
    clash = "has tables of another program, tokens"
    found = mistake(run(tmp_path, "migrate", "--yes"))
    assert found.startswith(f"the database {name}"), found
    assert found.endswith(f" {clash}: use a database of its own"), found
    lines = " ".join(run(tmp_path, "doctor").stdout.split())
    assert f"{clash}, whose names tokenauth uses -> use a database of its own" in lines, lines


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_an_unfinished_copy_stays_a_database_of_its_own(tmp_path: Path, source: str, database: str, kind: str) -> None:
    """Another program may have added tables since the copy was interrupted, or an operator a view."""
    target = f"sqlite+aiosqlite:///{tmp_path}/b.db" if kind == "sqlite" else database

    def execute(sql: str) -> None:
        if kind == "sqlite":
            with closing(sqlite3.connect(tmp_path / "b.db")) as db, db:
                db.execute(sql)
        else:
            asyncio.run(fetch(target, sql))

    assert run(tmp_path, "copy", "--to", target).returncode == 0
    execute("CREATE TABLE copy_state (kind VARCHAR NOT NULL, content VARCHAR NOT NULL)")
    execute(f"INSERT INTO copy_state VALUES ('source', '{tmp_path}/tokenauth.db')")  # noqa: S608 - a constant
    execute("UPDATE alembic_version SET version_num = 'copying'")
    execute("CREATE TABLE customers (number INTEGER)")
    found = mistake(run(tmp_path, "copy", "--to", target))
    assert found.endswith(" has tables of another program, customers; use a database of its own"), found
    execute("DROP TABLE customers")
    execute("CREATE VIEW live AS SELECT username FROM tokens")
    done = run(tmp_path, "copy", "--to", target)
    assert done.returncode == 0, done.stderr
    execute("DELETE FROM tokens")
    done = run(tmp_path, "copy", "--to", target)
    assert (done.returncode, " is not empty; " in done.stderr) == (1, True), done
    execute("CREATE TABLE of_a_newer_release (number INTEGER)")
    execute("UPDATE alembic_version SET version_num = '9_1'")
    found = mistake(run(tmp_path, "copy", "--to", target))
    assert found.endswith(" has tables of another release; copy to a new database"), found


def test_a_role_without_rights_is_told_what_it_needs(
    tmp_path: Path, source: str, postgres: Cluster, database: str
) -> None:
    postgres.execute(f'ALTER DATABASE "{database.rpartition("/")[2]}" OWNER TO postgres')
    found = mistake(run(tmp_path, "copy", "--to", database))
    assert found.startswith("--to: the database ")
    assert found.endswith('permission denied for schema public; docs/scaling.md, "Roles and rights", has the grants')


def test_a_source_of_another_release_is_refused(tmp_path: Path, source: str) -> None:
    target = f"sqlite+aiosqlite:///{tmp_path}/b.db"
    for version, todo in (("3.1", "upgrade it with `tokenauth migrate`"), ("4.2", "use the release it is of")):
        with closing(sqlite3.connect(tmp_path / "tokenauth.db")) as db, db:
            db.execute("UPDATE alembic_version SET version_num = ?", (version,))
        found = mistake(run(tmp_path, "copy", "--to", target))
        assert found == (
            f"--from: {tmp_path}/tokenauth.db has schema {version}, and this release copies {HEAD}; {todo}"
        )


def test_a_value_that_does_not_fit_is_not_shown(tmp_path: Path, source: str, database: str) -> None:
    """SQLite stores anything in any column. PostgreSQL does not."""
    with closing(sqlite3.connect(tmp_path / "tokenauth.db")) as db, db:
        db.execute("UPDATE pool_tokens SET fence = 'not-a-number'")
    done = run(tmp_path, "copy", "--to", database)
    assert done.returncode == 1
    found = done.stderr.splitlines()[-1]
    assert found.startswith("Error: ")
    assert "cannot store a row of the source's table 'pool_tokens': a value has the wrong type" in found
    assert "not-a-number" not in done.stderr + done.stdout


def test_doctor_and_serve_name_an_unfinished_copy(tmp_path: Path, source: str) -> None:
    """And say what to do."""
    with closing(sqlite3.connect(tmp_path / "tokenauth.db")) as db, db:
        db.execute("UPDATE alembic_version SET version_num = 'copying'")
    lines = run(tmp_path, "doctor").stdout
    assert "error    database: " in lines
    assert "is an unfinished copy of another database" in " ".join(lines.split())
    assert "run the same `tokenauth copy` again to finish it" in " ".join(lines.split())
    done = run(tmp_path, "serve")
    assert done.returncode == 3
    found = f"the database {tmp_path}/tokenauth.db is an unfinished copy of another database: run the same `tokenauth"
    assert found in done.stderr
    assert "unfinished copy" in mistake(run(tmp_path, "tokens", "list"))


@pytest.mark.extended
def test_progress_is_shown_on_a_terminal(tmp_path: Path, source: str) -> None:
    target = f"sqlite+aiosqlite:///{tmp_path}/b.db"
    with on_terminal(tmp_path, f'"$TOKENAUTH" copy --to {target} 2>&1') as terminal:
        terminal.expect("copying tokens")
        terminal.expect("comparing tokens")
        terminal.expect("both are equal.")
