"""`pytest --processes N`: runs the tests in N processes, which are forked when the tests are collected.

Everything is imported and collected once. pytest-xdist would do it in each process, which takes 4 seconds of CPU time.
"""

import os
import random
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn, cast

import pytest
from _pytest.capture import CaptureManager
from _pytest.runner import runtestprotocol

from tests.support.ports import use_range
from tests.support.processes import start_fork_server

Unit = Sequence[pytest.Item]
"""Tests that one process runs: those of a file, or of a folder of _TOGETHER."""

_TOGETHER = ("tests/system/browser", "tests/system/proxies")
"""Folders that one process runs: what their tests share takes long to start."""


def _unit_of(item: pytest.Item) -> str:
    file = item.nodeid.partition("::")[0]
    return next((folder for folder in _TOGETHER if file.startswith(f"{folder}/")), file)


class _Between(pytest.Item):
    """Stands for the first test of the next unit. Only fixtures of the session are kept for it."""

    def runtest(self) -> NoReturn:
        raise AssertionError


@dataclass
class _Process:
    """A forked process, and what it still has to run of its unit."""

    pid: int
    left: list[pytest.Item] = field(default_factory=list)


class Forks:
    """Runs the tests of a session in several processes, and reports what they report."""

    def __init__(self, session: pytest.Session, count: int) -> None:
        self._session = session
        self._count = count
        self._units: list[Unit] = [list(tests) for _, tests in groupby(session.items, _unit_of)]
        self._queue, write = os.pipe()
        os.write(write, b"".join(number.to_bytes(2) for number in range(len(self._units))))
        os.close(write)
        self._processes: dict[Connection, _Process] = {}

    def run(self) -> None:
        """Run all tests. Raises pytest's exceptions when the session should stop."""
        start_fork_server()
        self._session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # each has a folder in it
        for number in range(min(self._count, len(self._units))):
            self._fork(number)
        try:
            while self._processes:
                for ready in cast("list[Connection]", wait(list(self._processes))):
                    self._receive(ready)
                if self._session.shouldfail:
                    raise self._session.Failed(self._session.shouldfail)
                if self._session.shouldstop:
                    raise self._session.Interrupted(self._session.shouldstop)
        finally:
            for process in self._processes.values():  # the session stops: they end what they have started
                os.kill(process.pid, signal.SIGINT)
            for connection, process in self._processes.items():
                connection.close()
                os.waitpid(process.pid, 0)
            os.close(self._queue)

    def _fork(self, number: int) -> None:
        reports, send = Pipe(duplex=False)
        pid = os.fork()
        if not pid:
            _work(self._session, self._units, self._queue, send, number)
        send.close()
        self._processes[reports] = _Process(pid)

    def _receive(self, connection: Connection) -> None:
        process = self._processes[connection]
        try:
            message = connection.recv()
        except EOFError:
            message = None
        if message is None:
            del self._processes[connection]
            connection.close()
            self._end(process)
            return
        if isinstance(message, int):
            process.left = list(self._units[message])
            return
        del process.left[0]
        for data in message:
            self._log(self._session.config.hook.pytest_report_from_serializable(config=self._session.config, data=data))

    def _end(self, process: _Process) -> None:
        """Fail what a process has left, and start another one for the other tests."""
        code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
        if code == 0 and not process.left:
            return
        why = f"its process ended with the exit code {code}"
        if not process.left:
            raise pytest.UsageError(f"a process of the tests ended with the exit code {code}")
        for item in process.left:
            self._log(pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call"))
            why = f"not run: the process of {process.left[0].name} ended"
        self._fork(self._count)
        self._count += 1

    def _log(self, report: pytest.TestReport) -> None:
        self._session.config.hook.pytest_runtest_logreport(report=report)


def _work(session: pytest.Session, units: Sequence[Unit], queue: int, reports: Connection, number: int) -> NoReturn:
    """Run units until no more are in the queue, in a process of its own."""
    code = 1
    config = session.config
    capture = cast(CaptureManager, config.pluginmanager.getplugin("capturemanager"))
    try:
        capture.stop_global_capturing()  # its files are those of all processes
        capture.start_global_capturing()
        random.seed()
        use_range(number)
        factory = config._tmp_path_factory  # type: ignore[attr-defined]
        factory._basetemp = factory.getbasetemp() / f"process-{number}"
        factory._basetemp.mkdir(mode=0o700)
        config.pluginmanager.register(_Reporter(config, reports))
        between = _Between.from_parent(session, name="between")
        while unit := os.read(queue, 2):
            index = int.from_bytes(unit)
            reports.send(index)
            for item, following in zip(units[index], [*units[index][1:], between], strict=True):
                config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        code = 0
    except (BrokenPipeError, KeyboardInterrupt):  # the session stops
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = 0
    except BaseException:
        capture.suspend_global_capture()
        traceback.print_exc()
    finally:
        try:
            session._setupstate.teardown_exact(None)
            config._ensure_unconfigure()
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            os._exit(code)


class _Reporter:
    """Sends the reports of each test to the main process."""

    def __init__(self, config: pytest.Config, reports: Connection) -> None:
        self._config = config
        self._reports = reports

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run a test, and send only what the summary needs: each report takes the main process some time."""
        self._reports.send([self._data(one) for one in runtestprotocol(item, False, nextitem) if self._needed(one)])
        return True

    def _needed(self, report: pytest.TestReport) -> bool:
        return report.when == "call" or not report.passed or self._config.option.durations is not None

    def _data(self, report: pytest.TestReport) -> dict[str, Any]:
        return cast(
            "dict[str, Any]", self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        )
