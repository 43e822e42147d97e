"""The figures of a node whose database is in another region: a proxy between them delays each round trip."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from bench import world
from bench.figures import Figure, Sample, Sampler
from tests.support.far import OPERATIONS, TABLES, Far, seconds
from tests.support.postgres import Cluster
from tests.support.tcp_proxy import Proxy

DELAY = 0.08
"""Seconds that a round trip takes."""

_OPERATIONS = {"pg-far-" + re.sub(r"\W+", "-", name): name for name in OPERATIONS}
NAMES = tuple(_OPERATIONS)

_TRIES = 8
"""How often each operation is run in a round. Other tasks of the node make some take longer."""


class FarRows:
    """The figures, and the node that they share."""

    def __init__(self, directory: Path, cluster: Callable[[], Cluster]) -> None:
        self._directory = directory
        self._cluster = cluster
        self._stack = ExitStack()
        self._far: Far | None = None

    def __enter__(self) -> "FarRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def figures(self) -> Sequence[Figure]:
        """Return the figures in the order of the table."""
        title = f"PostgreSQL {1000 * DELAY:.0f} ms away: "
        return [
            Figure(name, title + operation, None, "ms", partial(self._measured, operation), at_most=True)
            for name, operation in _OPERATIONS.items()
        ]

    @contextmanager
    def _measured(self, operation: str) -> Iterator[Sampler]:
        far = self._node()

        def sample() -> Sample:
            prepared = [OPERATIONS[operation](far) for _ in range(3 * _TRIES)]
            trips = min(far.round_trips(prepared.pop()) for _ in range(_TRIES))
            near = median(seconds(prepared.pop()) for _ in range(_TRIES))
            far.proxy.delay(DELAY / 2)
            try:
                away = median(seconds(each) for each in prepared)
            finally:
                far.proxy.delay(0)
            return Sample(1000 * away, note=f"round trips: {trips}; without the delay {1000 * near:.1f} ms")

        yield sample

    def _node(self) -> Far:
        if self._far is None:
            cluster = self._cluster()
            proxy = self._stack.enter_context(Proxy(cluster.port))
            cluster.create("far")
            config = world.write_config(self._directory / "far", tables=TABLES, url=cluster.url("far", proxy.port))
            running = self._stack.enter_context(world.tokenauth(config, None))
            self._far = Far(proxy, running.client, "user0", "secret")
        return self._far
