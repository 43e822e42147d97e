"""The `tokenauth` command."""

import signal
import sys

if sys.argv[1:2] == ["serve"]:
    # Before the other imports, which take half a second: SIGHUP must not end the start, and nothing can reload yet.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
