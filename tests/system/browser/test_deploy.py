"""The three cases in deploy/, with their own files and programs, but without containers: a person logs in at each.

The names of the containers are replaced with addresses of this machine.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from playwright.sync_api import Browser, Page, expect

from tests.support.journal import until
from tests.support.ports import free_port
from tests.support.servers import NO_TLS, ROOT, Server, spawn
from tests.system.proxies.running import documented, program

DEPLOY = ROOT / "deploy"
COMMAND = Path(sys.executable).parent / "tokenauth"
PASSWORD = "correct horse battery"


def compose(case: str) -> dict[str, Any]:
    """Return the compose file of a case."""
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / case / "compose.yaml").read_text())
    return loaded


def replaced(text: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def answers(port: int, status: int) -> bool:
    try:
        return httpx.get(f"http://localhost:{port}/", verify=NO_TLS).status_code == status
    except httpx.TransportError:
        return False


class Case:
    """The services of one compose file, on ports of this machine."""

    def __init__(self, name: str, directory: Path, words: Mapping[str, str], env: Mapping[str, str]) -> None:
        self._services = compose(name)["services"]
        self._files = DEPLOY / name
        self._directory = directory
        self._words = words
        self._env = {"TOKENAUTH_CONFIG": str(directory / "config.toml"), **env}

    def set_up(self, *accepted: str) -> None:
        """Run the command of the service `setup`. The configuration has no other risk than those that it accepts."""
        arguments = [self._here(argument) for argument in self._services["setup"]["command"]]
        self._run(*arguments, "--username", "admin", "--password-stdin", given=PASSWORD)
        assert re.findall(r"^risk: (\w+): ", self._run("check"), re.MULTILINE) == [*accepted]

    @contextmanager
    def serving(self, port: int) -> Iterator[Server]:
        """Run one node, and ask it as the health check of its container does."""
        command = [COMMAND, "serve", "--host", "127.0.0.1", "--port", str(port)]
        with spawn([str(part) for part in command], self._directory, self._env) as server:
            server.wait("started")
            (test,) = {tuple(s["healthcheck"]["test"][1:]) for s in self._services.values() if self._is_node(s)}
            assert test[0] == "tokenauth"
            assert self._run(*test[1:], "--url", f"http://127.0.0.1:{port}") == "ready\n"
            yield server
            assert server.stop() == 0

    @contextmanager
    def caddy(self, file: str, port: int, status: int) -> Iterator[Server]:
        """Run Caddy with a file of the case until it answers."""
        command, path = program("caddy"), self._directory / file
        path.write_text(self._here((self._files / file).read_text()))
        env = {**self._env, "HOME": str(self._directory), "XDG_DATA_HOME": str(self._directory)}
        with spawn([command, "run", "--adapter", "caddyfile", "--config", str(path)], self._directory, env) as server:
            until(lambda: answers(port, status), f"Caddy answers {status}")
            yield server

    def _here(self, text: str) -> str:
        """Replace addresses, and variables as Compose does."""
        text = re.sub(r"(?<!\$)\$\{\w+:-([^}]*)\}", r"\1", text).replace("$${", "${")
        return replaced(text, self._words)

    def _is_node(self, service: Mapping[str, Any]) -> bool:
        return service.get("image") == "tokenauth" and "profiles" not in service and "healthcheck" in service

    def _run(self, *arguments: str, given: str = "") -> str:
        done = subprocess.run(
            [COMMAND, *arguments],
            cwd=self._directory,
            env={**os.environ, **self._env},
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context() as context:
        yield context.new_page()


def log_in(page: Page) -> None:
    page.get_by_label("User name").fill("admin")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()


@pytest.mark.faults
def test_a_person_logs_in_to_tokenauth_alone(tmp_path: Path, page: Page) -> None:
    port = free_port()
    case = Case("alone", tmp_path, {":8000": f":{port}"}, {})
    case.set_up("no_tls")
    with case.serving(port):
        page.goto(f"http://localhost:{port}/login")
        log_in(page)
        expect(page.get_by_role("heading", level=1)).to_have_text("Logged in as admin")


def test_a_person_logs_in_to_the_application(tmp_path: Path, page: Page) -> None:
    port, issuer, app = free_port(), free_port(), free_port()
    words = {
        "{$SITE}": f"http://localhost:{port}", ":8080": f":{port}", "172.30.77.2": "127.0.0.1",
        "tokenauth:8000": f"127.0.0.1:{issuer}", "app:9000": f"127.0.0.1:{app}", ":9000": f":{app}",
    }  # fmt: skip
    case = Case("forward-auth", tmp_path, words, {})
    case.set_up()
    with case.serving(issuer), case.caddy("app.Caddyfile", app, 200), case.caddy("Caddyfile", port, 401):
        page.goto(f"http://localhost:{port}/reports?of=today")
        log_in(page)
        expect(page.get_by_text("Hello admin!")).to_be_visible()
        expect(page).to_have_url(f"http://localhost:{port}/reports?of=today")
        page.goto(f"http://localhost:{port}/logout")
        page.get_by_role("button", name="Log out").click()
        page.goto(f"http://localhost:{port}/reports")
        expect(page.get_by_role("heading")).to_have_text("Log in")


@pytest.mark.faults
def test_a_person_is_logged_in_at_both_nodes(tmp_path: Path, page: Page, database: str) -> None:
    port, *nodes = free_port(), free_port(), free_port()
    (tmp_path / "database-password").write_text("not-asked-for-here\n")
    host = database.partition("@")[2]
    words = {
        ":8080": f":{port}", "172.30.78.2": "127.0.0.1", "@database/tokenauth": f"@{host}",
        "node-a:8000": f"127.0.0.1:{nodes[0]}", "node-b:8000": f"127.0.0.1:{nodes[1]}",
    }  # fmt: skip
    case = Case("two-nodes", tmp_path, words, {"DATABASE_PASSWORD_FILE": str(tmp_path / "database-password")})
    case.set_up()
    assert "not-asked-for-here" not in (tmp_path / "config.toml").read_text()
    with ExitStack() as stack:
        servers = [stack.enter_context(case.serving(node)) for node in nodes]
        stack.enter_context(case.caddy("Caddyfile", port, 200))
        page.goto(f"http://localhost:{port}/login")
        log_in(page)
        for _ in range(4):
            page.goto(f"http://localhost:{port}/login")
            expect(page.get_by_role("heading")).to_have_text("You are logged in")
        assert servers[0].stop() == 0
        page.goto(f"http://localhost:{port}/login")
        expect(page.get_by_role("heading")).to_have_text("You are logged in")


def test_the_rules_of_caddy_are_those_of_the_guide() -> None:
    """A rule that was added to one file only would be missing in the other."""
    guide, shipped = documented()["/etc/caddy/Caddyfile"], (DEPLOY / "forward-auth/Caddyfile").read_text()
    for name in ("ask", "no_aliases", "forget"):
        blocks = [re.findall(rf"^\({name}\) \{{\n.*?^\}}", text, re.MULTILINE | re.DOTALL) for text in (guide, shipped)]
        assert len(blocks[0]) == 1
        assert blocks[0] == blocks[1]
