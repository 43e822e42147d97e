"""Each private name of uvicorn and httptools that `server/` uses exists, in the uvicorn that is installed.

uvicorn promises none of them. If this fails after an upgrade, the message names the release and what it has changed.
The names are read from the source of `server/`, so the test needs no list of its own.
"""

import ast
import importlib
import inspect
import tomllib
from functools import cache

import httptools
import uvicorn
from packaging.requirements import Requirement
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tests.support.servers import ROOT

RELEASE = f"uvicorn {uvicorn.__version__}, httptools {httptools.__version__}"

BASES: dict[str, type] = {
    "uvicorn.Server": uvicorn.Server,
    "AcceptingServer": uvicorn.Server,
    "HttpToolsProtocol": HttpToolsProtocol,
    "BoundedProtocol": HttpToolsProtocol,
    "RequestResponseCycle": RequestResponseCycle,
    "_CycleWithBody": RequestResponseCycle,
    "FlowControl": FlowControl,
    "LifespanOn": LifespanOn,
    "ServerState": ServerState,
}
"""The classes of uvicorn by the names under which `server/` subclasses them."""

OWNERS: dict[str, type] = {
    "self.cycle": RequestResponseCycle,
    "cycle": RequestResponseCycle,
    "RequestResponseCycle": RequestResponseCycle,
    "protocol": HttpToolsProtocol,
    "self.flow": FlowControl,
    "self.server_state": ServerState,
    "self._state": ServerState,
    "state": ServerState,
    "self.lifespan": LifespanOn,
    "self.config": uvicorn.Config,
    "options": uvicorn.Config,
    "self.parser": httptools.HttpRequestParser,
    "parser": httptools.HttpRequestParser,
}
"""Expressions in `server/` that are objects of uvicorn."""

ADDED = {
    "cut_off",
    *("failure", "follow", "drain"),  # of a worker's server and its lifespan
    *("idle", "answer_at_once"),  # of the protocol and its answers
    *("held", "hold", "release"),  # of the flow control
    *("on_chunk_header", "on_chunk_complete"),  # callbacks of httptools that uvicorn does not use
}
"""Names that `server/` adds to those classes."""


@cache
def sources() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in (ROOT / "tokenauth/server").glob("*.py")]


def imported() -> set[tuple[str, str]]:
    """Return the modules of uvicorn and httptools, and the names that are imported from them."""
    found = set()
    for tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in {"uvicorn", "httptools"}:
                found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def used() -> set[tuple[type, str]]:
    """Return the classes of uvicorn, and the names of their objects that `server/` uses or overrides."""
    found = set()
    for tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in OWNERS:
                found.add((OWNERS[ast.unparse(node.value)], node.attr))
            elif isinstance(node, ast.ClassDef):
                for base in (BASES[name] for name in map(ast.unparse, node.bases) if name in BASES):
                    found |= {(base, name) for name in names_in(node) if not name.startswith("_")}
    return {(owner, name) for owner, name in found if name not in ADDED and not name.startswith("__")}


def names_in(class_: ast.ClassDef) -> set[str]:
    """Return what a class defines, and what it uses of itself."""
    defined = {node.name for node in class_.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in class_.body:
        if isinstance(node, ast.Assign):
            defined |= set(map(ast.unparse, node.targets))
        elif isinstance(node, ast.AnnAssign):
            defined.add(ast.unparse(node.target))
    attributes = (node for node in ast.walk(class_) if isinstance(node, ast.Attribute))
    return defined | {node.attr for node in attributes if ast.unparse(node.value) in {"self", "super()"}}


def has(owner: type, name: str) -> bool:
    """Return whether a class has an attribute, or gives it to its objects."""
    return hasattr(owner, name) or name in given(owner)


@cache
def given(owner: type) -> set[str]:
    """Return the attributes of `self` in the source of a class."""
    attributes = (node for node in ast.walk(ast.parse(inspect.getsource(owner))) if isinstance(node, ast.Attribute))
    return {node.attr for node in attributes if ast.unparse(node.value) == "self"}


def test_what_is_imported_exists() -> None:
    missing = [f"{module}.{name}" for module, name in imported() if not hasattr(importlib.import_module(module), name)]
    assert missing == [], RELEASE


def test_what_is_used_or_overridden_exists() -> None:
    missing = [f"{owner.__name__}.{name}" for owner, name in used() if not has(owner, name)]
    assert missing == [], RELEASE


def test_the_names_are_found_in_the_source() -> None:
    """Otherwise the tests above would check nothing."""
    names = {(owner.__name__, name) for owner, name in used()}
    assert {
        ("HttpToolsProtocol", "on_response_complete"),
        ("HttpToolsProtocol", "pipeline"),
        ("RequestResponseCycle", "send_500_response"),
        ("RequestResponseCycle", "disconnected"),
        ("ServerState", "default_headers"),
        ("FlowControl", "resume_reading"),
        ("HttpRequestParser", "should_upgrade"),
        ("Config", "lifespan_class"),
        ("Server", "servers"),
    } <= names
    assert not has(HttpToolsProtocol, "no_such_name")


def test_a_cycle_takes_these_arguments() -> None:
    expected = {
        *("scope", "transport", "flow", "logger", "access_logger", "access_log", "default_headers", "message_event"),
        *("expect_100_continue", "keep_alive", "on_response"),
    }
    assert set(inspect.signature(RequestResponseCycle).parameters) == expected, RELEASE


def test_a_protocol_takes_these_arguments() -> None:
    expected = ["config", "server_state", "app_state", "_loop"]
    assert list(inspect.signature(HttpToolsProtocol).parameters) == expected, RELEASE


def test_send_reads_its_status_lines_from_a_global() -> None:
    """The function is built again with other globals, which works without closures and defaults only."""
    send = RequestResponseCycle.send
    assert "STATUS_LINE" in send.__code__.co_names, RELEASE
    assert (send.__code__.co_freevars, send.__defaults__, send.__kwdefaults__) == ((), None, None), RELEASE


def test_the_wheel_bounds_uvicorn_above() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (requirement,) = (one for one in map(Requirement, dependencies) if one.name == "uvicorn")
    assert uvicorn.__version__ in requirement.specifier
    assert [one.operator for one in requirement.specifier if one.operator.startswith("<")] == ["<"]
