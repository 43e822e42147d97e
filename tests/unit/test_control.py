"""How a server answers `tokenauth reload`."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.journal import until
from tests.support.skipping import skip_without
from tokenauth.errors import StartError
from tokenauth.server import control
from tokenauth.server.control import AVAILABLE, Command, Control, ReloadAnswer

NAMES = ["\u4e00" * 250 + str(number) for number in range(50)]
LONG = ReloadAnswer(True, "", {f"kind {number}": NAMES for number in range(36)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    if not AVAILABLE:
        skip_without("Linux", "run the tests on Linux")
    (tmp_path / "config.toml").touch()
    return tmp_path / "config.toml"


@contextmanager
def asking(path: Path) -> Iterator[tuple[Control, Command, socket.socket]]:
    """Yield the server's end, a command that it has answered, and its socket, from which nothing was read."""
    with closing(Control(path)) as server, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(f"\0{control._prefix(path, 'reload')}{os.getpid()}")
        (command,) = server.accept()
        command.answer(LONG)
        assert not command.closed, "the socket takes a part at a time"
        yield server, command, connection


@pytest.mark.parametrize("name", ["ann", "ann-lee", "\u4e00" * 200])
def test_a_server_knows_who_runs_a_command(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SUDO_USER", name)
    with closing(Control(path)) as server, ThreadPoolExecutor() as threads:
        asked = threads.submit(control.ask_for_reload, path)
        (command,) = until(server.accept, "the command has arrived")
        command.answer(ReloadAnswer(True, "", {}))
        assert asked.result()[os.getpid()].accepted
    assert command.by
    assert name.startswith(command.by.rstrip("\ufffd"))
    assert command.by == name or len(name) == 200


def test_an_answer_beyond_the_buffer_is_sent_whole(path: Path) -> None:
    with asking(path) as (server, command, connection), ThreadPoolExecutor() as threads:
        received = threads.submit(control._receive, connection)
        while not command.closed:
            server.flush()
        assert control._decode(1, received.result(), ReloadAnswer) == LONG


def test_an_answer_that_is_cut_off_is_a_clear_line(path: Path) -> None:
    with asking(path) as (server, _, connection):
        server.close()
        with pytest.raises(StartError, match="has ended"):
            control._decode(1, control._receive(connection), ReloadAnswer)
