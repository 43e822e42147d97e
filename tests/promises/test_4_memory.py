"""Promise 4, out of memory: 503 or a closed connection, never a 4xx or a wrong answer."""

import os
import resource
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.connections import LOGIN, Closed, Connection, NoAnswer
from tests.support.journal import until
from tests.support.servers import Server, worker, write_config
from tokenauth.web.responses import error_response

CLIENTS = 12
SHORTAGES = [MemoryError(), RuntimeError("can't start new thread")]


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_a_lack_of_memory_is_503_with_retry_after(error: Exception) -> None:
    response = error_response(error)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


def _virtual(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmSize:")[2].split()[0]) * 1024


def _ask(server: Server, tokens: list[str]) -> tuple[Counter[str], set[str]]:
    """Revoke tokens with bodies of 60 KB and send other requests. Return the statuses and the revoked tokens."""
    statuses: Counter[str] = Counter()
    ended = set()
    for token in tokens:
        try:
            with Connection(server.port) as connection:
                answer = connection.ask("DELETE", "/api/token", {"token": token, "more": " " * 60_000})
                statuses[f"DELETE {answer.status}"] += 1
                if answer.status == 200:
                    ended.add(token)
            with Connection(server.port) as connection:
                for method, path, document in (
                    ("POST", "/api/token", LOGIN),
                    ("GET", f"/api/token?x={'a' * 7000}", None),
                    ("GET", "/auth", None),
                    ("GET", "/readyz", None),
                ):
                    statuses[f"{path[:5]} {connection.ask(method, path, document, X_Token=token).status}"] += 1
        except (Closed, NoAnswer):
            statuses["closed"] += 1
    return statuses, ended


@pytest.mark.faults  # slow: it mostly waits
def test_a_worker_out_of_memory_answers_503_and_recovers(tmp_path: Path) -> None:
    """Its address space may not grow, while a dozen clients send large bodies."""
    with worker(write_config(tmp_path, "[tokens]\nper_user = 0")) as server:
        with Connection(server.port) as connection:
            tokens = [connection.log_in() for _ in range(4 * CLIENTS)]
        pid = server.process.pid
        resource.prlimit(pid, resource.RLIMIT_AS, (_virtual(pid), resource.RLIM_INFINITY))
        with ThreadPoolExecutor(CLIENTS) as threads:
            results = list(threads.map(lambda n: _ask(server, tokens[n::CLIENTS]), range(CLIENTS)))
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        statuses = {status for counted, _ in results for status in counted}
        fine = {f"{what} {status}" for what in ("DELETE", "/api/", "/auth", "/read") for status in (200, 503)}
        assert statuses <= {*fine, "/auth 401", "closed"}
        assert os.path.exists(f"/proc/{pid}")
        with Connection(server.port) as connection:
            until(lambda: connection.ask("GET", "/readyz").status == 200, "the worker is ready again")
            for token in set().union(*(ended for _, ended in results)):
                assert not connection.valid(token)
