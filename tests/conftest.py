"""Fixtures that most tests need: a configuration, a clock, and workers."""

import faulthandler
import gc
import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from time import monotonic

import httpx
import hypothesis
import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from _pytest.runner import runtestprotocol
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

from tests.support.history import HandTime, History
from tests.support.postgres import database, postgres  # noqa: F401 - fixtures, for every test
from tests.support.servers import HandClock, Server, worker, write_config
from tests.support.standstill import StandstillWatch

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

_MEMORY = Path("/dev/shm")  # noqa: S108 - pytest and tempfile make private directories there


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("longest_test", "Seconds that a test may take.")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the files of the fast tests in memory, where there is room: they would wait for a disk half of the time.

    SIGINT, SIGQUIT and SIGHUP work also where a shell runs the tests in the background, or `nohup` does, and ignores
    them: commands under test inherit that.
    """
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if "not faults" in config.option.markexpr and "TMPDIR" not in os.environ and _has_room(_MEMORY):
        tempfile.tempdir = os.environ["TMPDIR"] = str(_MEMORY)
    config.pluginmanager.register(_HangWatch(float(config.getini("longest_test"))))


def _has_room(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize > 2**31 and not found.f_flag & os.ST_NOEXEC


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Run no garbage collection during collection, where it takes half the time; exempt the result from later ones."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


_EXTENDED = ("tests/system/browser/", "tests/system/postgres/", "tests/system/proxies/")
"""Folders of tests that need a program which few changes concern: Chromium, PostgreSQL, reverse proxies."""

_FAULTS = ("tests/system/failover/", "tests/system/faults/")
"""Folders of long fault tests only."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import the folders that `-m` leaves out: each process of xdist would."""
    terms = config.option.markexpr.split(" and ")
    left_out = (*(_FAULTS if "not faults" in terms else ()), *(_EXTENDED if "not extended" in terms else ()))
    return f"{collection_path}/".endswith(left_out) or None  # None lets others decide


_LONGEST_FIRST = ("system", "promises", "contract", "wire", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of some folders. Begin with the longest files, so that the processes of xdist end together."""
    for item in items:
        if item.nodeid.startswith(_EXTENDED):
            item.add_marker(pytest.mark.extended)
        if item.nodeid.startswith(_FAULTS):
            item.add_marker(pytest.mark.faults)
    groups = {group: place for place, group in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: groups.get(item.nodeid.split("/", 2)[1], len(groups)))


_TOGETHER = ("tests/system/browser", "tests/system/proxies")
"""Folders that one process runs: what their tests share takes long to start."""


class _ByFile(LoadFileScheduling):  # type: ignore[misc]
    """Gives all tests of one file, or of one folder of _TOGETHER, to the same process."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return next((folder for folder in _TOGETHER if file.startswith(f"{folder}/")), file)


@pytest.hookimpl(optionalhook=True)  # also without xdist: `-p no:xdist`
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _ByFile:
    """Schedule tests by file."""
    return _ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a long fault test again if the machine stood still while it failed.

    Under xdist, report only what the summary needs: each report takes its main process as long as a short test.
    """
    if item.get_closest_marker("faults") is not None:
        _run_without_a_standstill(item, nextitem)
        return True
    if not hasattr(item.config, "workerinput") or item.config.option.durations is not None:
        return None
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


_standstills: list[StandstillWatch] = []


def _run_without_a_standstill(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if not _standstills:
        _standstills.append(StandstillWatch())
        _standstills[0].start()
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    began = monotonic()
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    seconds = _standstills[0].seconds_since(began)
    if seconds and any(report.failed for report in reports):
        item.session._setupstate.teardown_exact(None)  # databases have the names of tests
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"The machine stood still for {seconds:.0f} s: {item.nodeid} has run again")
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


class _HangWatch:
    """Ends the process with the stacks of all threads when a test hangs.

    As pytest's `faulthandler_timeout`, which starts a thread for each test: that takes a millisecond of CPU, more than
    most tests. Here one thread watches the tests of some seconds, so the time may be a tenth shorter.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._started = -longest

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        now = monotonic()
        if now > self._started + self._longest / 10:
            self._started = now
            stderr = item.config.stash[fault_handler_stderr_fd_key]
            faulthandler.dump_traceback_later(self._longest, file=stderr, exit=True)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, nextitem: pytest.Item | None) -> None:
        if nextitem is None:
            faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, as uvicorn does."""
    return "asyncio"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory for one module's servers."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def clock(directory: Path) -> HandClock:
    """Return the clock of one module, which tests move."""
    return HandClock(directory / "clock", create=True)


@pytest.fixture(scope="module")
def settings() -> str:
    """Return the tables of the configuration besides the users. Modules override this."""
    return ""


@pytest.fixture(scope="module")
def config_file(directory: Path, settings: str) -> Path:
    """Write one module's configuration."""
    return write_config(directory, settings)


@pytest.fixture(scope="module")
def server(config_file: Path, clock: HandClock) -> Iterator[Server]:
    """Run a worker."""
    with worker(config_file, clock) as running:
        yield running


@pytest.fixture(scope="module")
def sibling(config_file: Path, clock: HandClock, server: Server) -> Iterator[Server]:
    """Run another worker on the same database."""
    with worker(config_file, clock) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    """Return an HTTP client of the worker."""
    with server.client() as connected:
        yield connected


@pytest.fixture(scope="module")
def sibling_client(sibling: Server) -> Iterator[httpx.Client]:
    """Return an HTTP client of the other worker."""
    with sibling.client() as connected:
        yield connected


@pytest.fixture
def time(tmp_path: Path) -> HandTime:
    """Return a clock for one test, which moves it."""
    return HandTime(HandClock(tmp_path / "clock", create=True))


@pytest.fixture
def history(time: HandTime) -> History:
    """Return an empty history on that clock."""
    return History(time)
