"""Processes that are forked from one that has already imported the service, so they start in milliseconds."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir, suppress
from importlib import import_module
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Protocol

from tokenauth import logs

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "__main__",
        "tests.support.worker",
        "tests.support.opener",
        "tests.support.serving",
        "tokenauth.cli.main",
        # modules that are imported late
        *("alembic.command", "alembic.config", "concurrent.futures.thread", "encodings.idna"),
        *("rich._emoji_codes", "rich.table"),
        *(f"passlib.handlers.{name}" for name in ("argon2", "bcrypt", "pbkdf2", "scrypt")),
        *("tokenauth.stores.postgres.engine", "uvicorn.lifespan.on", "uvicorn.loops.uvloop"),
        "tests.support.warm",
        "tests.support.frozen",
    ]
)


class Process(Protocol):
    """The part of `subprocess.Popen` that tests use."""

    @property
    def pid(self) -> int:
        """The process ID."""

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends, and return the exit code. Raises TimeoutExpired."""

    def send_signal(self, sig: int) -> None: ...


class Forked:
    """A process that runs the `main` of a module in a new session."""

    def __init__(
        self, module: str, command: Sequence[str], directory: Path, streams: Sequence[Path], env: Mapping[str, str]
    ) -> None:
        """Start it in a directory. The streams are the files of stdin, stdout and stderr."""
        self._command = command
        self._process = _FORKS.Process(target=_enter, args=(module, command, directory, streams, dict(env)))
        with chdir(Path(__file__).parents[2]):  # the fork server imports the service there
            self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise TimeoutExpired(self._command, timeout or 0)
        return code

    def send_signal(self, sig: int) -> None:
        with suppress(ProcessLookupError):  # it has just ended, as subprocess.Popen allows
            os.kill(self.pid, sig)


def _enter(module: str, command: Sequence[str], directory: Path, streams: Sequence[Path], env: dict[str, str]) -> None:
    os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = list(command)
    try:
        import_module(module).main()
    finally:
        logs.flush()  # a forked process runs no exit handlers
