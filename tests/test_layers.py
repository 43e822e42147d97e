"""The layers of the design: a module imports strictly lower ones, and third-party names stay home."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tokenauth"

LAYERS = [
    {"models", "errors", "opaque", "percent", "logs", "transport", "client.redaction", "channel", "descriptors"}
    | {"stores.hosts", "stores.files"},
    {
        "section",
        "lane",
        "login_queue",
        "protocol",
        "acceptor",
        "textfile",
        "stores.tables",
        "stores.base",
        "stores.transaction",
        "stores.circuit",
        "stores.turns",
        "revocation_ledger",
    }
    | {"client.issuer", "client.lease"},
    {"lending", "client.auth", "client.remote", "client.pools"},
    {"config"},
    {"passwords", "configfile", "stores.writer", "stores.cached", "stores.verbs", "stores.schema", "stores.pool_rows"},
    {"risks", "users", "throttle", "stores.pool_verbs"},
    {"stores.sql", "stores.reader", "stores.connections", "credentials"},
    {"stores.listener", "stores.lookup"},
    {"revocation_queue"},
    {"tokens", "pools", "stores.sqlite", "stores.postgres"},
    {"routes.requests", "routes.pages", "routes.refusals", "routes.table", "stores.open", "sweeper"},
    {"routes.operations"},
    {"routes.openapi"},
    {"routes.docs"},
    {
        "routes.token",
        "routes.account",
        "routes.pools",
        "routes.health",
        "routes.forward_auth",
        "routes.oauth",
    }
    | {"dialects", "middleware", "access", "service"},
    {"app"},
    {"worker"},
    {"supervisor"},
    {"server"},
    {"cli.base"},
    {"cli.users", "cli.tokens", "cli.pools"},
    {"cli.main"},
]

HOMES = {
    "httpx": {"client"},
    "sqlalchemy": {"stores"},
    "aiosqlite": {"stores"},
    "asyncpg": {"stores"},
    "alembic": {"stores"},
    "sqlite3": {"stores"},
    "passlib": {"passwords"},
    "starlette": {"routes", "dialects", "middleware", "access", "app", "worker"},
    "uvicorn": {"app", "worker", "protocol", "acceptor"},
    "click": {"cli"},
    "rich": {"cli"},
    "tomlkit": {"users"},
    "structlog": {"logs"},
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" and "migrations" not in path.parts
}


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
    """Say in which layer a module is."""
    found = [
        number for number, modules in enumerate(LAYERS) if {module, module.partition("dialects.")[1][:-1]} & modules
    ]
    assert len(found) == 1, f"{module} belongs into exactly one layer of tests/test_layers.py"
    return found[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_strictly_lower_layers(module: str) -> None:
    own = {name.removeprefix("tokenauth.") for name in imports(MODULES[module]) if name.startswith("tokenauth.")}
    for other in own & set(MODULES):
        assert layer(other) < layer(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_third_party_names_stay_home(module: str) -> None:
    for name in {name.partition(".")[0] for name in imports(MODULES[module])} & set(HOMES):
        assert module.partition(".")[0] in HOMES[name], f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("routes.", "dialects."))])
def test_routes_and_dialects_do_not_know_stores(module: str) -> None:
    assert not [name for name in imports(MODULES[module]) if name.startswith("tokenauth.stores")]


@pytest.mark.parametrize("module", ["tokens", "pools", "throttle", "sweeper"])
def test_services_know_only_the_contract_of_stores(module: str) -> None:
    known = {name for name in imports(MODULES[module]) if name.startswith("tokenauth.stores")}
    assert {name.split(".")[2] for name in known} <= {"base"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("client.")])
def test_clients_know_nothing_of_the_server(module: str) -> None:
    own = {name for name in imports(MODULES[module]) if name.startswith("tokenauth.")} & {
        f"tokenauth.{other}" for other in MODULES
    }
    assert {name.split(".")[1] for name in own} <= {"models", "errors", "opaque", "client"}
