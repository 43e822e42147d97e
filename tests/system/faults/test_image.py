"""The image of the Dockerfile: built from a base of Debian's packages, and run with a read-only root."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.image import Container, Image, require, running

_LOG_IN = """
import json, sys, urllib.request
body = json.dumps({"username": "admin", "password": sys.stdin.read()}).encode()
headers = {"Content-Type": "application/json"}
with urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8000/api/token", body, headers)) as answer:
    print(json.load(answer)["token"])
"""

_PROBE = """
import sys, urllib.request
request = urllib.request.Request("http://127.0.0.1:8000/api/token", headers={"X-Token": sys.stdin.read()})
with urllib.request.urlopen(request) as answer:
    print(answer.read().decode())
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    require()
    directory = tmp_path_factory.mktemp("image")
    made = Image(directory)
    yield made
    made.close()
    shutil.rmtree(directory)


@pytest.fixture
def data(image: Image, tmp_path: Path) -> Path:
    """Make what an engine makes of an empty volume: a copy of /data with its owner and mode."""
    path, found = tmp_path / "data", (image.root / "data").stat()
    path.mkdir()
    os.chown(path, found.st_uid, found.st_gid)
    path.chmod(found.st_mode & 0o7777)
    return path


INIT = ("init", "--yes", "--set", 'server.accept_risks=["no_tls"]')
"""As docs/production.md has it for a port that only this machine reaches."""


def once(image: Image, data: Path, *arguments: str) -> tuple[int, str]:
    """Run a command in a container of its own, as `docker run --rm` does."""
    container = Container(image, data, arguments, {})
    output, _ = container.process.communicate(timeout=60)
    return container.process.returncode, output


def output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_two_commands_log_a_user_in(image: Image, data: Path) -> None:
    status, said = once(image, data, *INIT)
    assert status == 0, said
    password = said.partition("Password of admin: ")[2].split()[0]
    with running(image, data) as container:
        token = output(container.execute("python", "-c", _LOG_IN, given=password))
        assert output(container.execute("tokenauth", "health", "--ready")) == "ready"
        status, said = container.stop()
        assert status == 0, said
        assert "Traceback" not in said
        assert [json.loads(line)["event"] for line in said.splitlines()][-2:] == ["stopping", "stopped"]
    with running(image, data) as container:  # the volume is all that it needs
        assert json.loads(output(container.execute("python", "-c", _PROBE, given=token)))["valid"] is True
    assert {path.stat().st_uid for path in data.iterdir()} == {10001}


def test_it_runs_without_rights_on_a_read_only_root(image: Image, data: Path) -> None:
    assert once(image, data, *INIT)[0] == 0
    with running(image, data) as container:
        status = dict(line.split(":\t") for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
        assert int(status["CapEff"], 16) == 0
        assert "Read-only" in container.execute("touch", "/opt/tokenauth/new").stderr


def test_without_a_configuration_it_says_what_to_do(image: Image, data: Path) -> None:
    status, said = once(image, data)
    assert status == 3
    assert "/data/config.toml" in said
    assert "init" in said


def test_its_health_check_fails_without_an_answer(image: Image, data: Path) -> None:
    assert once(image, data, *INIT)[0] == 0
    with running(image, data) as container:
        assert container.healthy()
        assert container.execute("tokenauth", "health", "--url", "http://127.0.0.1:8001").returncode == 1


def test_it_holds_no_secret_and_no_build_tool(image: Image) -> None:
    assert list((image.root / "data").iterdir()) == []
    installed = image.root / "opt/tokenauth"
    (packages,) = installed.glob("lib/python3*/site-packages")
    names = {path.name.partition("-")[0].lower() for path in packages.iterdir()}
    assert {"tokenauth", "asyncpg", "uvloop"} <= names
    assert not {"pip", "hatchling", "pluggy", "editables", "pytest", "pathspec", "trove_classifiers"} & names
    assert not (image.root / "source").exists()
    assert image.config["User"] == "10001:10001"
    assert list(image.config["Volumes"]) == ["/data"]
    assert not [line for line in image.config["Env"] if "PASSWORD" in line or "SECRET" in line]
