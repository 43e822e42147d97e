"""The log of a server: a slow or stopped reader does not block it, and dropped lines are counted."""

import fcntl
import os
import time
from collections.abc import Iterator
from threading import Thread

import pytest

from tests.support.threads import no_new_threads
from tokenauth.logs import BackgroundWriter

CAPACITY = 1 << 16


class Pipe:
    """A pipe with a small buffer, and its reader."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)

    def read(self) -> list[str]:
        """Return all lines up to "end"."""
        data = b""
        while not data.endswith(b"end\n"):
            data += os.read(self.reading, 1 << 16)
        return data.decode().splitlines()[:-1]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Open a pipe. Close it at the end, when no writer uses it."""
    made = Pipe()
    yield made
    os.close(made.reading)
    os.close(made.writing)


def test_all_lines_come_in_order(pipe: Pipe) -> None:
    writer = BackgroundWriter(pipe.writing, CAPACITY)
    lines = [f"{number} {'x' * (number % 700)}" for number in range(100)]
    for line in [*lines, "end"]:
        writer.write(line)
    assert pipe.read() == lines


def test_lines_without_room_are_dropped_and_counted(pipe: Pipe) -> None:
    writer = BackgroundWriter(pipe.writing, CAPACITY)
    for number in range(1000):  # there is no reader, and this does not block
        writer.write(f"{number} {'x' * 200}")
    reader = Thread(target=writer.flush, args=(20,))
    reader.start()
    data, kept, dropped = b"", list[int](), 0
    while len(kept) + dropped < 1000:  # the thread may make room meanwhile, so that lines are dropped several times
        data += os.read(pipe.reading, 1 << 16)
        lines = data[: data.rfind(b"\n") + 1].decode().splitlines()
        kept = [int(line.split()[0]) for line in lines if "x" in line]
        dropped = sum(int(line.split()[0]) for line in lines if line.endswith(" lines dropped"))
    reader.join()
    assert len(kept) + dropped == 1000
    assert dropped > 0
    assert kept == sorted(set(kept)), "lines keep their order"
    assert len(data) > CAPACITY - 300
    writer.write("end")
    assert pipe.read() == []


def test_lines_of_several_processes_stay_whole(pipe: Pipe) -> None:
    """Each process has its own writer, and all share one pipe."""
    writers = [BackgroundWriter(pipe.writing) for _ in range(4)]
    for number in range(500):
        for name, writer in enumerate(writers):
            writer.write(f"{name} {number} {'x' * (number % 300)}")
    data = b""
    while data.count(b"\n") < 2000:
        data += os.read(pipe.reading, 1 << 16)
    seen = []
    for line in data.decode().splitlines():
        name, number = (int(part) for part in line.split()[:2])
        assert line == f"{name} {number} {'x' * (number % 300)}"
        seen.append((name, number))
    for name in range(4):
        assert [number for writer_name, number in seen if writer_name == name] == list(range(500))


def test_a_flush_to_a_full_pipe_is_bounded(pipe: Pipe) -> None:
    writer = BackgroundWriter(pipe.writing, CAPACITY)
    for _ in range(100):
        writer.write("x" * 200)
    began = time.monotonic()
    writer.flush(0.1)
    assert time.monotonic() - began < 5
    writer.write("end")
    assert len(pipe.read()) == 100


def test_a_pipe_that_others_made_nonblocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.writing, False)
    test_all_lines_come_in_order(pipe)


def test_without_a_thread_lines_are_written_at_once(pipe: Pipe) -> None:
    writer = BackgroundWriter(pipe.writing, CAPACITY)
    with no_new_threads():
        writer.write("one")
        assert os.read(pipe.reading, 100) == b"one\n"
        for _ in range(100):  # lines that cannot be written are dropped
            writer.write("x" * 200)
    written = os.read(pipe.reading, 1 << 16).splitlines()
    for line in ("two", "end"):
        writer.write(line)
    assert pipe.read() == [f"{100 - len(written)} lines dropped", "two"]
