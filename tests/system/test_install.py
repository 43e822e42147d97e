"""The documented install: lock files with hashes."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.servers import ROOT, TOKENAUTH, write_config

GUIDE = (ROOT / "docs/production.md").read_text()
LOCKS = ["requirements.lock", "requirements-serve.lock"]


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Return the version and the number of hashes of each package in a lock file."""
    packages = re.split(r"^(?=\S+==)", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
    heads = (re.match(r"([\w.-]+)==(\S+) \\$", package, re.MULTILINE) for package in packages)
    return {
        head[1]: (head[2], package.count("--hash=sha256:"))
        for head, package in zip(heads, packages, strict=True)
        if head is not None
    }


def test_the_serving_lock_has_the_versions_tested() -> None:
    everything, serving = map(locked, LOCKS)
    assert {name: everything[name][0] for name in serving} == {name: version for name, (version, _) in serving.items()}
    assert len(serving) < len(everything) / 2
    assert all(hashes for _, hashes in serving.values())


def test_the_serving_lock_has_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["postgres"], *extras["build"]]
    assert {re.split(r"[\[>=;]", one)[0].strip() for one in wanted} <= set(locked("requirements-serve.lock"))


@pytest.mark.parametrize("name", LOCKS)
def test_no_lock_names_a_host(name: str) -> None:
    assert re.findall(r"\w+://|--(?:extra-)?index-url|--find-links|--trusted-host", (ROOT / name).read_text()) == []


def test_the_documented_install_requires_hashes() -> None:
    installs = re.findall(r"^sudo /opt/tokenauth/bin/pip install (.*)$", GUIDE, re.MULTILINE)
    assert installs == [
        "--require-hashes -r requirements-serve.lock",
        "--no-deps dist/tokenauth_server-*.whl",
        "--require-hashes -r requirements-serve.lock",
        "--force-reinstall --no-deps dist/tokenauth_server-*.whl",
    ]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "serve"),
        (["PORT=8001"], 'serve --port "8001"'),
        (["HOST=0.0.0.0", "PORT=8001"], 'serve --host "0.0.0.0" --port "8001"'),
    ],
)
def test_make_serve_takes_host_and_port(arguments: list[str], command: str) -> None:
    make = ["make", "--dry-run", "--no-print-directory", "--assume-old=.venv/.serves", "serve", *arguments]
    environment = {name: os.environ[name] for name in os.environ if name not in {"HOST", "PORT", "MAKEFLAGS"}}
    done = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert " ".join(done.stdout.split()).endswith(f".venv/bin/tokenauth {command}")


def test_the_installed_command_has_the_secrets(tmp_path: Path) -> None:
    """It runs as the documents have it. Only what changes the user is replaced."""
    found = re.search(
        r"^sudo tee /usr/local/bin/tokenauth >/dev/null <<'EOF'\n(.*?)^EOF$", GUIDE, re.MULTILINE | re.DOTALL
    )
    assert found is not None
    script = found[1].replace("/opt/tokenauth/bin/tokenauth", TOKENAUTH).replace("/etc/tokenauth", str(tmp_path))
    for name, text in {"tokenauth": script, "id": "#!/bin/sh\necho 0\n", "runuser": _RUNUSER}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("tokenauth.db", "${NAME}.db"))
    (tmp_path / "environment").write_text("NAME='a b'\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for arguments in (["migrate"], ["user", "list"]):
        command = [str(tmp_path / "tokenauth"), *arguments]
        subprocess.run(command, env=environment, cwd="/", capture_output=True, check=True)
    assert (tmp_path / "a b.db").exists()
    assert (tmp_path / "ran as").read_text() == "-u tokenauth\n"


_RUNUSER = """#!/bin/sh
echo "$1 $2" >> "$(dirname "$0")/ran as"
shift 3
exec "$@"
"""
