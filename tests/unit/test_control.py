"""How a server answers `tokenauth reload`."""

import select
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.skipping import skip_without
from tokenauth.errors import StartError
from tokenauth.server.control import AVAILABLE, Command, Control, ReloadAnswer, ask_for_reload

NAMES = ["\u4e00" * 250 + str(number) for number in range(50)]
LONG = ReloadAnswer(True, "", {f"kind {number}": NAMES for number in range(36)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    if not AVAILABLE:
        skip_without("Linux", "run the tests on Linux")
    (tmp_path / "config.toml").touch()
    return tmp_path / "config.toml"


class Asking(threading.Thread):
    """A command that asks the servers of a configuration."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.answers: Mapping[int, ReloadAnswer] = {}
        self.mistake = ""

    def run(self) -> None:
        try:
            self.answers = ask_for_reload(self.path)
        except StartError as error:
            self.mistake = str(error)


def ask(control: Control, command: Asking) -> Command:
    command.start()
    select.select([control], [], [], 30)
    (asked,) = control.accept()
    return asked


def test_an_answer_beyond_the_buffer_is_sent_whole(path: Path) -> None:
    control, command = Control(path), Asking(path)
    asked = ask(control, command)
    asked.answer(LONG)
    assert not asked.closed, "the socket takes a part at a time"
    while not asked.closed:
        control.flush()
    control.close()
    command.join(30)
    assert [*command.answers.values()] == [LONG]


def test_an_answer_that_is_cut_off_is_a_clear_line(path: Path) -> None:
    control, command = Control(path), Asking(path)
    asked = ask(control, command)
    asked.answer(LONG)
    control.close()
    command.join(30)
    assert "has ended" in command.mistake
