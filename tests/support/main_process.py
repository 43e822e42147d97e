"""A main process whose Python, modules and limits a test can break and restore."""

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.journal import until
from tests.support.servers import ROOT, Server, spawn

_PROGRAM = "import sys; sys.argv[0] = 'tokenauth'; {}; from tokenauth.cli.main import main; main()"


@contextmanager
def breakable(config: Path, *arguments: str, patch: str = "pass") -> Iterator["Breakable"]:
    """Run `tokenauth serve` with its own Python, and a directory of modules that are imported before all others.

    The main process runs `patch` first.
    """
    directory = config.parent
    home, shadow = directory / "python", directory / "shadow"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (home / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    shadow.mkdir()
    here = directory / "here"
    here.mkdir()
    path = os.pathsep.join([str(shadow), str(ROOT), sysconfig.get_path("purelib")])
    command = [str(home / "bin" / "python"), "-P", "-c", _PROGRAM.format(patch), "serve", "--config", str(config)]
    with spawn([*command, "--port", "0", *arguments], directory, {"PYTHONPATH": path}, here) as server:
        yield Breakable(server, home / "bin" / "python", shadow, here)


class Breakable(NamedTuple):
    """A server, and the files that a test can break."""

    server: Server
    python: Path
    shadow: Path
    here: Path

    def ready(self, workers: int) -> None:
        """Wait until this many workers have started."""
        self.server.port = self.server.wait("listening")["port"]
        until(lambda: len(self.server.events("started")) >= workers, "the workers serve")


def workers_of(server: Server) -> list[int]:
    """Return the PIDs of the workers. A new process that is no Python yet has the command line of its parent."""
    pids = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in pids if any(name in _command_line(pid) for name in (b"spawn_main", b"forkserver"))]


def _command_line(pid: str) -> bytes:
    """Read the command line of a process; empty if it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def session_of(leader: int) -> list[int]:
    """Return the PIDs of the processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def traceback_lines(server: Server) -> list[str]:
    """Return the lines of the log that are not JSON."""
    return [line for line in server.log.read_text().splitlines() if not line.startswith("{")]


_TOO_LITTLE = 64 * 1024 * 1024


def _limit_descriptors(broken: Breakable) -> None:
    pid = broken.server.process.pid
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), 4096))


def _allow_descriptors(broken: Breakable) -> None:
    resource.prlimit(broken.server.process.pid, resource.RLIMIT_NOFILE, (1024, 4096))


def _limit_memory(broken: Breakable) -> None:
    """Let the main process, which has more already, get no more, and a new one too little to start."""
    resource.prlimit(broken.server.process.pid, resource.RLIMIT_AS, (_TOO_LITTLE, resource.RLIM_INFINITY))


def _allow_memory(broken: Breakable) -> None:
    resource.prlimit(broken.server.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _hide_python(broken: Breakable) -> None:
    broken.python.rename(broken.python.with_name("hidden"))


def _show_python(broken: Breakable) -> None:
    broken.python.with_name("hidden").rename(broken.python)


def _replace_python(broken: Breakable) -> None:
    _hide_python(broken)
    broken.python.write_text("not a program")


def _break_module(name: str, text: str) -> tuple[Callable[[Breakable], None], Callable[[Breakable], None]]:
    """Shadow a module by a broken one, and remove that again."""
    return (
        lambda broken: discard((broken.shadow / name).write_text(text)),
        lambda broken: (broken.shadow / name).unlink(),
    )


def discard(_: object) -> None:
    """Return None instead of the argument."""


class Breakage(NamedTuple):
    """How to keep workers from starting, how to end that, and the message in the log."""

    begin: Callable[[Breakable], None]
    end: Callable[[Breakable], None]
    message: str


BREAKAGES = {
    "no descriptors": Breakage(_limit_descriptors, _allow_descriptors, "Too many open files"),
    "no memory": Breakage(_limit_memory, _allow_memory, ""),
    "no python": Breakage(_hide_python, _show_python, "No such file"),
    "no program": Breakage(_replace_python, _show_python, "Permission denied"),
    "no module": Breakage(*_break_module("uvloop.py", "raise ImportError('there is no uvloop')"), "there is no uvloop"),
    "no start": Breakage(*_break_module("sqlalchemy.py", "1 / 0"), "ZeroDivisionError"),
    "no worker": Breakage(*_break_module("httptools.py", "raise ImportError('there is no tool')"), "there is no tool"),
    "no encoding": Breakage(*_break_module("encodings.py", ""), ""),
    "an exit": Breakage(*_break_module("sqlalchemy.py", "import os; os._exit(7)"), "exit code 7"),
    "a kill": Breakage(*_break_module("sqlalchemy.py", "import os; os.kill(os.getpid(), 9)"), "SIGKILL"),
}


def kill_a_worker(server: Server) -> None:
    os.kill(workers_of(server)[0], signal.SIGKILL)
