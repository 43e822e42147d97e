"""The `tokenauth` command."""

import gc
import os
import signal
import sys

NOHUP = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
"""Whether this was started under nohup, or by a program that ignores SIGHUP in the same way."""

if sys.argv[1:2] == ["serve"]:
    # Before the other imports, which take half a second: SIGHUP must not end the start, and nothing can reload yet.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gc.disable()  # until the main process has started: searching for cycles would take a tenth of that time
    for number in (signal.SIGINT, signal.SIGTERM):  # without a traceback; nothing has been opened yet
        signal.signal(number, lambda *_: os._exit(0))


def _open_streams() -> None:
    """Open /dev/null in the place of standard streams that are closed.

    Otherwise the next file or socket that is opened becomes standard output, and libuv aborts when it closes that.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


_open_streams()
