"""schemathesis asks a live server for all that its document has, and for what it has not; it finds no fault.

schemathesis.toml and hooks.py say which checks are left out, and why.
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
from tests.wire.openapi.configurations import APART, speaking

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

[tokens]  # logins must not end each other
per_user = 0

[throttle]  # it would be all that is asked for after a few failed logins
free = 1000000
network_free = 1000000
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Run a server of its own for each run: all dialects, one of them guarded, and an admin who may do everything."""
    others = {name: prefix for name, prefix in APART.items() if name != "token_pool"}
    users = USERS.replace('["admin"]', '["admin", "introspect", "read", "write"]')
    config = write_config(tmp_path, speaking(**others) + _MORE, users)
    with worker(config, HandClock(tmp_path / "clock", create=True)) as running:
        yield running


def ask(server: Server, directory: Path, user: str, size: str, *options: str) -> dict[str, Any]:
    """Run schemathesis; return its report if it has found nothing."""
    settings, report = directory / "schemathesis.toml", directory / "report.json"
    settings.write_text((Path(__file__).with_name("schemathesis.toml")).read_text() + size)
    command = [_PROGRAM, "--no-color", "--config-file", settings, "run", f"{server.url}/openapi.json"]
    always = ["--url", server.url, "--report", "json", "--report-json-path", report, "--suppress-health-check", "all"]
    variables = {"SCHEMATHESIS_HOOKS": "tests.wire.openapi.hooks", "TOKENAUTH_URL": server.url, "TOKENAUTH_USER": user}
    found_out = {"HYPOTHESIS_STORAGE_DIRECTORY": str(ROOT / ".hypothesis")}  # of all characters that there are
    done = subprocess.run(
        [*map(str, [*command, *always]), *options],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), **found_out, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.events("unexpected") == []
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def hold(report: dict[str, Any], server: Server) -> None:
    """Fail unless every operation has been asked for, understood, and has granted something."""
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    described = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    granted = {name for name, phases in report["valid_rates"].items() if phases["coverage"]["accepted"]}
    assert described - granted == {"GET /openapi.json"}, "it has read that to begin with"
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

_STRANGER = ("--exclude-checks", "positive_data_acceptance")
"""Well-formed requests of a stranger need not be accepted."""


@pytest.mark.faults  # the fast suite has test_hostile.py
def test_an_admin_finds_no_fault(server: Server, tmp_path: Path) -> None:
    report = ask(server, tmp_path, "admin", _SMALL)
    hold(report, server)
    assert report["test_cases"]["generated"] > 800


@pytest.mark.faults
@pytest.mark.parametrize("seed", ["1", "2"])
@pytest.mark.parametrize("user", ["admin", ""], ids=["admin", "stranger"])
def test_nobody_finds_a_fault_in_many_requests(server: Server, tmp_path: Path, user: str, seed: str) -> None:
    report = ask(server, tmp_path, user, _LARGE, "--seed", seed, *(() if user else _STRANGER))
    assert report["test_cases"]["generated"] > 3000
