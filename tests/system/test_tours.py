"""The commands in README.md, docs/pools.md and docs/dialects.md run, and print the shown output."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import blocks, read
from tests.support.servers import ROOT, Server, log_in, serve, shipped_with_dialects
from tests.support.skipping import skip_without

COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
VARYING = [
    (rf'"(?:(?:token_)?[A-Za-z0-9]{{64}}|{UUID}|\w{{4}}\.\.\.)"', "TOKEN"),
    (r'"[0-9a-f]{24}"', "ID"),
    (r"\b\d{10}\b", "TIME"),
    (r"curl/[\d.]+", "curl"),
    (r'"current":\w+', "CURRENT"),  # two logins within one second may be listed either way
]
DIALECTS = ("/simple-token-implement", "/token-pool", "/random-token-generator", "/token-management-service")
LOG_IN = """TOKEN=$(curl -sf localhost:8000/api/token -H 'Content-Type: application/json' \\
    -d '{"username": "admin", "password": "admin"}' | cut -d'"' -f4)"""


def commands(document: str) -> list[tuple[str, str]]:
    """Return all commands, each with the output below it."""
    return [found for block in blocks(read(document), "console") for found in COMMAND.findall(block)]


def alike(text: str) -> str:
    """Replace what differs between runs, join the lines, and cut the text at an ellipsis."""
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text)
    return text.replace("\n", "").partition("...")[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve the shipped configuration, with its dialects, and with the pools that the documents show."""
    config = tmp_path_factory.mktemp("server") / "config.toml"
    shown = [
        block for name in ("README.md", "docs/pools.md") for block in blocks(read(name), "toml") if "[pools." in block
    ]
    pools = {block.partition("]")[0]: block for block in shown}
    assert len(pools) == 4
    assert tomllib.loads(shown[0]) == tomllib.loads(pools["[pools.licences"])
    config.write_text("\n".join([shipped_with_dialects(), *pools.values()]))
    with serve(config, env={"API_PASSWORD": "secret"}) as running:
        yield running


@pytest.mark.parametrize(("document", "count"), [("README.md", 12), ("docs/pools.md", 10), ("docs/dialects.md", 7)])
def test_each_command_prints_what_is_shown(server: Server, tmp_path: Path, document: str, count: int) -> None:
    if shutil.which("curl") is None:
        skip_without("curl", "apt-get install curl")
    shown = commands(document)
    lines = ["API_PASSWORD=secret", LOG_IN]
    for number, (command, _) in enumerate(shown):
        if command.startswith("LEASE="):  # here the README asks the reader to log in again
            lines.append(LOG_IN)
        lines.append(f"{{ {command}\n}} > {number}")
    script = "\n".join(lines).replace("http://localhost:8000", server.url).replace("localhost:8000", server.url)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True, timeout=60, capture_output=True)
    answers = [(tmp_path / str(number)).read_text() for number in range(len(shown))]
    for answer, (command, output) in zip(answers, shown, strict=True):
        assert alike(answer)[: len(alike(output)) or None] == alike(output), command
    assert len(shown) == count


def test_the_login_here_is_that_of_the_readme() -> None:
    assert LOG_IN in [command for command, _ in commands("README.md")]


def test_the_python_of_the_pools_guide_runs(server: Server) -> None:
    (code,) = blocks(read("docs/pools.md"), "python")
    code = code.replace("https://auth.example.com", server.url).replace('"ci", password', '"admin", "admin"')
    fences: list[int] = []

    def step(fence: int) -> None:
        fences.append(fence)

    names: dict[str, Any] = {"steps": [step, step]}
    exec(code, names)  # noqa: S102
    assert len(fences) == 2
    assert fences[0] == fences[1] >= 1


CronJob = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def cron_job(server: Server, tmp_path: Path) -> CronJob:
    """Return what runs the crontab of the pools guide as cron does, with another `--wait`. The job must be alone."""
    (crontab,) = blocks(read("docs/pools.md"), "crontab")
    (tmp_path / "report").write_text("#!/bin/sh\nmkdir alone && echo ran && rmdir alone\n")
    (tmp_path / "report").chmod(0o755)
    with server.client() as client:
        (tmp_path / "token").write_text(f"{log_in(client)}\n")
    for there, here in (
        ("https://auth.example.com", server.url),
        ("/etc/ci/token", tmp_path / "token"),
        ("/opt/tokenauth/bin", Path(sys.executable).parent),
        ("/usr/local/bin/report", tmp_path / "report"),
    ):
        assert there in crontab
        crontab = crontab.replace(there, str(here))
    *variables, line = crontab.splitlines()
    times, command = line.split("  ci  ")
    assert len(times.split()) == 5
    assert " --wait 5m " in command
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **dict(each.split("=", 1) for each in variables)}

    def start(wait: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["/bin/sh", "-c", command.replace(" --wait 5m ", wait)], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.mark.extended
def test_only_one_cron_job_of_the_guide_runs_at_a_time(cron_job: CronJob) -> None:
    runs = [cron_job(" --wait 5m ") for _ in range(3)]
    assert [run.communicate(timeout=60)[0] for run in runs] == ["ran\n"] * 3
    assert [run.returncode for run in runs] == [0] * 3


def test_a_cron_job_without_a_wait_is_skipped(server: Server, cron_job: CronJob) -> None:
    with server.client() as client:
        headers = {"X-Token": log_in(client)}
        lease = client.post("/api/pools/report/leases", headers=headers).json()["token"]
        skipped = cron_job(" ")
        assert skipped.communicate(timeout=60) == ("", "Error: Could not get a token of the pool report in time.\n")
        assert skipped.returncode == 75
        client.delete(f"/api/pools/report/leases/{lease}", headers=headers)


def test_the_guides_name_every_route(server: Server) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    guides = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    native = [path for path in paths if not path.startswith((*DIALECTS, "/docs/", "/console/"))]
    assert len(native) > 12
    assert [path for path in native if f"{path}`" not in guides and f"{path} " not in guides] == []
