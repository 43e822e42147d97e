"""Serves metrics to Prometheus, on an address of its own, in a thread of the main process."""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tokenauth.errors import StartError
from tokenauth.logs import describe, log
from tokenauth.metrics import BUCKETS, FAMILIES, Family
from tokenauth.server.totals import Totals
from tokenauth.settings.model import MetricsSettings

PATH = "/metrics"

_TIMEOUT = 5.0
"""Seconds in which a client must have sent its request and read the answer."""

_MAX_CONNECTIONS = 16
"""Connections at a time. More are closed at once."""


class TotalsCollector(Collector):
    """Makes Prometheus's metric families of the totals, at each scrape."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        counts, gauges = self._totals.read()
        found: dict[str, list[tuple[Sequence[str], Sequence[float]]]] = {family.name: [] for family in FAMILIES}
        for (name, *labels), numbers in counts.items():
            found[name].append((labels, numbers))
        for (name, *labels), number in gauges.items():
            found[name].append((labels, [number]))
        for family in FAMILIES:
            yield _metric(family, found[family.name])


def _metric(family: Family, rows: Sequence[tuple[Sequence[str], Sequence[float]]]) -> Metric:
    name, labels = f"tokenauth_{family.name}", family.labels
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.help, labels=labels)
        for values, numbers in rows:
            histogram.add_metric(values, _cumulative(numbers), numbers[-1])
        return histogram
    if family.kind == "summary":
        summary = SummaryMetricFamily(name, family.help, labels=labels)
        for values, (count, total) in rows:
            summary.add_metric(values, int(count), total)
        return summary
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.help, labels=labels)
    for values, (number,) in rows:
        metric.add_metric(values, number)
    return metric


def _cumulative(numbers: Sequence[float]) -> list[tuple[str, float]]:
    """Return the buckets of a histogram as Prometheus wants them: each includes all smaller ones."""
    total, found = 0.0, []
    for bound, number in zip((*map(str, BUCKETS), "+Inf"), numbers, strict=False):
        total += number
        found.append((bound, total))
    return found


class Exporter:
    """Answers GET /metrics.

    It shares nothing with the main process but the totals, so no client and no error here can hold that up.
    """

    def __init__(self, settings: MetricsSettings, totals: Totals) -> None:
        """Listen, and answer in a thread from now on. Raises StartError."""
        self._registry = CollectorRegistry()
        self._registry.register(TotalsCollector(totals))
        self._connections = 0
        self._listener = _listen(settings)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
        try:
            asyncio.run(self._serve())
        except Exception as error:
            log.error("metrics_failed", reason=describe(error))

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._answer, sock=self._listener, limit=8192)
        await server.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= _MAX_CONNECTIONS:
                async with asyncio.timeout(_TIMEOUT):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._respond(head))
                    await writer.drain()
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError):
            writer.transport.abort()
        except Exception as error:
            log.error("metrics_failed", reason=describe(error))
        finally:
            self._connections -= 1
            with suppress(Exception):
                writer.close()

    def _respond(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        status, media_type, body = "200 OK", CONTENT_TYPE_PLAIN_0_0_4, b""
        if path != PATH.encode():
            status, media_type, body = "404 Not Found", "text/plain; charset=utf-8", b"Metrics are at /metrics.\n"
        elif method not in {b"GET", b"HEAD"}:
            status, media_type, body = (
                "405 Method Not Allowed\r\nallow: GET, HEAD",
                "text/plain; charset=utf-8",
                b"Use GET.\n",
            )
        else:
            body = generate_latest(self._registry)
        fields = f"content-type: {media_type}\r\ncontent-length: {len(body)}\r\nconnection: close"
        answer = f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode()
        return answer if method == b"HEAD" else answer + body


def _listen(settings: MetricsSettings) -> socket.socket:
    host, port = settings.address
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_MAX_CONNECTIONS
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"metrics.listen: port {port} is in use: stop the other server or use another port"
            ) from None
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise StartError(
            f"metrics.listen: cannot listen on {settings.listen!r}: {reason}; use an address of this machine"
        ) from None
