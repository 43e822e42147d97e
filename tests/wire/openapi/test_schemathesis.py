"""schemathesis sends valid and invalid requests for all of the document to a real server, and finds no fault.

schemathesis.toml and hooks.py say which checks are disabled, and why.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import ROOT, USERS, HandClock, Server, worker, write_config
from tests.wire.openapi.configurations import ALL_DIALECTS, with_dialects

_PROGRAM = Path(sys.executable).with_name("schemathesis")

_MORE = """
[dialects.token-pool]
pool = "uuids"
prefix = "/pool"
require_token = true

[oauth]
issuer = "https://auth.example.com"

[server]
accept_risks = ["open_dialect"]

[tokens]
per_user = 0  # logins must not end each other
idle = 600  # otherwise none can be renewed

[throttle]  # otherwise most responses would be 429
free = 1000000
network_free = 1000000
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Run a new server for each test: all dialects, one of them guarded, and an admin with all scopes."""
    others = {name: prefix for name, prefix in ALL_DIALECTS.items() if name != "token_pool"}
    users = USERS.replace('["admin"]', '["admin", "introspect", "read", "write"]')
    config = write_config(tmp_path, with_dialects(**others) + _MORE, users)
    with worker(config, HandClock(tmp_path / "clock", create=True)) as running:
        yield running


def run_schemathesis(server: Server, directory: Path, user: str, size: str, *options: str) -> dict[str, Any]:
    """Run schemathesis and return its report. Fail if it finds a fault."""
    settings, report = directory / "schemathesis.toml", directory / "report.json"
    settings.write_text((Path(__file__).with_name("schemathesis.toml")).read_text() + size)
    command = [_PROGRAM, "--no-color", "--config-file", settings, "run", f"{server.url}/openapi.json"]
    always = ["--url", server.url, "--report", "json", "--report-json-path", report, "--suppress-health-check", "all"]
    variables = {"SCHEMATHESIS_HOOKS": "tests.wire.openapi.hooks", "TOKENAUTH_URL": server.url, "TOKENAUTH_USER": user}
    cache = {"HYPOTHESIS_STORAGE_DIRECTORY": str(ROOT / ".hypothesis")}  # the table of all Unicode characters
    done = subprocess.run(
        [*map(str, [*command, *always]), *options],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **cache, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.events("unexpected_error") == []
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def check_coverage(report: dict[str, Any], server: Server) -> None:
    """Fail unless every operation has accepted a request."""
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    described = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    granted = {name for name, phases in report["valid_rates"].items() if phases["coverage"]["accepted"]}
    # schemathesis reads the document itself at the start, and would wait for the end of events
    assert described - granted == {"GET /openapi.json", "GET /api/events"}
    assert report["warnings"]["unsupported_regex"] == []


_SMALL = """
[generation]
deterministic = true

[phases.fuzzing.generation]
max-examples = 3

[phases.stateful.generation]
max-examples = 8
"""

_LARGE = """
[generation]
max-examples = 100
"""

_ANONYMOUS = ("--exclude-checks", "positive_data_acceptance")
"""Well-formed requests without a login may be refused."""


@pytest.mark.faults  # the fast suite has test_hostile.py
def test_schemathesis_finds_no_fault_as_admin(server: Server, tmp_path: Path) -> None:
    report = run_schemathesis(server, tmp_path, "admin", _SMALL)
    check_coverage(report, server)
    assert report["test_cases"]["generated"] > 800


@pytest.mark.faults
@pytest.mark.parametrize("seed", ["1", "2"])
@pytest.mark.parametrize("user", ["admin", ""], ids=["admin", "anonymous"])
def test_many_random_requests_find_no_fault(server: Server, tmp_path: Path, user: str, seed: str) -> None:
    report = run_schemathesis(server, tmp_path, user, _LARGE, "--seed", seed, *(() if user else _ANONYMOUS))
    assert report["test_cases"]["generated"] > 3000
