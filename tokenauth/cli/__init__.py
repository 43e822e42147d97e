"""The operator's words."""

import signal
import sys

if sys.argv[1:2] == ["serve"]:
    # Before the other imports, which take half a second: a reload has nothing to do yet, and must not end the start.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
