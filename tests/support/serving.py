"""`tokenauth serve` with workers that are forked from the main process, which has already imported the service.

In production each worker is a new interpreter, which takes ten times as long to start. `breakable` and `spawn` do that.
"""

import os
import signal
import time
import traceback

from tests.support.servers import HEARTBEAT
from tokenauth import logs, revocation_queue
from tokenauth.cli.main import main as tokenauth
from tokenauth.server import supervisor, worker
from tokenauth.server.worker import spawn_main


class ForkedWorker:
    """The part of `subprocess.Popen` that the main process uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""
        if self._exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def fork_worker(descriptors: tuple[int, int, int], standard_error: int) -> ForkedWorker:
    """Start a worker with these file descriptors only, as `supervisor._start_python` does."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return ForkedWorker(pid)
    code = 1
    try:
        while os.path.exists(os.environ.get("HOLD", "")):
            time.sleep(0.01)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(standard_error, 2)
        previous = 2
        for kept in (*sorted(descriptors), os.sysconf("SC_OPEN_MAX")):
            os.closerange(previous + 1, kept)
            previous = kept
        spawn_main(*descriptors)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        logs.flush()
        os._exit(code)


def main() -> None:
    """Run the command.

    A variable GRACE has the seconds that a stopping worker gets, instead of 30; ANSWER_TIMEOUT those for which a
    revocation waits for other workers. While the file HOLD exists, no worker starts.
    """
    if "GRACE" in os.environ:
        for module in (supervisor, worker):
            vars(module)["GRACE"] = int(os.environ["GRACE"])
    if "ANSWER_TIMEOUT" in os.environ:
        revocation_queue.ANSWER_TIMEOUT = float(os.environ["ANSWER_TIMEOUT"])
    supervisor._TIMEOUT = round(supervisor._TIMEOUT / HEARTBEAT)  # it is a number of reports
    for module in (supervisor, worker):
        vars(module)["HEARTBEAT"] = HEARTBEAT
    supervisor._start_python = fork_worker  # type: ignore[assignment]  # it uses what a ForkedWorker has
    tokenauth()
