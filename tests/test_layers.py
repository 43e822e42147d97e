"""The layers of the design: a module imports strictly lower ones, and third-party names stay home."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tokenauth"

LAYERS = [
    {"models", "waiting_line", "clock", "errors", "values", "nesting", "addresses", "logs", "metrics"}
    | {"file_descriptors", "file_locks", "user_agents", "request_context", "status", "background"},
    {"stores", "passwords", "login_queue", "executor", "settings", "audit"},
    {"tokens", "named_tokens", "token_uses", "pools", "waiting", "credentials", "throttle"}
    | {"revocation_queue", "risks"},
    {"event_streams", "topic_watcher"},
    {"service", "sweeper", "gauges"},
    {"web"},
    {"web.routes", "web.dialects"},
    {"web.app", "web.api_documentation"},
    {"server"},
    {"client"},  # independent of the server
    {"cli"},
]

HOMES = {
    "httpx": {"client"},
    "sqlalchemy": {"stores"},
    "asyncpg": {"stores"},
    "alembic": {"stores"},
    "sqlite3": {"stores"},
    "passlib": {"passwords"},
    "starlette": {"web", "server"},
    "uvicorn": {"web", "server"},
    "jinja2": {"web"},
    "markupsafe": {"web"},
    "click": {"cli"},
    "rich": {"cli"},
    "tomlkit": {"settings"},
    "structlog": {"logs"},
    "prometheus_client": {"server"},
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in {"__init__.py", "__main__.py"} and "migrations" not in path.parts
}


@cache
def imports(path: Path) -> set[str]:
    """Name every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    """Return the layer of a module: that of the longest name which begins it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    raise AssertionError(f"{module} belongs to no layer of tests/test_layers.py")


def own_imports(module: str) -> set[str]:
    """Name the modules of the package that a module imports."""
    return {name.removeprefix("tokenauth.") for name in imports(MODULES[module])} & set(MODULES)


def test_a_module_imports_no_higher_layer() -> None:
    pairs = ((module, other) for module in MODULES for other in own_imports(module))
    assert [f"{module} imports {other}" for module, other in pairs if layer(other) > layer(module)] == []


def test_no_two_modules_import_each_other() -> None:
    try:
        list(TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")


def test_third_party_names_stay_home() -> None:
    for module, path in MODULES.items():
        for name in {name.partition(".")[0] for name in imports(path)} & set(HOMES):
            assert module.partition(".")[0] in HOMES[name], f"{module} imports {name}"


def test_web_knows_no_store() -> None:
    for module in [name for name in MODULES if name.startswith("web.") and name != "web.app"]:
        assert not [name for name in imports(MODULES[module]) if name.startswith("tokenauth.stores")], module


DATABASES = ("stores.sqlite", "stores.postgres")


def test_only_one_module_knows_the_databases() -> None:
    for module in [name for name in MODULES if not name.startswith(("stores.open", *DATABASES))]:
        found = imports(MODULES[module])
        assert not [name for name in found if name.removeprefix("tokenauth.").startswith(DATABASES)], module


@pytest.mark.parametrize("module", ["tokens", "pools", "throttle", "sweeper"])
def test_services_know_only_the_contract_of_stores(module: str) -> None:
    known = {name for name in imports(MODULES[module]) if name.startswith("tokenauth.stores")}
    assert {name.split(".")[2] for name in known} <= {"store"}


def test_refusals_of_the_domain_know_no_http() -> None:
    """The texts of `web/responses.py` name headers."""
    code = PACKAGE.joinpath("errors.py").read_text().partition("class ")[2]
    assert not re.findall(r"(?i)\bX-Token\b|authorization|retry-after|\bheaders?\b|\bHTTP\b|\bstatus\b", code)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("client.")])
def test_clients_know_nothing_of_the_server(module: str) -> None:
    own = {name for name in imports(MODULES[module]) if name.startswith("tokenauth.")} & {
        f"tokenauth.{other}" for other in MODULES
    }
    assert {name.split(".")[1] for name in own} <= {
        "models",
        "waiting_line",
        "clock",
        "errors",
        "values",
        "nesting",
        "client",
    }
