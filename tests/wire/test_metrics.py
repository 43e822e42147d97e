"""Metrics of `tokenauth serve` with two workers, over sockets."""

import fcntl
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.connections import Connection
from tests.support.journal import until
from tests.support.main_process import workers_of
from tests.support.scraping import SETTINGS, Sample, Scraper, metered
from tests.support.servers import NO_TLS, ROOT, Server, exchange, serve, write_config
from tokenauth.metrics import FAMILIES

POOLS = "[pools.phones]\ncapacity = 3\nprefill = true\n"

ODD = ["Pa55word-typed-as-name", "ann\N{ZERO WIDTH SPACE}", 'a"b\\c{d="e"}', "x" * 200, "жанна", "# EOF"]


@pytest.fixture(scope="module")
def running(directory: Path) -> Iterator[tuple[Server, Scraper]]:
    """Run two workers with metrics."""
    audit = f'[audit]\nfile = "{directory}/audit.jsonl"\n'
    with metered(write_config(directory, SETTINGS + audit + POOLS), "--workers", "2") as found:
        found[1].wait(2, "workers")
        yield found


def fall(before: dict[Sample, float], after: dict[Sample, float]) -> list[Sample]:
    """Return the counters that fell or are gone."""
    return [sample for sample, value in before.items() if after.get(sample, -1) < value]


def test_counts_are_summed_over_workers(running: tuple[Server, Scraper]) -> None:
    """While one worker is suspended, the other one answers."""
    server, scraper = running
    before = scraper.value("validations_total", route="/api/token", result="valid") or 0
    with Connection(server.port) as connection:
        token = connection.log_in()
    for worker in workers_of(server):
        os.kill(worker, signal.SIGSTOP)
        try:
            for _ in range(3):
                with Connection(server.port) as connection:
                    assert connection.valid(token)
        finally:
            os.kill(worker, signal.SIGCONT)
    scraper.wait(before + 6, "validations_total", route="/api/token", result="valid")


def test_results_of_logins_and_validations_are_counted(running: tuple[Server, Scraper]) -> None:
    server, scraper = running
    before = scraper.samples()
    with server.client() as client:
        answer = client.post("/api/token", json={"username": "admin", "password": "admin"})
        headers = {"X-Token": answer.json()["token"]}
        assert client.post("/api/token", json={"username": "bob", "password": "no"}).status_code == 401
        assert client.get("/api/token", params={"token": "x" * 64}).json()["valid"] is False
        assert client.get("/auth", headers=headers).status_code == 200
        assert client.get("/auth", headers={"X-Token": "y" * 64}).status_code == 401
        assert client.get("/auth?scope=none", headers=headers).status_code == 403
        assert client.get("/auth").status_code == 401
        assert client.get("/api/me", headers=headers).status_code == 200
        assert client.get("/api/me", headers={"X-Token": "z" * 64}).status_code == 401
        form = {"token": headers["X-Token"]}
        assert client.post("/oauth/introspect", data=form, headers=headers).status_code == 403
    expected = {
        ("logins_total", "ok"): 1,
        ("logins_total", "invalid_credentials"): 1,
        ("/api/token", "invalid"): 1,
        ("/auth", "valid"): 1,
        ("/auth", "invalid"): 1,
        ("/auth", "denied"): 1,
        ("(others)", "valid"): 1,
        ("(others)", "invalid"): 1,
    }

    def counted() -> dict[tuple[str, str], float]:
        after = scraper.samples()
        found = {}
        for (name, labels), value in after.items():
            grown = value - before.get((name, labels), 0)
            if name in {"logins_total", "validations_total"} and grown:
                found[dict(labels).get("route", name), dict(labels)["result"]] = grown
        return found

    until(lambda: counted() == expected, "all are counted")


def test_durations_have_the_template_of_a_route(running: tuple[Server, Scraper]) -> None:
    server, scraper = running
    with server.client() as client:
        token = client.post("/api/token", json={"username": "admin", "password": "admin"}).json()["token"]
        client.post("/api/pools/phones/leases", headers={"X-Token": token}).raise_for_status()
        client.get("/api/pools/none-of-that-name", headers={"X-Token": token})
    scraper.wait(1, "request_seconds_count", method="POST", route="/api/pools/{pool}/leases")
    scraper.wait(1, "request_seconds_count", method="GET", route="/api/pools/{pool}")


def test_what_clients_send_makes_no_label(running: tuple[Server, Scraper]) -> None:
    server, scraper = running
    with server.client() as client:
        token = client.post("/api/token", json={"username": "admin", "password": "admin"}).json()["token"]
        secrets = [token, *ODD]
        for number, odd in enumerate(secrets):
            client.post("/api/token", json={"username": odd, "password": odd})
            client.get(f"/{number}/made-up", params={"token": odd})
            client.get(f"/api/pools/{token}", headers={"X-Token": token})
            client.get(f"/{token}", headers={"X-Token": token, "User-Agent": token})
    exchange(server.port, b"BREW-%s /auth HTTP/1.1\r\nHost: a\r\n\r\n" % token[:9].encode())
    count = len(secrets) * 2
    until(
        lambda: (scraper.value("request_seconds_count", method="GET", route="(none)") or 0) >= count,
        "all unknown paths are counted",
    )
    text = scraper.text()
    assert not [secret for secret in (*secrets, "made-up", "127.0.0", token[:9], "admin", "bob") if secret in text]
    known = {"route", "method", "result", "le", "pool", "version"}
    assert {name for _, labels in scraper.samples() for name, _ in labels} <= known
    assert 'pool="phones"' in text


def test_hanging_clients_delay_no_scrape(running: tuple[Server, Scraper]) -> None:
    server, scraper = running
    with ExitStack() as stack:
        for _ in range(10):
            hanging = stack.enter_context(socket.create_connection(("127.0.0.1", scraper.port)))
            hanging.sendall(b"GET /metrics HT")
        assert "tokenauth_workers 2.0" in scraper.text()
    assert server.errors() == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/metrics", 405), ("HEAD", "/metrics", 200), ("GET", "/metrics?x=1", 200)],
)
def test_only_get_of_metrics_answers(running: tuple[Server, Scraper], method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"http://127.0.0.1:{running[1].port}{path}", verify=NO_TLS)
    assert answer.status_code == status
    assert bool(answer.content) == (method != "HEAD")


def test_a_broken_request_ends_only_its_connection(running: tuple[Server, Scraper]) -> None:
    server, scraper = running
    for sent in (b"\x16\x03\x01\r\n\r\n", b"x" * 100_000, b""):
        with socket.create_connection(("127.0.0.1", scraper.port), timeout=30) as broken:
            try:
                broken.sendall(sent)
                broken.shutdown(socket.SHUT_WR)
                while broken.recv(65536):
                    pass
            except ConnectionError:
                pass
    assert scraper.value("workers") == 2
    assert server.errors() == []


def test_no_counter_falls_at_a_reload(tmp_path: Path) -> None:
    with metered(write_config(tmp_path, SETTINGS), "--workers", "2") as (server, scraper):
        scraper.wait(2, "workers")
        with Connection(server.port) as connection:
            token = connection.log_in()
            for _ in range(5):
                assert connection.valid(token)
        before = scraper.counters()
        server.process.send_signal(signal.SIGHUP)
        while len(server.events("stopped")) < 2:
            after = scraper.counters()
            assert fall(before, after) == []
            before = after
        scraper.wait(5, "validations_total", route="/api/token", result="valid")
        scraper.wait(2, "workers")
        assert scraper.value("worker_crashes_total") == 0


def test_no_counter_falls_when_workers_are_killed(tmp_path: Path) -> None:
    with metered(write_config(tmp_path, SETTINGS), "--workers", "2") as (server, scraper):
        scraper.wait(2, "workers")
        with Connection(server.port) as connection:
            token = connection.log_in()
            assert connection.valid(token)
        scraper.wait(1, "validations_total", route="/api/token", result="valid")
        before = scraper.counters()
        for worker in workers_of(server):
            os.kill(worker, signal.SIGKILL)
        while (scraper.value("workers"), scraper.value("worker_crashes_total")) != (2, 2):
            after = scraper.counters()
            assert fall(before, after) == []
            before = after
        assert scraper.value("validations_total", route="/api/token", result="valid") == 1


def test_a_refused_reload_shows_until_one_is_accepted(tmp_path: Path) -> None:
    config = write_config(tmp_path, SETTINGS)
    began = time.time()
    with metered(config) as (server, scraper):

        def loaded_at() -> float:
            return scraper.value("config_last_reload_success_timestamp_seconds") or 0

        started = loaded_at()
        assert began <= started <= time.time()
        assert scraper.value("config_last_reload_successful") == 1
        right = config.read_text()
        config.write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        server.wait("reload_refused")
        scraper.wait(0, "config_last_reload_successful")
        assert loaded_at() == started
        config.write_text(right)
        server.process.send_signal(signal.SIGHUP)
        server.wait("reloaded")
        scraper.wait(1, "config_last_reload_successful")
        assert started < loaded_at() <= time.time()
        assert scraper.value("tls_certificate_expiry_timestamp_seconds") is None


def test_a_refused_reload_counts_beside_an_earlier_one(tmp_path: Path) -> None:
    """Also if the earlier one, which is accepted, ends after it."""
    config = write_config(tmp_path, SETTINGS)
    with metered(config) as (server, scraper):
        right, serving = config.read_text(), set(workers_of(server))
        with (tmp_path / "tokenauth.db-lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the new worker waits a second for it
            server.process.send_signal(signal.SIGHUP)
            [new] = until(lambda: set(workers_of(server)) - serving, "the worker of the reload has started")
            os.kill(new, signal.SIGSTOP)
            config.write_text("nonsense")
            server.process.send_signal(signal.SIGHUP)
            server.wait("reload_refused")
            assert server.events("reloaded") == []
            os.kill(new, signal.SIGCONT)
        server.wait("reloaded")
        assert scraper.value("config_last_reload_successful") == 0
        config.write_text(right)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(server.events("reloaded")) == 2, "the last one is accepted")
        assert scraper.value("config_last_reload_successful") == 1


def test_a_changed_address_needs_a_restart(tmp_path: Path) -> None:
    with metered(write_config(tmp_path, SETTINGS)) as (server, scraper):
        write_config(tmp_path, '[metrics]\nlisten = "127.0.0.1:1"\n')
        server.process.send_signal(signal.SIGHUP)
        assert "metrics.listen" in server.wait("restart_needed")["detail"]
        server.wait("reloaded")
        server.wait("stopped")
        scraper.wait(1, "workers")


def test_metrics_that_are_new_need_a_restart(tmp_path: Path) -> None:
    with serve(write_config(tmp_path)) as server:
        write_config(tmp_path, SETTINGS)
        server.process.send_signal(signal.SIGHUP)
        assert "metrics.listen" in server.wait("restart_needed")["detail"]
        server.wait("reloaded")
        assert server.events("metrics_listening") == []


@pytest.mark.parametrize(
    ("host", "problem"), [("127.0.0.1", "is in use"), ("192.0.2.1", "use an address of this machine")]
)
def test_an_address_that_cannot_be_used_is_a_start_error(tmp_path: Path, host: str, problem: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = write_config(tmp_path, f'[metrics]\nlisten = "{host}:{taken.getsockname()[1]}"\n')
        with pytest.raises(AssertionError, match="exit code 3"), serve(config):
            pass
    log = (tmp_path / "server-0.log").read_text()
    assert '"start_failed"' in log
    assert "metrics.listen: " in log
    assert problem in log


DASHBOARD = json.loads((ROOT / "docs/grafana.json").read_text())

QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def test_all_queries_of_the_dashboard_find_something(running: tuple[Server, Scraper]) -> None:
    """Every metric of a query exists, with every label that the query names."""
    server, scraper = running
    with server.client() as client:
        client.post("/api/token", json={"username": "ann", "password": "ann-secret"}).raise_for_status()
    until(lambda: scraper.value("live_tokens") is not None, "the tokens are counted")
    labels: dict[str, set[str]] = {"tokenauth_tls_certificate_expiry_timestamp_seconds": set()}  # see test_tls.py
    for name, found in scraper.samples():
        labels.setdefault(f"tokenauth_{name}", set()).update(label for label, _ in found)
    missing: list[tuple[str, str, set[str]]] = []
    for query in QUERIES:
        asked = set(re.findall(r"\btokenauth_\w+", query))
        wanted = {label for inner in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*[!=]", inner)}
        wanted |= {label for inner in re.findall(r"\bby \(([^)]*)\)", query) for label in re.split(r",\s*", inner)}
        lacking = {name: wanted - labels[name] if name in labels else {"the metric itself"} for name in asked}
        missing += [(query, name, found) for name, found in lacking.items() if found]
    assert missing == []
    assert all("tokenauth_" in query for query in QUERIES)


def test_the_dashboard_shows_every_family() -> None:
    shown = " ".join(QUERIES)
    assert [family.name for family in FAMILIES if f"tokenauth_{family.name}" not in shown] == []
