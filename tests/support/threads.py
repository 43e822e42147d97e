"""Make the start of threads fail."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_new_threads() -> Iterator[None]:
    """Make every start of a thread fail, as without memory: the requested stack is too large."""
    threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(0)
