"""The commands of docs/production.md: install, back up, restore, upgrade and downgrade, each as it is written.

Only `sudo`, `systemctl` and what makes a system user are replaced, and the directories are those of the test.
"""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.support.documents import blocks, read, section
from tests.support.ports import free_port
from tests.support.servers import ROOT, Server, log_in, probe, spawn
from tests.support.skipping import skip_without

GUIDE = read("docs/production.md")
PASSWORD = "correct horse battery"

_FUNCTIONS = """
useradd() { :; }
chgrp() { :; }
systemctl() { echo "$1" >> "$HOME/systemctl"; }
install() {
    local kept=()
    while [ $# -gt 0 ]; do case "$1" in -o|-g) shift 2 ;; *) kept+=("$1"); shift ;; esac; done
    command install "${kept[@]}"
}
export -f useradd chgrp systemctl install
"""

_PROGRAMS = {
    "sudo": 'if [ "$1" = -u ]; then shift 2; fi; "$@"',
    "runuser": 'shift 3; exec "$@"',
    "id": "echo 0",
}
"""For the command that the guide installs, too: it is a script of its own."""


class Machine:
    """A machine that is administered by the guide: its directories, and a copy of the checkout."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.checkout = home / "checkout"
        self.opt, self.etc, self.var = (home / name for name in ("opt", "etc", "var"))
        self.var.mkdir(mode=0o700)
        ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "dist", "tests", "bench")
        shutil.copytree(ROOT, self.checkout, ignore=ignored)
        (self.checkout / "dist").mkdir()
        self.bin = home / "bin"
        self.bin.mkdir()
        for name, script in _PROGRAMS.items():
            (self.bin / name).write_text(f"#!/bin/bash\n{script}\n")
            (self.bin / name).chmod(0o755)

    def run(self, script: str, **env: str) -> str:
        """Run commands of the guide, in the checkout."""
        words: Mapping[str, Path] = {
            "/opt/tokenauth": self.opt,
            "/etc/tokenauth": self.etc,
            "/var/lib/tokenauth": self.var,
            "/usr/local/bin": self.bin,
        }
        for there, here in words.items():
            script = script.replace(there, str(here))
        script = script.replace("python3 -m venv", f"{sys.executable} -m venv")
        script = script.replace("make wheel", f"{sys.executable} -m hatchling build -t wheel")
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", f"{_FUNCTIONS}\n{script}"],
            cwd=self.checkout,
            env={**os.environ, **env, "HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    @property
    def config(self) -> Path:
        return self.etc / "config.toml"

    @contextmanager
    def serving(self) -> Iterator[Server]:
        port = free_port()
        command = [str(self.opt / "bin/tokenauth"), "serve", "--config", str(self.config), "--port", str(port)]
        with spawn(command, self.home, cwd=self.var, env={"PYTHONPATH": ""}) as server:
            server.wait("started")
            server.port = port
            yield server
            assert server.stop() == 0

    def requests(self) -> list[str]:
        """Return what systemctl was asked for since the last call."""
        path = self.home / "systemctl"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Install as the guide says. Only the password is not typed."""
    for name in ("sqlite3", "bash"):
        if shutil.which(name) is None:
            skip_without(name, f"apt-get install {name}")
    made = Machine(tmp_path_factory.mktemp("machine"))
    install, command = blocks(section(GUIDE, "## Install"), "sh")
    assert "tokenauth init --config" in install
    made.run(re.sub(r"(tokenauth init .*)", rf"\1 --username admin --password-stdin <<< '{PASSWORD}'", install))
    assert made.config.stat().st_mode & 0o777 == 0o640
    made.run(command)
    absolute = "sqlite+aiosqlite:////var/lib/tokenauth/tokenauth.db"
    assert absolute in GUIDE
    text = made.config.read_text()
    assert "sqlite+aiosqlite:///tokenauth.db" in text
    here = f"sqlite+aiosqlite:///{made.var}/tokenauth.db"
    made.config.write_text(text.replace("sqlite+aiosqlite:///tokenauth.db", here))
    return made


def test_a_restored_backup_admits_nobody_by_itself(machine: Machine) -> None:
    backup, restore = blocks(section(GUIDE, "## Backup"), "sh")
    with machine.serving() as server, server.client() as client:
        revoked, kept = (log_in(client, "admin", PASSWORD) for _ in range(2))
        machine.run(backup)
        client.request("DELETE", "/api/token", json={"token": revoked})
        assert probe(client, kept)
    machine.run(restore)
    assert machine.requests() == ["stop", "start"]
    with closing(sqlite3.connect(machine.var / "tokenauth.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert (machine.var / "tokenauth.db").stat().st_mode & 0o777 == 0o600
    with machine.serving() as server, server.client() as client:
        assert not probe(client, revoked)
        assert not probe(client, kept)
        assert probe(client, log_in(client, "admin", PASSWORD))


def test_a_restore_without_revoking_revives_tokens(machine: Machine) -> None:
    backup, restore = blocks(section(GUIDE, "## Backup"), "sh")
    (machine.var / "backup-of-today.db").unlink(missing_ok=True)
    with machine.serving() as server, server.client() as client:
        token = log_in(client, "admin", PASSWORD)
        machine.run(backup)
        client.request("DELETE", "/api/token", json={"token": token})
        assert not probe(client, token)
    machine.run(restore.replace("tokens revoke --all", "tokens list"))
    assert machine.requests() == ["stop", "start"]
    with machine.serving() as server, server.client() as client:
        assert probe(client, token)


def installed(machine: Machine) -> Path:
    (found,) = machine.opt.glob("lib/python3*/site-packages/tokenauth/__init__.py")
    return found


def test_the_upgrade_installs_an_unchanged_version(machine: Machine) -> None:
    (upgrade,) = blocks(section(GUIDE, "## Upgrade"), "sh")
    with machine.serving() as server, server.client() as client:
        token = log_in(client, "admin", PASSWORD)
    source = machine.checkout / "tokenauth/__init__.py"
    source.write_text(source.read_text() + "# a newer one with the same version\n")
    machine.run(upgrade)
    assert machine.requests() == ["restart"]
    assert installed(machine).read_text() == source.read_text()
    with machine.serving() as server, server.client() as client:
        assert probe(client, token)


def test_an_older_release_of_a_generation_goes_on(machine: Machine) -> None:
    """The newer one has added a step to the schema. The commands are those of the upgrade, in the older checkout."""
    (upgrade,) = blocks(section(GUIDE, "## Upgrade"), "sh")
    with machine.serving() as server, server.client() as client:
        token = log_in(client, "admin", PASSWORD)
    with closing(sqlite3.connect(machine.var / "tokenauth.db")) as db:
        (head,) = db.execute("SELECT version_num FROM alembic_version").fetchone()
        generation, step = head.split(".")
        db.execute("UPDATE alembic_version SET version_num = ?", (f"{generation}.{int(step) + 1}",))
        db.execute("ALTER TABLE tokens ADD COLUMN of_a_later_step INTEGER")
        db.commit()
    machine.run(upgrade)
    assert machine.requests() == ["restart"]
    with machine.serving() as server, server.client() as client:
        assert probe(client, token)
        assert probe(client, log_in(client, "admin", PASSWORD))
