"""A Unix socket instead of a port: who can connect, whose address counts, and what happens to its file."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path

import pytest

from tests.support.connections import Closed, Connection, Refused, connect, takes_connections
from tests.support.framing import sequences
from tests.support.journal import background, serving, until
from tests.support.main_process import workers_of
from tests.support.servers import TOKENAUTH, Server, serve, write_config
from tokenauth.errors import StartError
from tokenauth.server.unix_socket import UnixListener, is_served

FREE = 2


def configured(directory: Path, more: str = "") -> Path:
    """Write a configuration whose server listens on `directory/t.sock`."""
    server = f'[server]\nsocket = "{directory}/t.sock"\naccept_risks = ["weak_hash"]\n{more}'
    return write_config(directory, f"{server}\n[throttle]\nfree = {FREE}\n")


@contextmanager
def on_socket(directory: Path, *arguments: str, more: str = "") -> Iterator[tuple[Server, Path]]:
    """Serve on a Unix socket, and wait for connections."""
    path = directory / "t.sock"
    with serve(configured(directory, more), *arguments, on_port=False) as server:
        until(lambda: takes_connections(path), "the server accepts connections")
        yield server, path


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[tuple[Server, Path]]:
    with on_socket(directory) as found:
        yield found


def fail(path: Path, name: str, **headers: str) -> int:
    """Log in with a wrong password, and return the status."""
    with Connection(path) as connection:
        return connection.ask("POST", "/api/token", {"username": name, "password": "wrong"}, **headers).status


def test_the_peer_is_trusted_to_name_clients(served: tuple[Server, Path]) -> None:
    server, path = served
    for client in ("203.0.113.7", "198.51.100.7"):
        statuses = [fail(path, "ann", X_Forwarded_For=client) for _ in range(FREE + 1)]
        assert statuses == [401] * FREE + [429]
    assert server.events("forwarded_for_ignored") == []
    with Connection(path) as connection:
        login = {"username": "admin", "password": "admin"}
        token = connection.ask("POST", "/api/token", login, X_Forwarded_For="203.0.113.8").json()["token"]
        (row,) = connection.ask("GET", "/api/tokens", X_Token=token).json()["tokens"]
        assert row["address"] == "203.0.113.8"


def test_without_forwarded_for_all_are_one_network(served: tuple[Server, Path]) -> None:
    server, path = served
    assert [fail(path, "bob") for _ in range(FREE + 1)] == [401] * FREE + [429]
    assert server.wait("login_failed", user="bob")["network"] == "local"
    server.wait("forwarded_for_missing")
    (warning,) = server.events("forwarded_for_missing")
    assert "X-Forwarded-For" in warning["action"]
    with Connection(path) as connection:
        token = connection.log_in()
        assert "local" in {
            row["address"] for row in connection.ask("GET", "/api/tokens", X_Token=token).json()["tokens"]
        }


def test_the_log_names_the_socket_and_no_port(served: tuple[Server, Path]) -> None:
    server, path = served
    (event,) = server.events("listening")
    assert event["socket"] == str(path)
    assert not {"host", "port"} & set(event)


def raw(port: int | Path, segments: list[bytes]) -> bytes:
    """Send segments, end this side, and return what is answered, without the times.

    And without `Connection: close`, which depends on whether the server has seen that this side has ended.
    """
    with closing(connect(port)) as connection:
        try:
            connection.sendall(b"".join(segments))
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # refused before all was sent
            pass
        data = b""
        try:
            while part := connection.recv(65536):
                data += part
        except ConnectionResetError:
            pass
        return b"\r\n".join(
            line for line in data.split(b"\r\n") if not line.lower().startswith((b"date:", b"connection:"))
        )


def test_malformed_requests_are_answered_as_over_tcp(served: tuple[Server, Path]) -> None:
    _, path = served
    config = path.with_name("config.toml")
    with serving(config) as other:
        for segments in islice(sequences(seed=3, odd=True), 80):
            assert raw(path, segments) == raw(other.port, segments), segments


@pytest.mark.parametrize("mode", ["0660", "0600", "666"])
def test_the_file_has_its_mode_and_is_removed_at_stop(tmp_path: Path, mode: str) -> None:
    more = f'socket_mode = "{mode}"'.replace('"666"', '"666"\naccept_risks = ["weak_hash", "broad_trusted_proxies"]')
    if mode == "666":
        path = tmp_path / "t.sock"
        config = write_config(tmp_path, f'[server]\nsocket = "{path}"\n{more}')
    else:
        config = configured(tmp_path, more)
    with serve(config, on_port=False) as server:
        path = tmp_path / "t.sock"
        assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert server.stop() == 0
    assert not path.exists()


def test_the_file_never_has_another_mode(tmp_path: Path) -> None:
    """A thread looks all the time, and connects: who can write to the file is only asked when somebody listens."""
    path, seen, stopped = tmp_path / "t.sock", set[int](), threading.Event()

    def look() -> None:
        while not stopped.is_set():
            try:
                seen.add(stat.S_IMODE(path.stat().st_mode))
            except FileNotFoundError:
                continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(300):
            with UnixListener(str(path), 0o640) as listener:
                listener.remove_file()
        with UnixListener(str(path), 0o640):
            until(lambda: bool(seen), "the file was seen")
    finally:
        stopped.set()
        looking.join()
    assert seen == {0o640}


def refusal(directory: Path, *options: str, event: str = "start_failed") -> str:
    """Start a server that does not come up, and return why."""
    command = [TOKENAUTH, "serve", "--config", str(configured(directory))]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if event in line]
    return line


def test_a_host_alone_does_not_replace_the_socket(tmp_path: Path) -> None:
    """As the command of the image has it. With a port, it is clear what is meant."""
    assert "has server.socket" in refusal(tmp_path, "--host", "0.0.0.0", event="configuration_refused")
    with serve(configured(tmp_path), "--host", "127.0.0.1") as server:
        assert server.port
        assert not (tmp_path / "t.sock").exists()


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda path: path.write_text("kept"), "exists and is not a socket"),
    "directory": (lambda path: path.mkdir(), "exists and is not a socket"),
    "link": (lambda path: path.symlink_to("elsewhere"), "exists and is not a socket"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_socket_is_never_replaced(tmp_path: Path, kind: str) -> None:
    make, why = OTHERS[kind]
    path = tmp_path / "t.sock"
    make(path)
    before = path.lstat()
    assert why in refusal(tmp_path, event="configuration_refused")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_a_socket_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(StartError, match="cannot be used"):
            UnixListener(str(path), 0o660)
        assert path.exists()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"there is no directory {tmp_path}/none, or this user"):
        UnixListener(f"{tmp_path}/none/t.sock", 0o660)


def test_a_served_socket_is_left_to_its_server(tmp_path: Path) -> None:
    with on_socket(tmp_path) as (_, path):
        before = path.stat().st_ino
        assert "is in use: stop the other server or change server.socket" in refusal(tmp_path)
        assert path.stat().st_ino == before
        assert takes_connections(path)


def test_the_file_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    with on_socket(tmp_path) as (server, path):
        workers = workers_of(server)
        server.kill()
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in workers), "the workers are gone")
    assert path.exists()
    with on_socket(tmp_path):
        assert takes_connections(path)


def test_of_servers_that_start_together_one_gets_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    program = (
        "import sys; from tokenauth.server.unix_socket import UnixListener; sys.stdin.readline();"
        " kept = UnixListener(sys.argv[1], 0o660); print('listens', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", program, str(path)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        first = [process.stdout.readline() for process in started if process.stdout is not None]
        assert sorted(first) == ["", "", "", "listens\n"]
        with closing(connect(path)):
            pass
        for process in started:
            process.communicate()


def test_a_replaced_file_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with UnixListener(str(path), 0o660) as listener:
        path.unlink()
        path.write_text("of another program")
        listener.remove_file()
    assert path.read_text() == "of another program"


def test_a_file_that_a_new_server_makes_meanwhile_is_kept(tmp_path: Path) -> None:
    """The new server starts between the last look at the file and its removal."""
    path = tmp_path / "t.sock"
    started: list[UnixListener] = []

    def start() -> None:
        path.unlink(missing_ok=True)
        started.append(UnixListener(str(path), 0o660))

    starting = threading.Thread(target=start)

    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.remove" and arguments[0] == str(path) and starting.ident is None:
            starting.start()
            starting.join(0.5)  # longer than it takes, unless it waits for us

    with UnixListener(str(path), 0o660) as listener:
        sys.addaudithook(on_event)
        listener.remove_file()
    starting.join()
    with started[0], closing(connect(path)):
        pass


def test_a_reload_keeps_the_socket_and_every_request(tmp_path: Path) -> None:
    with on_socket(tmp_path, "--workers", "2") as (server, path):
        before = path.stat().st_ino
        with Connection(path) as connection:
            token = connection.log_in()
        kept = Connection(path)

        def probe() -> None:
            nonlocal kept
            try:
                assert kept.valid(token)
            except Closed:  # before anything was sent
                kept.close()
                kept = Connection(path)

        def probe_once() -> None:
            with Connection(path) as connection:
                assert connection.ask("GET", f"/api/token?token={token}", Connection="close").json()["valid"]

        with background(probe), background(probe_once):
            until(lambda: len(server.events("started")) == 2, "both workers serve")
            server.process.send_signal(signal.SIGHUP)
            until(lambda: len(server.events("stopped")) == 2, "the old workers ended")
        kept.close()
        assert path.stat().st_ino == before
        assert server.stop() == 0


def test_queued_connections_are_answered_at_a_stop(tmp_path: Path) -> None:
    """SIGSTOP holds the workers while clients connect. The file is gone before they go on."""
    with ExitStack() as stack, on_socket(tmp_path, "--workers", "2") as (server, path):
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        workers = workers_of(server)
        for process in workers:
            os.kill(process, signal.SIGSTOP)
        clients = [stack.enter_context(closing(connect(path))) for _ in range(100)]
        for client in clients:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not path.exists(), "the file is removed")
        with pytest.raises(Refused):
            Connection(path)
        for process in workers:
            os.kill(process, signal.SIGCONT)
        assert [int(client.recv(65536)[9:12] or 0) for client in clients] == [200] * 100
        assert server.process.wait(60) == 0


def test_a_port_on_the_command_line_replaces_the_socket(tmp_path: Path) -> None:
    with serving(configured(tmp_path)) as server:
        assert server.port
        assert not (tmp_path / "t.sock").exists()
        assert server.events("listening")[0]["host"] == "127.0.0.1"


def test_a_changed_socket_needs_a_restart(tmp_path: Path) -> None:
    with on_socket(tmp_path) as (server, path):
        write_config(tmp_path, f'[server]\nsocket = "{tmp_path}/other.sock"\naccept_risks = ["weak_hash"]')
        server.process.send_signal(signal.SIGHUP)
        expected = f"server.socket changes only at a restart; still serving on {path}"
        assert server.wait("restart_needed")["detail"].endswith(expected)
        server.wait("stopped")
        assert takes_connections(path)
        assert not (tmp_path / "other.sock").exists()


def test_a_server_that_refuses_for_a_time_is_found(tmp_path: Path) -> None:
    """As on macOS, where a connection is refused while the queue is full."""
    path = str(tmp_path / "t.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert not is_served(path, 0)
        timer = threading.Timer(0.1, listener.listen)
        timer.start()
        assert is_served(path, 30)
        timer.join()
