"""Reads the metrics of a server, as Prometheus does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.journal import serving, until
from tests.support.servers import NO_TLS, Server

SETTINGS = '[metrics]\nlisten = "127.0.0.1:0"\n'

Sample = tuple[str, frozenset[tuple[str, str]]]


class Scraper:
    """The metrics of one server."""

    def __init__(self, server: Server) -> None:
        self.port = server.wait("metrics_listening")["port"]

    def text(self) -> str:
        answer = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30, verify=NO_TLS)
        assert answer.status_code == 200, answer.text
        return answer.text

    def samples(self) -> dict[Sample, float]:
        """Return all values by name and labels, without the prefix of the names."""
        return {
            (sample.name.removeprefix("tokenauth_"), frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, frozenset(labels.items())))

    def wait(self, value: float, name: str, **labels: str) -> None:
        """Wait until a metric has this value: workers report once a second."""
        until(lambda: self.value(name, **labels) == value, f"{name} is {value}")

    def counters(self) -> dict[Sample, float]:
        """Return what must never fall."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
            if family.type != "gauge" and not sample.name.endswith("_created")
        }


@contextmanager
def metered(config: Path, *arguments: str) -> Iterator[tuple[Server, Scraper]]:
    """Run `tokenauth serve` with metrics."""
    with serving(config, *arguments) as server:
        yield server, Scraper(server)
