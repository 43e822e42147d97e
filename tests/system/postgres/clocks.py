"""A database whose clock a test can move, and workers on machines with wrong clocks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.postgres import Cluster
from tests.support.processes import Forked
from tests.support.servers import Server

_SHADOW = (
    "CREATE TABLE public.clock_shift AS SELECT 0::float8 AS seconds",
    "GRANT SELECT ON public.clock_shift TO tokenauth",
    """
    CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    RETURN pg_catalog.clock_timestamp() + make_interval(secs => (SELECT seconds FROM public.clock_shift))
    """,
    """
    CREATE FUNCTION public.transaction_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
    RETURN pg_catalog.transaction_timestamp() + make_interval(secs => (SELECT seconds FROM public.clock_shift))
    """,
)


PATIENT = {"PATIENT": "1"}
"""The environment of workers that wait long for a busy database: a refusal would say nothing about clocks."""


class ShiftedDatabase:
    """A database with the schema, whose `clock_timestamp()` and `transaction_timestamp()` are shifted by some seconds.

    The search path finds these functions before the built-in ones, so the queries of tokenauth are unchanged.
    """

    def __init__(self, cluster: Cluster, url: str) -> None:
        """Install the clock. It applies to later connections."""
        self._cluster = cluster
        self.url = url
        self.name = self.url.rpartition("/")[2]
        for statement in _SHADOW:
            cluster.execute(statement, self.name)
        cluster.execute(f'ALTER DATABASE "{self.name}" SET search_path = public, pg_catalog')

    def move(self, seconds: float) -> None:
        """Move the clock forward or back."""
        self._cluster.execute(f"UPDATE clock_shift SET seconds = seconds + {seconds}", self.name)  # noqa: S608


@contextmanager
def skewed(config: Path, seconds: int) -> Iterator[Server]:
    """Run a worker whose machine's clock is ahead by `seconds`."""
    log = config.parent / f"skewed{seconds:+}.log"
    log.touch()
    command = ["skewed", str(config), str(seconds)]
    streams = [Path(os.devnull), log, log]
    environment = {**os.environ, **PATIENT}
    server = Server(Forked("tests.system.postgres.skewed", command, config.parent, streams, environment), log)
    try:
        server.port = server.wait("test_worker_ready")["port"]
        yield server
    finally:
        server.kill()
