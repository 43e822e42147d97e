"""`tokenauth run` in a process of its own."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.journal import until
from tests.support.processes import Forked

LOGIN = {"TOKENAUTH_USERNAME": "ann", "TOKENAUTH_PASSWORD": "ann-secret"}


def ended(pid: int) -> bool:
    """Return whether a process has ended; it may still be a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def guard_of(pid: int) -> int:
    """Return the process that guards the command of `tokenauth run`, which has no other child."""
    (guard,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(guard)


class Wrapped:
    """A run of a command."""

    def __init__(self, directory: Path, url: str, *arguments: str, **env: str) -> None:
        """Start `tokenauth run` with these arguments in an empty directory, which is also the command's."""
        self.directory = directory
        directory.mkdir()
        streams = [directory / name for name in ("in", "out", "err")]
        for stream in streams:
            stream.touch()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TOKENAUTH_")}
        environment = {**inherited, **LOGIN, "TOKENAUTH_URL": url, **env}
        environment = {name: value for name, value in environment.items() if value}
        module = "tests.support.interrupted" if "INTERRUPTED_AT" in env else "tests.support.serving"
        self.process = Forked(module, ["tokenauth", "run", *arguments], directory, streams, environment)

    @property
    def out(self) -> str:
        """What the command has written."""
        return (self.directory / "out").read_text()

    @property
    def err(self) -> str:
        return (self.directory / "err").read_text()

    def expect(self, text: str) -> None:
        """Wait until the command has written a text."""
        until(lambda: text in self.out, f"the command writes {text!r}")

    def command(self) -> int:
        """Wait until the command has written its process ID in its first line, and return it."""
        self.expect("\n")
        return int(self.out.partition("\n")[0])

    def wait(self) -> int:
        """Return the exit status."""
        return self.process.wait(60)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """Stop `tokenauth run`, but not the other processes."""
        self.signal(signal.SIGSTOP)
        until(lambda: _state(self.process.pid) == "T", "it is stopped")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Wrapper:
    """Starts `tokenauth run`, and kills what is left of it at the end."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory
        self._url = url
        self.runs: list[Wrapped] = []

    def __call__(self, *arguments: str, url: str = "", **env: str) -> Wrapped:
        """Start a run of a command."""
        self.runs.append(Wrapped(self._directory / f"run-{len(self.runs)}", url or self._url, *arguments, **env))
        return self.runs[-1]


@contextmanager
def wrapping(directory: Path, url: str) -> Iterator[Wrapper]:
    wrapper = Wrapper(directory, url)
    try:
        yield wrapper
    finally:
        for run in wrapper.runs:
            _kill(run)


def _kill(run: Wrapped) -> None:
    """Kill the session of a run: `tokenauth run`, its guard and its command."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if os.getsid(int(entry.name)) == run.process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
    run.process.wait(60)
