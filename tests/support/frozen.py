"""Imported last by the process from which others are forked: it exempts all objects so far from garbage collection.

A server collects garbage once it has started. Scanning all imported modules would take longer than the start.
"""

import gc

gc.collect()
gc.freeze()
