"""`tokenauth reload`, and `reload = "watch"`: how the server is found, what it answers, and what is noticed."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.certificates import Certificate, make_certificate
from tests.support.connections import Closed, Connection
from tests.support.journal import serving, until
from tests.support.main_process import workers_of
from tests.support.ports import free_port
from tests.support.servers import ROOT, TOKENAUTH, USERS, Server, serve, spawn, write_config
from tests.support.skipping import skip_without
from tests.system.test_cli import Done, mistake, output, run
from tokenauth import __version__
from tokenauth.server.control import _prefix

POOL = "[pools.licences]\ncapacity = 3\n"
WITHOUT_BOB = USERS[: USERS.rindex("[[users]]")]


def reload(directory: Path, *arguments: str) -> Done:
    return run(directory, "reload", *arguments)


def refused(done: Done, pid: int) -> str:
    """Return why the server has refused a reload."""
    assert (done.returncode, done.stdout) == (1, "")
    begin = f"Error: refused by process {pid}, which keeps its settings: "
    assert done.stderr.startswith(begin)
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix(begin)


def can_log_in(server: Server, name: str) -> bool:
    with Connection(server.port) as connection:
        login = {"username": name, "password": f"{name}-secret"}
        return connection.ask("POST", "/api/token", login, Connection="close").status == 200


def test_the_command_waits_and_says_what_has_changed(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with serving(config, "--workers", "2") as server:
        pid = server.process.pid
        assert output(reload(tmp_path)) == f"Reloaded by process {pid}: nothing has changed.\n"
        write_config(tmp_path, POOL, WITHOUT_BOB)
        changed = "users removed: bob; pools added: licences"
        assert output(reload(tmp_path)) == f"Reloaded by process {pid}: {changed}.\n"
        assert not can_log_in(server, "bob"), "it is in use when the command ends"
        event = server.wait("reloaded", users_removed=["bob"])
        assert (event["cause"], event["users"], event["pools_added"]) == ("command", 2, ["licences"])
        assert "passwords_changed" not in event
        assert len(server.events("reloaded")) == 2


def test_what_needs_a_restart_is_said_by_all_commands(tmp_path: Path) -> None:
    old, new = free_port(), free_port()
    with serve(write_config(tmp_path, f"[server]\nport = {old}"), on_port=False) as server:
        server.wait("started")
        write_config(tmp_path, f"[server]\nport = {new}")
        pid = server.process.pid
        said = f"server.port changes only at a restart; still serving on 127.0.0.1 port {old}"
        assert output(reload(tmp_path)) == f"Reloaded by process {pid}: {said}.\n"
        assert server.wait("restart_needed")["detail"].endswith(said)
        asked = mistake(run(tmp_path, "health"))
        assert asked.startswith(f"127.0.0.1:{new}: Connection refused. Process {pid} serves config.toml elsewhere")
        checks = {one["check"]: one for one in json.loads(run(tmp_path, "doctor", "--json").stdout)["checks"]}
        assert checks["port"]["status"] == "warning"
        assert f"process {pid}, which serves this configuration, has another address" in checks["port"]["text"]


def test_no_request_gets_the_old_settings_afterwards(tmp_path: Path) -> None:
    """Neither over new connections nor over those of before, which old workers may still serve."""
    with serving(write_config(tmp_path, POOL), "--workers", "2") as server:
        with Connection(server.port) as connection:
            token = connection.log_in("bob", "bob-secret")

        def status(connection: Connection) -> int:
            return connection.ask("GET", "/api/pools/licences", X_Token=token).status

        for scope, expected in [("s", 403), ("", 200)] * 2:
            with ExitStack() as stack:
                kept = [stack.enter_context(Connection(server.port)) for _ in range(8)]
                assert {status(connection) for connection in kept} == {200 if scope else 403}
                write_config(tmp_path, f'{POOL}scope = "{scope}"\n' if scope else POOL)
                output(reload(tmp_path))
                for connection in kept:
                    with suppress(Closed):
                        assert status(connection) == expected
            for _ in range(20):
                with Connection(server.port) as connection:
                    assert status(connection) == expected


def test_tokens_of_removed_users_end_with_the_answer(tmp_path: Path) -> None:
    """Over new connections, and over those that old workers may still serve."""
    with serving(write_config(tmp_path), "--workers", "2") as server, ExitStack() as stack:
        kept = [stack.enter_context(Connection(server.port)) for _ in range(8)]
        token = kept[0].log_in("bob", "bob-secret")
        assert [connection.valid(token) for connection in kept] == [True] * 8
        write_config(tmp_path, users=WITHOUT_BOB)
        output(reload(tmp_path))
        new = [stack.enter_context(Connection(server.port)) for _ in range(8)]
        for connection in (*kept, *new):
            with suppress(Closed):
                assert not connection.valid(token)


def is_stopped(thread: Path) -> bool:
    """Return whether a thread, a directory of /proc, is stopped: a signal to stop lets it end a system call."""
    return (thread / "stat").read_text().rpartition(") ")[2].startswith("T")


def hang(pid: int, lock: Path) -> bool:
    """Stop a process, unless it has the lock of the database: then no new worker could start."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: all(map(is_stopped, Path(f"/proc/{pid}/task").iterdir())), "all threads have stopped")
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.kill(pid, signal.SIGCONT)
            return False
    return True


@pytest.mark.extended
def test_a_hanging_worker_delays_a_reload_and_is_named(tmp_path: Path) -> None:
    with serving(write_config(tmp_path), "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        hanging = workers_of(server)[0]
        until(lambda: hang(hanging, tmp_path / "tokenauth.db-lock"), "it hangs")
        try:
            done = reload(tmp_path)
        finally:
            os.kill(hanging, signal.SIGCONT)
        busy = server.wait("reloaded")["busy"]
        assert hanging in busy  # and on a very busy machine the other one, too
        named = ", ".join(map(str, busy))
        assert (done.returncode, done.stderr) == (0, f"Warning: workers that still take requests: {named}\n")


def test_each_refusal_is_said_and_logged_once(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with serving(config) as server:
        pid = server.process.pid
        write_config(tmp_path, "[tokens]\nttl = 'soon'\n")
        assert "tokens.ttl: must be a duration" in refused(reload(tmp_path), pid)
        config.write_text(f'[database]\nurl = "sqlite+aiosqlite:////nowhere/t.db"\n{WITHOUT_BOB}')
        assert "/nowhere" in refused(reload(tmp_path), pid), "its workers cannot start"
        until(lambda: len(server.events("reload_refused")) == 2, "both are logged")
        first, second = server.events("reload_refused")
        assert "users_removed" not in first
        assert (second["users_removed"], second["settings_changed"]) == (["bob"], ["database.url"])
        assert "nowhere/t.db" not in str(second["settings_changed"])
        assert server.events("reloaded") == []
        assert can_log_in(server, "bob")


def test_without_a_server_the_command_fails(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    expected = "No server of this user serves config.toml: start one with `tokenauth serve`. "
    assert mistake(reload(tmp_path)).startswith(expected)
    other = tmp_path / "other"
    other.mkdir()
    write_config(other)
    with serving(config) as server:
        assert mistake(reload(other)).startswith(expected), "that of another configuration is left alone"
        assert output(reload(other, "-c", "../config.toml")).startswith("Reloaded by process")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(30)
    assert mistake(reload(tmp_path)).startswith(expected), "a killed server leaves nothing behind"
    assert "none: No such file or directory" in mistake(reload(tmp_path, "-c", "none/config.toml"))


def test_all_servers_of_a_configuration_reload(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with serving(config) as one, serving(config) as other:
        lines = output(reload(tmp_path)).splitlines()
        pids = {one.process.pid, other.process.pid}
        assert {line.partition(":")[0] for line in lines} == {f"Reloaded by process {pid}" for pid in pids}


def test_a_replaced_file_is_found_and_users_are_edited(tmp_path: Path) -> None:
    """`user` commands replace the file by a rename."""
    with serving(write_config(tmp_path)) as server:
        assert "`tokenauth reload`" in output(run(tmp_path, "user", "remove", "bob"))
        assert "users removed: bob" in output(reload(tmp_path))
        assert not can_log_in(server, "bob")


@pytest.fixture
def public() -> Iterator[Path]:
    """Return a directory that all users may enter."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_another_user_can_neither_reload_nor_pretend(public: Path) -> None:
    if os.geteuid() != 0:
        skip_without("root", "run the tests as root")
    config = write_config(public)
    become = "import os, sys; from pathlib import Path; from tokenauth.server import control; os.setgid(65534)"
    begin = f"{become}; os.setuid(65534); path = Path({str(config)!r})"
    ask = f"{begin}; control.ask_for_reload(path)"
    pretend = f"{begin}; found = control.Control(path); print('ready', flush=True); sys.stdin.readline()"
    with serving(config) as server:
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=False)
        assert "No server of this user serves" in done.stderr
        with subprocess.Popen(
            [sys.executable, "-c", pretend], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            assert output(reload(public)) == f"Reloaded by process {server.process.pid}: nothing has changed.\n"
            other.communicate("\n")
        until(lambda: len(server.events("reloaded")) == 1, "only root's is logged")


@pytest.mark.extended
def test_a_name_that_takes_no_connection_stops_no_reload(tmp_path: Path) -> None:
    """Any local program can listen under such a name: here it is one of this user, and its queue is full."""
    config = write_config(tmp_path)
    with ExitStack() as stack:
        other = stack.enter_context(socket.socket(socket.AF_UNIX))
        other.bind(f"\0{_prefix(config, 'reload')}1")
        other.listen(0)
        with suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(other.getsockname())
        began = time.monotonic()
        assert "takes no more connections" in mistake(reload(tmp_path))
        with serving(config) as server:
            assert output(reload(tmp_path)) == f"Reloaded by process {server.process.pid}: nothing has changed.\n"
        assert time.monotonic() - began < 60


@contextmanager
def held_reload(config: Path) -> Iterator[tuple[Server, subprocess.Popen[str], Path]]:
    """Run `tokenauth reload`, which cannot end while the file that is yielded exists: the new worker waits."""
    hold = config.with_name("hold")
    with serve(config, env={"HOLD": str(hold)}) as server:
        hold.touch()
        with subprocess.Popen(
            [TOKENAUTH, "reload", "-c", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as command:
            until(lambda: len(workers_of(server)) == 2, "a new worker starts")
            yield server, command, hold


def test_a_later_broken_file_is_no_answer_to_an_earlier_reload(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with held_reload(config) as (server, command, hold):
        config.write_text("[server")
        assert "not TOML" in refused(reload(tmp_path), server.process.pid)
        hold.unlink()
        shown, _ = command.communicate(timeout=60)
        assert shown == f"Reloaded by process {server.process.pid}: nothing has changed.\n"


def test_a_server_that_ends_does_not_leave_the_command_waiting(tmp_path: Path) -> None:
    with held_reload(write_config(tmp_path)) as (server, command, _):
        server.process.send_signal(signal.SIGTERM)
        _, shown = command.communicate(timeout=60)
        assert command.returncode == 1
        assert f"The server with process {server.process.pid} has ended" in shown
        server.process.wait(60)


WATCH = '[server]\nreload = "watch"\n'


def test_a_watched_file_is_reloaded_and_a_broken_one_said_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, WATCH)
    with serving(config) as server:
        other = tmp_path / "new.toml"
        shutil.copy(config, other)
        other.write_text(config.read_text().replace('"bob"', '"eve"'))
        os.replace(other, config)
        assert server.wait("reloaded", cause="watch")["users_added"] == ["eve"]
        config.write_text("[server")
        assert "not TOML" in server.wait("reload_refused", cause="watch")["detail"]
        until(lambda: len(server.events("started")) == 2, "the new worker serves")
        config.write_text(config.read_text())  # the same again, at another time
        until(lambda: len(server.events("reload_refused")) == 2, "the next version is said, too")
        write_config(tmp_path, WATCH + POOL)
        server.wait("reloaded", pools_added=["licences"])
        assert len(server.events("reload_refused")) == 2
        until(lambda: len(server.events("started")) == 3, "a worker for each version that can be read")
        write_config(tmp_path)
        server.wait("reloaded", settings_changed=["server.reload"])


def test_links_that_are_swapped_and_other_files_are_watched(tmp_path: Path) -> None:
    """As Kubernetes renews a ConfigMap and a Secret."""
    old, new = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new")
    for number, source in enumerate((old, new), 1):
        (tmp_path / f"v{number}").mkdir()
        shutil.copy(source.certificate, tmp_path / f"v{number}" / "tls.pem")
        shutil.copy(source.key, tmp_path / f"v{number}" / "tls.key")
        (tmp_path / f"v{number}" / "tls.key").chmod(0o600)
    (tmp_path / "data").symlink_to("v1")
    shown = Certificate(tmp_path / "data" / "tls.pem", tmp_path / "data" / "tls.key")
    config = write_config(tmp_path, WATCH + shown.settings())
    with serve(config) as server:
        server.wait("started")
        (tmp_path / "next").symlink_to("v2")
        os.replace(tmp_path / "next", tmp_path / "data")
        assert server.wait("reloaded", cause="watch")["settings_changed"] == ["server.tls_certificate"]


@pytest.mark.extended
def test_users_of_an_htpasswd_file_come_and_go(tmp_path: Path) -> None:
    """One is added and removed with the file, and its tokens end."""
    file = tmp_path / "htpasswd"
    eve = "eve:$2y$04$kygwPyB9qU5JU7ZUsCgEDujcV4EpglcwXIBVqx6/PURWdhUZt/gHC\n"
    file.write_text("# none yet\n")
    config = write_config(tmp_path, f'{WATCH}[users_file]\npath = "{file}"\nscopes = ["read"]\n')
    with serving(config) as server:
        file.write_text(eve)
        assert server.wait("reloaded", cause="watch")["users_added"] == ["eve"]
        with Connection(server.port) as connection:
            token = connection.log_in("eve", "correct horse battery staple")
            assert connection.ask("GET", "/api/me", X_Token=token).json()["scopes"] == ["read"]
        listed = json.loads(output(run(tmp_path, "user", "list", "--json")))["users"]
        assert {row["username"]: row["file"] for row in listed} == {
            **dict.fromkeys(("admin", "ann", "bob"), "config.toml"),
            "eve": f"{file}, line 1",
        }
        done = run(tmp_path, "user", "set-scopes", "bob", "--scope", "x")
        assert output(done) == "Saved. A running server uses it within a few seconds.\n"
        server.wait("reloaded", scopes_changed=["bob: none -> x"])
        assert "`tokenauth user` edits this file only" in mistake(run(tmp_path, "user", "remove", "eve"))
        file.write_text(eve.replace("$2y$04$", "$apr1$"))
        refusal = server.wait("reload_refused", cause="watch")["detail"]
        assert f"{file}, line 1: the password of 'eve' is an MD5 hash (apr1)" in refusal
        with Connection(server.port) as connection:
            assert connection.valid(token)
        file.write_text("# none left\n")
        server.wait("reloaded", users_removed=["eve"])
        with Connection(server.port) as connection:
            assert not connection.valid(token)


def test_a_file_is_not_watched_by_default(tmp_path: Path) -> None:
    """A second file that is watched shows that enough time has passed."""
    other = tmp_path / "other"
    other.mkdir()
    with serving(write_config(tmp_path)) as server, serving(write_config(other, WATCH)) as watching:
        write_config(tmp_path, POOL)
        write_config(other, WATCH + POOL)
        watching.wait("reloaded")
        assert server.events("reloaded") == []


@pytest.mark.extended
def test_a_control_socket_that_is_taken_is_said(tmp_path: Path) -> None:
    """The server goes on without it."""
    config = write_config(tmp_path)
    program = (
        "import os, socket, sys; taken = socket.socket(socket.AF_UNIX);"
        f" taken.bind('\\0{_prefix(config, 'reload')}' + str(os.getpid())); taken.listen();"
        " sys.argv[0] = 'tokenauth'; from tokenauth.cli.main import main; main()"
    )
    with spawn([sys.executable, "-c", program, "serve", "-c", str(config), "-p", "0"], tmp_path) as server:
        assert "Address already in use" in server.wait("control_unavailable")["reason"]
        server.wait("started")


def test_a_reload_after_an_upgrade_needs_a_restart(tmp_path: Path) -> None:
    """So old and new code do not run together, except where a killed worker is replaced: that is logged."""
    package = tmp_path / "installed/tokenauth"
    shutil.copytree(ROOT / "tokenauth", package, ignore=shutil.ignore_patterns(".*"))  # with its compiled code
    package.with_name("migrations").symlink_to(ROOT / "migrations")
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "tokenauth", "serve", "--config", str(config), "--port", "0", "--workers", "1"]
    with spawn(command, tmp_path, env={"PYTHONPATH": str(package.parent)}) as server:
        version = server.wait("started")["version"]
        start = (package / "__init__.py").read_text()
        (package / "__init__.py").write_text(start.replace(f'"{__version__}"', '"0.99.0"'))
        reason = refused(reload(tmp_path), server.process.pid)
        installed = reason.removeprefix("tokenauth ").partition(" ")[0]
        assert installed.startswith("0.99.0+")
        assert reason == f"tokenauth {installed} is installed, and {version} runs: restart tokenauth\n"
        (running,) = workers_of(server)
        os.kill(running, signal.SIGKILL)
        assert "old and new code run together" in server.wait("restart_needed")["detail"]
        server.wait("started", version=installed)
