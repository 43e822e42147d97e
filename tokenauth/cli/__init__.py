"""The `tokenauth` command."""

import signal
import sys

NOHUP = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
"""Whether this was started under nohup, or by a program that ignores SIGHUP in the same way."""

if sys.argv[1:2] == ["serve"]:
    # Before the other imports, which take half a second: SIGHUP must not end the start, and nothing can reload yet.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
