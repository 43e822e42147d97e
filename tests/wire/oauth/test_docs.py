"""The commands and the Python code of docs/oauth.md work."""

import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path
from typing import Any

import httpx
import pytest

from tests.support.servers import ROOT, Server, worker, write_config
from tests.wire.oauth.forms import UNKNOWN, table

TEXT = (ROOT / "docs" / "oauth.md").read_text()
USERS = table("backups", "backups-secret", "reports") + table("gateway", "gateway-secret", "introspect")
SETTINGS = '[oauth]\nissuer = "https://auth.example.com"\n[passwords]\nmemory_kib = 8\ntime_cost = 1'


def code(language: str) -> list[str]:
    """Return the code blocks of a language."""
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a worker on the real clock, with the users of the guide."""
    assert "tokenauth user add backups --scope reports" in TEXT
    assert "tokenauth user add gateway --scope introspect" in TEXT
    with worker(write_config(tmp_path_factory.mktemp("issuer"), SETTINGS, USERS)) as running:
        yield running


def curl(client: httpx.Client, command: str, token: str) -> httpx.Response:
    """Send the request of a curl command."""
    url, *options = shlex.split(command.replace("$TOKEN", token))[1:]
    values = dict(zip(options[::2], options[1::2], strict=True))
    path = url.removeprefix("localhost:8000")
    if "-d" not in values:
        return client.get(path)
    name, _, secret = values["-u"].partition(":")
    content_type = {"Content-Type": "application/x-www-form-urlencoded"}
    return client.post(path, content=values["-d"], auth=(name, secret), headers=content_type)


def test_each_command_prints_the_documented_answer(issuer: Server) -> None:
    token, shown = "", 0
    with issuer.client() as client:
        for block in code("console"):
            for command, output in re.findall(r"^\$ (curl .*)\n((?:[^$].*\n)*)", block, re.MULTILINE):
                answer = curl(client, command, token)
                assert answer.status_code == 200, command
                token = token or str(answer.json()["access_token"])
                fields = re.findall(r'"(\w+)":', output)
                document = answer.json() if answer.content else {}
                assert fields == list(document)[: len(fields)]
                assert "..." in output or len(fields) == len(document)
                assert ('"active":true' in output, '"active":false' in output) == (
                    document.get("active") is True,
                    document.get("active") is False,
                )
                shown += 1
    assert shown == 5


def run(text: str, directory: Path) -> dict[str, Any]:
    """Run Python code and return its globals."""
    (directory / "example.py").write_text(text)
    return run_path(str(directory / "example.py"))


@pytest.mark.parametrize("number", range(3), ids=["authlib", "authlib as a guard", "requests-oauthlib"])
def test_each_python_example_runs(issuer: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int) -> None:
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")
    text = code("python")[number].replace("https://auth.example.com", issuer.url)
    text = text.replace("https://reports.example.com/today", f"{issuer.url}/api/me")
    with warnings.catch_warnings(record=True):  # authlib warns that it prefers httpx2
        done = run(text, tmp_path)
    if "guard" in done:
        request = httpx.Request("GET", "https://x", headers={"Authorization": f"Bearer {UNKNOWN}"})
        with pytest.raises(Exception, match="invalid_token"):
            done["guard"].validate_request([], request)
    else:
        assert done["reports"].json()["username"] == "backups"


def test_the_documented_django_settings_are_tested(tmp_path: Path) -> None:
    from tests.wire.oauth import django_site

    documented = run(code("python")[3], tmp_path)["OAUTH2_PROVIDER"]
    setting = "RESOURCE_SERVER_INTROSPECTION_CREDENTIALS"
    tested = django_site.provider("https://auth.example.com", setting, ["gateway", "gateway-secret"])
    assert documented == {name: value for name, value in tested.items() if name != "SCOPES"}
    assert 'protected_resource(scopes=["reports"])' in TEXT
