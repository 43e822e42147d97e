"""The examples of the document work: each example request gets the example response."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import Server, log_in, shipped_with_dialects, worker
from tests.wire.openapi.checked_client import FORM, PASSWORD
from tests.wire.openapi.configurations import API_PASSWORD
from tests.wire.openapi.conformance import Documented, Operation

CHANGES = {
    "idle = 0 ": 'idle = "2h" ',
    'issuer = ""': 'issuer = "https://auth.example.com"',
    'scopes = ["admin"]': 'scopes = ["admin", "introspect"]',
    'delay = "1s"': 'delay = "10m"',
    "trusted_proxies = []": 'trusted_proxies = ["127.0.0.1"]',
    "accept_risks = []": 'accept_risks = ["shipped_password", "open_dialect"]',
    "${API_PASSWORD}": API_PASSWORD,
}
"""Changes to the configuration that the texts of the examples mention."""

PREREQUISITES = {
    "rotateNamedToken": "issueNamedToken",
    "revokeMyToken": "listMyTokens",
    "showPool": "assignToken",
    "deleteToken": "releaseToken",
    "simpleTokenImplementIssueByGet": "simpleTokenImplementRecycle",
    "simpleTokenImplementRecycleByGet": "simpleTokenImplementIssue",
    "tokenPoolBlock": "tokenPoolGenerate",
    "tokenPoolBlockSlash": "tokenPoolGenerateSlash",
    "tokenManagementServiceDeleteByDelete": "tokenManagementServiceGenerate",
}
"""Examples that need another one to be sent again first, because the token was used up or a lease is needed."""

IN_LINE = {"listRequests", "leaveLine"}
"""Examples that need a request in the waiting line."""

THROTTLED = {"listThrottled", "clearThrottle"}
"""Examples that need failed logins."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server with the shipped configuration and user, with all dialects switched on."""
    directory: Path = tmp_path_factory.mktemp("examples")
    text = shipped_with_dialects()
    for shipped, needed in CHANGES.items():
        assert shipped in text, shipped
        text = text.replace(shipped, needed)
    text += (
        '[pools.phones]\n[[pools.phones.members]]\nname = "pixel-8"\nlabels = ["android", "arm"]\nnote = "shelf 3"\n'
    )
    config = directory / "config.toml"
    config.write_text(text.replace(":///tokenauth.db", f":///{directory}/tokenauth.db"))
    config.chmod(0o600)
    with worker(config) as running:
        yield running


class ExampleRunner:
    """Sends examples in order, with values of real responses in place of the example values."""

    def __init__(self, client: httpx.Client, documented: Documented) -> None:
        self._client = client
        self._documented = documented
        self._real: dict[str, str] = {}

    def send(self, operation: Operation) -> None:
        """Send the example of an operation and compare the response with its example."""
        described = operation.described
        parameters = [each for each in described.get("parameters", ()) if "example" in each]
        path = operation.path
        for each in parameters:
            path = path.replace(f"{{{each['name']}}}", self._translate(each["example"]))
        query = {each["name"]: self._translate(each["example"]) for each in parameters if each["in"] == "query"}
        options: dict[str, Any] = {"params": query, "headers": self._credentials(operation)}
        if operation.body is not None:
            example = described["requestBody"]["content"][operation.body]["example"]
            options["data" if operation.body == FORM else "json"] = self._translate(example)
        answer = self._client.request(operation.method, path, **options)
        granted = str(answer.status_code)
        assert granted in described["responses"], (operation.id, answer.text)
        assert granted.startswith("2"), (operation.id, answer.text)
        self._documented.check(answer)
        content = described["responses"][granted].get("content", {}).get("application/json")
        if content is not None and operation.path != "/openapi.json":
            shown = content["example"] if "example" in content else content["examples"]["answer 1"]["value"]
            self._compare(operation.id, shown, answer.json())

    def join_line(self) -> None:
        """Wait for the only token, which is leased, under the name that the examples use."""
        wanted = {"holder": "build-7", "request": "job-42", "wait": 0}
        token = {"X-Token": log_in(self._client)}
        answer = self._client.post("/api/pools/permits/leases", json=wanted, headers=token)
        assert answer.status_code == 202, answer.text
        self._documented.check(answer)

    def fail(self) -> None:
        """Fail to log in, from the address that the examples use, until it is refused."""
        wrong, address = {"username": "admin", "password": "wrong"}, {"X-Forwarded-For": "198.51.100.7"}
        while (answer := self._client.post("/api/token", json=wrong, headers=address)).status_code != 429:
            self._documented.check(answer)

    def _credentials(self, operation: Operation) -> dict[str, str]:
        if any("X-Token" in schemes for schemes in operation.schemes) and set() not in operation.schemes:
            return {"X-Token": log_in(self._client)}
        return PASSWORD if {"X-API-PASSWORD"} in operation.schemes else {}

    def _translate(self, example: Any) -> Any:
        """Replace example values with values of earlier responses."""
        text = json.dumps(example)
        for shown, real in self._real.items():
            text = text.replace(shown, real)
        return json.loads(text)

    def _compare(self, name: str, shown: Any, real: Any) -> None:
        """Check that a response has the same fields, types and sentences as its example."""
        if isinstance(shown, dict):
            assert shown.keys() == real.keys(), (name, real)
            for key in shown:
                self._compare(f"{name}.{key}", shown[key], real[key])
        elif isinstance(shown, list):
            assert bool(shown) == bool(real), (name, real)
            for one, other in zip(shown, real, strict=False):
                self._compare(name, one, other)
        elif isinstance(shown, str) and " " in shown:
            assert self._translate(shown) == real, name
        elif isinstance(shown, str) and re.fullmatch(r"[\w-]{24,}", shown):
            self._real[shown] = real
        else:
            assert type(shown) is type(real), (name, real)


def test_the_examples_work_in_the_order_of_the_page(server: Server) -> None:
    with server.client() as client:
        documented = Documented(client.get("/openapi.json").json())
        runner = ExampleRunner(client, documented)
        tags = [tag["name"] for tag in documented.document["tags"]]
        operations = sorted(documented, key=lambda operation: tags.index(operation.described["tags"][0]))
        by_id = {operation.id: operation for operation in operations}
        for operation in operations:
            if operation.id in PREREQUISITES:
                runner.send(by_id[PREREQUISITES[operation.id]])
            if operation.id in THROTTLED:
                runner.fail()
            if operation.id in IN_LINE:
                runner.join_line()
            if operation.id != "streamEvents":  # it does not end: tests/wire/routes/test_events.py reads it
                runner.send(operation)
    assert len(operations) > 40


def test_the_login_example_is_the_shipped_user(server: Server) -> None:
    with server.client() as client:
        document = client.get("/openapi.json").json()
        login = document["paths"]["/api/token"]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert client.post("/api/token", json=login).status_code == 200
    assert [user["username"] for user in shipped_users()] == [login["username"]]


def shipped_users() -> list[dict[str, Any]]:
    users: list[dict[str, Any]] = tomllib.loads(shipped_with_dialects())["users"]
    return users
