"""What a worker asks its main process for /readyz: rarely, as everybody may call it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.journal import until
from tokenauth.audit.log import AuditLog
from tokenauth.errors import Overloaded
from tokenauth.server.totals import Totals
from tokenauth.settings.model import AuditSettings
from tokenauth.status import Node, NodeStatus
from tokenauth.web.requests import Request
from tokenauth.web.routes.health import HealthRoutes

SAYS = b'{"status":"ready","audit":"cannot be written by another process: the log has the reason"}\n'
READY = b'{"status":"ready"}\n'


class Worker:
    """The routes of a worker that had no act, whose main process has one that it cannot write until it is mended."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "later" / "audit.jsonl"
        settings = AuditSettings(file=str(self.file))
        self.now = 1000.0
        self.asked = 0
        self.main = AuditLog(settings)
        self.answers = True
        self._totals = Totals(1, self.main)
        node = Node()
        node.ask = self._ask
        self._routes = HealthRoutes(self._no_problem, AuditLog(settings), node, lambda: self.now)

    async def ready(self) -> bytes:
        answer = await self._routes.ready(Request({"type": "http"}))
        assert answer.status_code == 200
        return bytes(answer.body)

    async def _ask(self) -> NodeStatus:
        self.asked += 1
        if not self.answers:
            raise Overloaded
        return self._totals.status([])

    async def _no_problem(self) -> None:
        return None


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path)
    made.main.take([b'{"action":"login"}'])
    until(lambda: made.main.problem is not None, "the main process has tried to write")
    yield made
    made.main.close()


async def test_readiness_asks_the_main_process_once_a_second(worker: Worker) -> None:
    assert {await worker.ready() for _ in range(50)} == {SAYS}
    assert worker.asked == 1
    worker.file.parent.mkdir()
    until(lambda: worker.main.problem is None, "the main process has written it")
    worker.now += 0.9
    assert await worker.ready() == SAYS
    worker.now += 0.1
    assert {await worker.ready() for _ in range(50)} == {READY}
    assert worker.asked == 2


async def test_a_main_process_that_is_silent_is_left_in_peace(worker: Worker) -> None:
    worker.answers = False
    assert {await worker.ready() for _ in range(50)} == {READY}
    assert worker.asked == 1
    worker.answers = True
    worker.now += 1
    assert await worker.ready() == SAYS
