"""The last that the process imports which others are forked from: what is there by then no collector looks through.

A server collects once it has started: looking through all that has been imported would take longer than its start.
"""

import gc

gc.collect()
gc.freeze()
