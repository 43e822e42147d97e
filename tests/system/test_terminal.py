"""`tokenauth` on a real terminal: what closing it does, and how a password is asked for."""

import json
import os
import pty
import re
import select
import signal
import subprocess
from codecs import getincrementaldecoder
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from passlib.hash import argon2

from tests.support.journal import until
from tests.support.servers import ROOT, TOKENAUTH, log_in, shipped, worker, write_config
from tests.support.wrapped import ended
from tokenauth import __version__
from tokenauth.settings import loader


class OnTerminal:
    """A command that leads a session with its own terminal. Its standard error is a file."""

    def __init__(self, directory: Path, command: str) -> None:
        self.log = directory / "terminal.log"
        self.log.touch()
        self.shown = ""
        self._decoder = getincrementaldecoder("utf-8")()
        self._seen = 0
        self._master, slave = pty.openpty()
        self._descriptors = [self._master, slave]
        # A shell that opens a terminal as the leader of a new session gets it as its controlling terminal.
        inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # pytest-xdist sets it
        script = f'exec 0<>"{os.ttyname(slave)}" 1>&0; {command}'
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", script],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=sink,
                start_new_session=True,
                env={**inherited, "PYTHONPATH": str(ROOT), "TOKENAUTH": TOKENAUTH},
            )

    def logged(self, event: str) -> bool:
        return f'"event":"{event}"' in self.log.read_text()

    def server_pid(self) -> int:
        """Return the process ID of the main process."""
        events = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return next(int(event["pid"]) for event in events if event["event"] == "listening")

    def expect(self, text: str) -> None:
        """Wait until the terminal shows a text after what was waited for before."""
        while text not in self.shown[self._seen :]:
            assert select.select([self._master], [], [], 60)[0], self.shown
            self.shown += self._decoder.decode(os.read(self._master, 4096))
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def press(self, letter: str) -> None:
        """Press a letter together with Ctrl."""
        os.write(self._master, bytes([ord(letter) & 0x1F]))

    def close(self) -> None:
        """Close the terminal, as when its window is closed."""
        while self._descriptors:
            os.close(self._descriptors.pop())


@contextmanager
def on_terminal(directory: Path, command: str) -> Iterator[OnTerminal]:
    found = OnTerminal(directory, command)
    try:
        yield found
    finally:
        found.close()
        with suppress(ProcessLookupError):
            os.killpg(found.process.pid, signal.SIGKILL)
        found.process.wait(30)


SERVE = '"$TOKENAUTH" serve --port 0'


def stops_at_closing(found: OnTerminal) -> None:
    """Close the terminal of a server, which stops it."""
    pid = found.server_pid()
    found.close()
    until(lambda: ended(pid), "it has ended")
    assert found.logged("stopping")
    assert '"signal":"SIGHUP"' in found.log.read_text()


@pytest.mark.extended
def test_closing_the_terminal_of_a_shell_stops_the_server(tmp_path: Path) -> None:
    write_config(tmp_path)
    with on_terminal(tmp_path, f"{SERVE}; true") as found:
        until(lambda: found.logged("started"), "it serves")
        stops_at_closing(found)


@pytest.mark.extended
def test_a_hangup_is_a_reload_until_the_terminal_closes(tmp_path: Path) -> None:
    """Here the server leads the session of the terminal."""
    write_config(tmp_path)
    with on_terminal(tmp_path, f"exec {SERVE}") as found:
        until(lambda: found.logged("started"), "it serves")
        os.kill(found.server_pid(), signal.SIGHUP)
        until(lambda: found.logged("reloaded"), "it has reloaded")
        assert not found.logged("stopping")
        stops_at_closing(found)


@pytest.mark.extended
def test_under_nohup_the_server_outlives_its_terminal(tmp_path: Path) -> None:
    write_config(tmp_path)
    with on_terminal(tmp_path, f"nohup {SERVE} 1>&2") as found:
        until(lambda: found.logged("started"), "it serves")
        pid = found.server_pid()
        found.close()
        os.kill(pid, signal.SIGHUP)
        until(lambda: found.logged("reloaded"), "it has reloaded")
        os.kill(pid, signal.SIGTERM)
        until(lambda: ended(pid), "it has ended")
        assert '"signal":"SIGTERM"' in found.log.read_text()


def test_serve_greets_people_and_ends_quietly_at_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(shipped())
    with on_terminal(tmp_path, f'trap : INT; {SERVE} 2>&1; echo "exit $?"') as found:
        found.expect("Ctrl-C stops.")
        found.type("\x03")
        found.expect("exit 0")
    shown = re.sub(r"\d{4,5}", "PORT", found.shown.replace("\r", ""))
    greeting, _, end = shown.partition("Ctrl-C stops.\n")
    created, *lines = [line for line in greeting.splitlines() if line]
    assert "database_created" in created
    assert lines[:5] == [
        f"tokenauth {__version__} is ready.",
        "  http://127.0.0.1:PORT",
        "  http://127.0.0.1:PORT/console  see logins, named tokens and pools",
        "  http://127.0.0.1:PORT/docs     try the API",
        "Log in as admin / admin.",
    ]
    assert re.fullmatch(rf"\d settings? (is|are) unsafe on a public address: {TOKENAUTH} check", lines[5])
    assert lines[6:] == [f"After a change of the configuration: {TOKENAUTH} reload"]
    assert end.split() == ["^C", "exit", "0"]


def test_a_refused_start_is_one_line_on_a_terminal(tmp_path: Path) -> None:
    write_config(tmp_path, "[server]\nprot = 1")
    with on_terminal(tmp_path, f'{SERVE} 2>&1; echo "exit $?"') as found:
        found.expect("exit 3")
    assert found.shown.splitlines()[0] == "Error: config.toml: server.prot: there is no such key; did you mean port?"


def test_the_password_prompt_states_its_rule_and_asks_again(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with on_terminal(tmp_path, '"$TOKENAUTH" user add eve 2>&1; echo "exit $?"') as found:
        found.expect("Password (8 to 1,024 characters): ")
        found.type("short")
        found.expect("Error: The password must have 8 to 1,024 characters.")
        found.expect("Password (8 to 1,024 characters): ")
        found.type("a long password")
        found.expect("The same again: ")
        found.type("another password")
        found.expect("Error: The two passwords differ.")
        found.expect("Password (8 to 1,024 characters): ")
        found.type("a long password")
        found.expect("The same again: ")
        found.type("a long password")
        found.expect("exit 0")
        assert "a long password" not in found.shown
    hashed = loader.load(path).users_by_name["eve"].password_hash
    assert argon2.verify("a long password", hashed)


@pytest.fixture
def logins(tmp_path: Path) -> Path:
    """Return a directory with a configuration and a database that has two logins."""
    with worker(write_config(tmp_path)) as server, server.client() as client:
        log_in(client)
        log_in(
            client, "ann", "ann-secret", headers={"User-Agent": f"Mozilla/5.0 (X11; Linux x86_64) Firefox/{'1' * 99}"}
        )
    return tmp_path


@pytest.mark.extended
def test_a_listing_fits_80_columns(logins: Path) -> None:
    with on_terminal(logins, 'stty cols 80; "$TOKENAUTH" tokens list 2>&1; echo "exit $?"') as found:
        found.expect("exit 0")
    lines = found.shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.fullmatch("[0-9a-f]{24}", lines[0])
    assert re.fullmatch(r"    user ann, kind login, issued \d+s ago, expires in 1d, last use none noted,", lines[1])
    assert lines[2] == "    address 127.0.0.1, agent Firefox on Linux"


@pytest.mark.extended
def test_a_wide_terminal_shows_the_same_as_a_table(logins: Path) -> None:
    with on_terminal(logins, 'stty cols 120; "$TOKENAUTH" tokens list 2>&1; echo "exit $?"') as found:
        found.expect("exit 0")
    heading, *rows = re.sub(r"\x1b\[[0-9;]*m", "", found.shown).splitlines()[:3]
    assert heading.split() == ["id", "user", "kind", "issued", "expires", "last", "use", "address", "agent"]
    assert rows[0].endswith("Firefox on Linux")


def test_revoking_all_asks_first(logins: Path) -> None:
    command = '"$TOKENAUTH" tokens revoke --all {} 2>&1; echo "exit $?"'
    with on_terminal(logins, command.format("")) as found:
        found.expect("Everyone must log in again, and named tokens end. [y/N]: ")
        found.type("n")
        found.expect("Aborted!")
        found.expect("exit 1")
    with on_terminal(logins, command.format("--yes")) as found:
        found.expect("Revoked 2 tokens.")
        found.expect("exit 0")
