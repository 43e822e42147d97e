"""GET /api/status: how this node is doing, for admins."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth import build
from tokenauth.executor import Executor
from tokenauth.gauges import Gauges
from tokenauth.models import ADMIN
from tokenauth.risks import find_risks
from tokenauth.service import Service
from tokenauth.status import LENGTH, STEP, History, NodeStatus, Numbers, WorkerStatus
from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse
from tokenauth.web.routing import Route, strict

_RISKS_FOR = 60.0
"""Seconds for which the risks that were found are shown."""

_MAX_WAITING = 100
"""Requests that can wait for the risks at the same time."""


class WorkerAnswer(msgspec.Struct):
    pid: int
    started_at: int


class StoreAnswer(msgspec.Struct):
    kind: str
    schema: str
    up: bool | None
    feed_age: float | None
    revocations_held: int
    live_tokens: int | None


class AuditAnswer(msgspec.Struct):
    up: bool | None
    lost: int


class RiskAnswer(msgspec.Struct):
    name: str
    text: str


class TotalsAnswer(msgspec.Struct):
    logins: dict[str, int]
    validations: dict[str, int]
    throttle_refusals: int


class PoolStatusAnswer(msgspec.Struct):
    name: str
    capacity: int | None
    leased: int | None
    waiting: int | None
    granted: int
    denied: int
    lapsed: int
    forced: int


class HistoryAnswer(msgspec.Struct):
    step: int
    end: int
    logins: Numbers
    failures: Numbers
    validations: Numbers
    leases: Numbers
    waiting: Numbers


class StatusAnswer(msgspec.Struct):
    version: str
    time: int
    started_at: int
    workers: list[WorkerAnswer]
    workers_configured: int
    worker_crashes: int
    store: StoreAnswer
    audit: AuditAnswer | None
    password_queue: int
    risks: list[RiskAnswer]
    totals: TotalsAnswer
    pools: list[PoolStatusAnswer]
    history: HistoryAnswer


class StatusRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._risks: list[RiskAnswer] = []
        self._risks_due = 0.0
        # It looks at files and at each user's hash: 0.3 seconds for 10,000 users, measured.
        self._finder = Executor(self._find_risks, threads=1, queue=_MAX_WAITING, low_priority=True)
        self._started_at = int(time.time())
        self._build = build()

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        return [Route("/api/status", {"GET": strict(self.show)}, middleware)]

    async def show(self, request: Request) -> Response:
        request.user.require_scope(ADMIN)
        ask = self._service.node.ask
        node = await self._alone() if ask is None else await ask()
        risks = self._risks if time.monotonic() < self._risks_due else await self._finder.run(None)
        return JSONResponse(self._describe(node, risks))

    async def _alone(self) -> NodeStatus:
        """Return the status of a process that is the whole service, such as one of another server than ours."""
        gauges = Gauges(self._service, counts_store=True)
        await gauges.read()
        counts, found = gauges.snapshot().counts, gauges.snapshot().gauges
        unknown: Numbers = [None] * LENGTH
        history = History(int(time.time()), *[unknown] * 5)
        return NodeStatus(self._started_at, [WorkerStatus(os.getpid(), self._started_at)], 1, 0, counts, found, history)

    def _describe(self, node: NodeStatus, risks: list[RiskAnswer]) -> StatusAnswer:
        service, gauges = self._service, node.gauges
        logins, validations = Counter[str](), Counter[str]()
        for (name, *labels), numbers in node.counts.items():
            if name == "logins_total":
                logins[labels[0]] += int(numbers[0])
            elif name == "validations_total":
                validations[labels[1]] += int(numbers[0])

        def count(*key: str) -> int:
            return int(node.counts.get(key, [0])[0])

        def gauge(*key: str) -> int | None:
            value = gauges.get(key)
            return None if value is None else int(value)

        def flag(name: str) -> bool | None:
            value = gauges.get((name,))
            return None if value is None else bool(value)

        feed_age = gauges.get(("feed_age_seconds",))
        return StatusAnswer(
            version=self._build,
            time=int(service.clock()),
            started_at=node.started_at,
            workers=[WorkerAnswer(*worker) for worker in node.workers],
            workers_configured=node.configured,
            worker_crashes=node.crashes,
            store=StoreAnswer(
                kind=service.settings.database.url.partition("+")[0],
                schema=service.store.schema,
                up=flag("store_up"),
                feed_age=None if feed_age is None else round(feed_age, 3),
                revocations_held=gauge("revocations_held") or 0,
                live_tokens=gauge("live_tokens"),
            ),
            audit=None if service.audit is None else AuditAnswer(flag("audit_up"), count("audit_lost_total")),
            password_queue=gauge("password_queue") or 0,
            risks=risks,
            totals=TotalsAnswer(dict(logins), dict(validations), count("throttle_refusals_total")),
            pools=[
                PoolStatusAnswer(
                    name,
                    pool.capacity,
                    gauge("pool_leased", name),
                    gauge("pool_waiting", name),
                    *(count(f"pool_{what}_total", name) for what in ("granted", "denied", "lapsed", "forced")),
                )
                for name, pool in service.settings.pools_by_name.items()
            ],
            history=HistoryAnswer(STEP, *node.history),
        )

    def _find_risks(self, _: None) -> list[RiskAnswer]:
        """Find the risks, in a thread, unless an earlier job has just found them."""
        if time.monotonic() >= self._risks_due:
            service = self._service
            with suppress(OSError):  # a file is just being replaced: the next look finds what it has become
                found = find_risks(service.settings, service.passwords, service.node.config_file)
                self._risks, self._risks_due = [RiskAnswer(*risk) for risk in found], time.monotonic() + _RISKS_FOR
        return self._risks
