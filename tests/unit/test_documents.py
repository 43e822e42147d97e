"""The documents agree with each other and with the program: links, settings, commands, log events, promises."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
import pytest

from tests.support.documents import read, rows, section
from tests.support.servers import ROOT
from tests.test_layers import LAYERS
from tests.test_security import PROMISES
from tokenauth.cli import doctor
from tokenauth.cli.base import record_change
from tokenauth.cli.main import main
from tokenauth.cli.run import run
from tokenauth.errors import ConfigError
from tokenauth.metrics import FAMILIES
from tokenauth.settings import loader
from tokenauth.settings.dialects import DIALECTS
from tokenauth.settings.model import MemberSettings, Settings
from tokenauth.web.api_documentation import EVENTS, MY_TOKENS, THROTTLE, TOKEN
from tokenauth.web.responses import STATUS

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))

BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)")


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_each_link_leads_somewhere(path: Path) -> None:
    broken = []
    for file, anchor in LINK.findall(BLOCK.sub("", path.read_text())):
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{file}#{anchor}")
    assert broken == []


def test_sections_that_messages_name_exist() -> None:
    sources = [path.read_text() for path in (ROOT / "tokenauth").rglob("*.py")]
    named = {each for source in sources for each in re.findall(r'docs/([\w-]+\.md), "([^"{]+)"', source)}
    calls = [call for source in sources for call in re.findall(r"[^f] _runbook\((.*)\)", source)]
    runbooks = [*doctor._SECTIONS.values(), *(section for call in calls for section in re.findall(r'"([^"]+)"', call))]
    named |= {("production.md", section) for section in runbooks}
    assert len(named) > len(set(doctor._SECTIONS.values())) + 3
    missing = [f"{file}: {heading}" for file, heading in named if f"# {heading}\n" not in read(f"docs/{file}")]
    assert missing == []


def test_readme_has_at_most_200_lines() -> None:
    assert len(read("README.md").splitlines()) <= 200


def test_readme_links_every_document() -> None:
    linked = {file for file, _ in LINK.findall(read("README.md"))}
    assert {str(path.relative_to(ROOT)) for path in DOCUMENTS} - linked == {"README.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_installs_name_the_wheel_or_a_lock_file(path: Path) -> None:
    for line in re.findall(r"^.*pip install .*$", path.read_text(), re.MULTILINE):
        if path.name != "CHANGELOG.md":
            assert re.search(r"dist/tokenauth_server-|-r requirements", line), line


def tables(kind: Any = Settings, path: str = "") -> Iterator[tuple[str, str, set[str]]]:
    """Yield each table of the configuration: its heading, a way to write it, its keys."""
    keys = set()
    for field in msgspec.structs.fields(kind):
        name = f"{path}{field.encode_name}"
        inner = [one for one in (field.type, *get_args(field.type)) if _is_table(one)]
        if field.name == "dialects":
            yield (
                "[dialects.NAME]",
                "",
                {key.encode_name for one in DIALECTS.values() for key in _keys_of(one.settings)},
            )
        elif not inner:
            keys.add(field.encode_name)
        else:
            heading = {"users": "[[users]]", "pools": "[pools.NAME]"}.get(name, f"[{name}]")
            keys_of_table = {key.encode_name for key in _keys_of(inner[0])}
            if name == "pools":
                keys_of_table.remove("members")
                yield "[[pools.NAME.members]]", "", {key.encode_name for key in _keys_of(MemberSettings)}
            yield heading, heading.replace("NAME", "name"), keys_of_table
    assert not keys, f"keys outside of any table: {keys}"


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _keys_of(kind: Any) -> tuple[msgspec.structs.FieldInfo, ...]:
    found = next(one for one in (kind, *get_args(kind)) if _is_table(one))
    return msgspec.structs.fields(found)


SETTINGS = read("docs/configuration.md")
METRICS = read("docs/metrics.md")
TABLES = list(tables())


@pytest.mark.parametrize(("heading", "keys"), [(heading, keys) for heading, _, keys in TABLES])
def test_each_setting_has_a_row(heading: str, keys: set[str]) -> None:
    documented = [row[0].strip("`") for row in rows(section(SETTINGS, f"### {heading}"))]
    assert sorted(documented) == sorted(keys)


@pytest.mark.parametrize("heading", [heading for heading, toml, _ in TABLES if toml not in {"", "[[users]]"}])
def test_documented_defaults_are_the_defaults(heading: str) -> None:
    table = heading.replace("NAME", "name")
    defaults = [row[:2] for row in rows(section(SETTINGS, f"### {heading}"))]
    written = [f"{key.strip('`')} = {value.strip('`')}" for key, value in defaults if value not in {"none", "no limit"}]
    assert loader.parse("\n".join([table, *written]), {}) == loader.parse(table, {})


def test_the_shown_mistake_is_the_real_one() -> None:
    with pytest.raises(ConfigError) as caught:
        loader.parse("[tokens]\nper_usr = 5", {})
    assert f"config.toml: {caught.value}\n" in SETTINGS


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield each command with its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_each_command_has_a_row_with_its_options() -> None:
    documented = {}
    for cell, *_ in rows(read("docs/command-line.md")):
        if not cell.startswith("`tokenauth "):
            continue
        words = cell.strip("`").split()
        command = " ".join(word for word in words if re.fullmatch(r"[a-z][a-z-]*", word))
        documented[command] = set(re.findall(r"--[a-z-]+", cell))
    everywhere = {"--config", "--help"}
    offered = {
        path: {name for option in command.params for name in option.opts if name.startswith("--")} - everywhere
        for path, command in commands(main, "tokenauth")
    }
    assert documented == offered


def test_each_option_of_run_has_a_row() -> None:
    table = rows(section(read("docs/command-line.md"), "## Run a command with a lease"))
    documented = {cell.strip("`").split()[0] for cell, *_ in table if cell.startswith("`--")}
    assert documented == {option.opts[0] for option in run.params if isinstance(option, click.Option)}


LEVELS = {"debug", "info", "warning", "error", "critical"}


def logged() -> dict[str, set[str]]:
    """Return the events in the source, each with the names of its fields, as far as they are written out."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tokenauth").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            for event in events(tree, call):
                found.setdefault(event, set()).update(one.arg for one in call.keywords if one.arg)
                if name(call.func) == record_change.__name__:
                    found[event].add("by")
    return found


def name(node: ast.expr) -> str:
    """Return the last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def events(tree: ast.AST, call: ast.Call) -> list[str]:
    """Return the events that a call logs."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in LEVELS and name(call.func.value) == "log":
        return constants(tree, call.args[0])
    return constants(tree, call.args[0]) if name(call.func) == record_change.__name__ else []


def constants(tree: ast.AST, node: ast.expr) -> list[str]:
    """Return the texts that an expression can be: a constant, one of two, or a variable that holds one."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp():
            return constants(tree, node.body) + constants(tree, node.orelse)
        case ast.Name():
            values = [
                one.value
                for one in ast.walk(tree)
                if isinstance(one, ast.Assign) and any(name(target) == node.id for target in one.targets)
            ]
            return [text for value in values for text in constants(tree, value)]
    return []


OTHERWISE = {
    "store_not_writable", "store_writable_again", "store_unreachable", "store_reachable_again",  # names for a circuit
    "log_lines_dropped", "library_message",  # made by the log itself
}  # fmt: skip


def documented_events() -> dict[str, set[str]]:
    """Return the events in docs/logs.md with their fields; one row may have several."""
    found: dict[str, set[str]] = {}
    for names, fields, *_ in rows(read("docs/logs.md")):
        for event in re.findall(r"`(\w+)`", names):
            found.setdefault(event, set()).update(re.findall(r"`(\w+)`", fields))
    return found


def test_each_log_event_has_a_row() -> None:
    source = "".join(path.read_text() for path in (ROOT / "tokenauth").rglob("*.py"))
    assert {event for event in OTHERWISE if f'"{event}"' in source} == OTHERWISE
    assert set(documented_events()) == set(logged()) | OTHERWISE


def test_each_field_of_an_event_is_documented() -> None:
    documented = documented_events()
    assert {event: fields - documented[event] for event, fields in logged().items() if fields - documented[event]} == {}


def test_each_error_code_is_in_a_document() -> None:
    documents = "".join(path.read_text() for path in DOCUMENTS if path.parent.name == "docs")
    assert [kind.__name__ for kind in STATUS if f"`{kind.code}`" not in documents] == []


def test_each_route_of_http_is_in_its_first_table() -> None:
    table = read("docs/http.md").partition("\n† needs")[0]
    named = re.findall(r"`(?:(?:GET|POST|DELETE) )(/[^`]*)`", table)
    for group in (TOKEN, MY_TOKENS, EVENTS, THROTTLE):
        for operation in group.operations:
            assert operation.path in named, operation.path
            assert f"`{operation.method} {operation.path}`" in table, (operation.method, operation.path)


def test_each_metric_has_a_row() -> None:
    documented = {name.strip("`"): (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels, _ in rows(METRICS)}
    assert documented == {f"tokenauth_{one.name}": (one.kind, list(one.labels)) for one in FAMILIES}


def test_alerts_name_only_metrics_that_exist() -> None:
    named = set(re.findall(r"\btokenauth_\w+", section(METRICS, "## Alerts")))
    assert named
    assert named <= {f"tokenauth_{one.name}" for one in FAMILIES}


def test_each_alert_names_the_section_that_says_what_to_do() -> None:
    alerts = re.split(r"^ +- alert: ", section(METRICS, "## Alerts"), flags=re.MULTILINE)[1:]
    assert len(alerts) > 5
    for alert in alerts:
        found = re.search(r"runbook_url: 'https://wiki\.example\.com/tokenauth/([\w-]+\.md)#([\w-]+)'", alert)
        assert found, alert
        assert found[2] in anchors(ROOT / "docs" / found[1]), found[0]


def test_each_promise_has_its_section_and_tests() -> None:
    sections = re.split(r"^## (?=\d)", read("docs/promises.md"), flags=re.MULTILINE)[1:]
    assert [int(text.partition(".")[0]) for text in sections] == list(PROMISES)
    for number, text in zip(PROMISES, sections, strict=True):
        named = re.findall(r"`(tests/[^`]*)`", text)
        assert named
        assert all(f"`{one}" in PROMISES[number] for one in named), number


CONTRIBUTING = read("CONTRIBUTING.md")


def test_contributing_lists_every_folder() -> None:
    listed, parents = set(), [""]
    for indent, folder in re.findall(r"^( *)([a-z]+/)(?: |$)", section(CONTRIBUTING, "## The tree"), re.MULTILINE):
        parents[len(indent) // 2 + 1 :] = [parents[len(indent) // 2] + folder]
        listed.add(parents[-1])
    assert [folder for folder in listed if not (ROOT / folder).is_dir()] == []
    rooms = {
        f"{path.parent.relative_to(ROOT)}/"
        for path in [*ROOT.glob("tokenauth/**/__init__.py"), *ROOT.glob("tests/*/__init__.py")]
    }
    assert rooms <= listed


def test_contributing_shows_the_layers_in_order() -> None:
    (block,) = re.findall(r"^```\n(cli\n.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    shown = [set(line.partition("   ")[0].split()) for line in block.splitlines()]
    assert [*reversed(shown)] == LAYERS


def test_contributing_names_the_methods_of_a_login() -> None:
    steps = re.findall(r"^([\w/]+\.py) +(\w+)\.(\w+)(?: |$)", CONTRIBUTING, re.MULTILINE)
    assert len(steps) == 9
    for path, owner, method in steps:
        classes = (node for node in ast.parse(read(f"tokenauth/{path}")).body if isinstance(node, ast.ClassDef))
        (found,) = [node for node in classes if node.name == owner]
        assert method in {getattr(node, "name", "") for node in found.body}, f"{owner}.{method}"
