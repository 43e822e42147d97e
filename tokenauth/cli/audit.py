"""The commands for the audit log."""

import json
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokenauth.audit.chain import CHANGED, CUT, EMPTY, LONGEST, open_file, read
from tokenauth.audit.records import ACTS, DROPPED, LOGOUT
from tokenauth.cli.base import CommandGroup, config_option, count, json_option, print_json, utf8
from tokenauth.errors import ConfigError
from tokenauth.logs import json_text, printable

if TYPE_CHECKING:
    from tokenauth.audit.chain import Break, Chain, Verdict

_LINES = 20
"""Acts that are shown if neither --lines nor --since says how many."""

_POLL = 0.25
"""Seconds between two looks for new lines."""

_DURATIONS = {"overlap", "waited"}
"""Details that are in seconds, and so is how long a lease was held."""

ACTIONS = sorted({act.action for act in ACTS.values()} | {LOGOUT, CUT, DROPPED})


@click.group("audit", cls=CommandGroup)
def audit_log() -> None:
    """Read and verify the audit log."""


@audit_log.command("verify", epilog="Example: tokenauth audit verify && echo untouched")
@config_option
@json_option
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path(dir_okay=False, path_type=Path))
@click.pass_context
def audit_verify(context: click.Context, config_file: str | None, as_json: bool, files: tuple[Path, ...]) -> None:
    """Find lines that were removed, changed or inserted.

    It goes on after each of them. Without FILE, it checks all files, and that the last line is there. Name other files
    oldest first. Exit with 1 if something is wrong. It says what it cannot find.
    """
    verdict = _chain(config_file, bool(files)).verify(files)
    if as_json:
        print_json(_report(verdict, bool(files)))
    elif verdict.problem is not None:
        for problem, position in verdict.problems:
            click.echo(printable(problem if position is None else f"{position}: {problem}"))
        if verdict.breaks > len(verdict.problems):
            click.echo(f"and {count(verdict.breaks - len(verdict.problems), 'more break')}")
        click.echo(f"{count(verdict.breaks, 'break')}; {count(verdict.lines, 'line')} ok")
        if verdict.lines and not verdict.keyed:
            click.echo(_describe_doubt(verdict, bool(files)))
        if any(problem == CHANGED for problem, _ in verdict.problems):
            click.echo("If audit.key was changed, each line that was written with another one is a break.")
        click.echo('What to do: docs/production.md, "The audit log has a break"')
    elif not verdict.lines:
        click.echo("No lines.")
    else:
        cut = f"; a crash has cut {count(verdict.cut, 'more line')}, which is marked" if verdict.cut else ""
        click.echo(f"ok: {count(verdict.lines, 'line')}, from {verdict.first:,} to {verdict.last:,}{cut}")
        click.echo(f"The last hash is {verdict.hash}")
        for line in _describe_proof(verdict, bool(files)):
            click.echo(line)
    context.exit(0 if verdict.problem is None else 1)


def _report(verdict: "Verdict", other_files: bool) -> dict[str, object]:
    problems = [
        {"problem": problem, "file": position and str(position.file), "line": (position and position.line) or None}
        for problem, position in verdict.problems
    ]
    return {
        "ok": verdict.problem is None,
        "lines": verdict.lines,
        "first_line": verdict.first or None,
        "last_line": verdict.last or None,
        "last_hash": verdict.hash if verdict.last else None,
        "cut_lines": verdict.cut,
        "breaks": verdict.breaks,
        "problems": problems,
        "head_read": not (verdict.headless or other_files),
        "lines_after_head": verdict.beyond,
        "has_key": verdict.keyed,
    }


def _describe_proof(verdict: "Verdict", other_files: bool) -> Sequence[str]:
    """Return what a check without a problem proves, and what it cannot."""
    ends = "the last line is the one that the .head file knows"
    if verdict.beyond:
        known = f"line {verdict.last - verdict.beyond:,} is the one that the .head file knows"
        writer = "a crash" if verdict.keyed else "a crash, or written by anyone"
        ends = f"{known}; after it, {count(verdict.beyond, 'line')} left by {writer}"
    if other_files:
        ends = "lines missing at the end would not show, since named files are checked without the .head file"
    elif verdict.headless:
        ends = "lines missing at the end would not show, since there is no valid .head file"
    lost = "the lines before them were" if verdict.first > 1 else "an older log existed and was"
    missing = f"Lines 1 to {verdict.first - 1:,} are not here. If you did not move their file away, they were deleted."
    return [
        *([missing] if verdict.first > 1 else []),
        f"Shown: no line in between was removed, changed, inserted or moved; {ends}.",
        f"Not shown: whether {lost} deleted, with its .head file, or all lines were written again."
        " For that, compare the last hash with one that you keep elsewhere.",
    ]


def _describe_doubt(verdict: "Verdict", other_files: bool) -> str:
    """Return what a check without a key cannot show of the lines around a break."""
    if other_files or verdict.headless:
        return "Not shown: whether lines were written again, since there is no audit.key, and no .head file was read."
    until = f", up to line {verdict.last - verdict.beyond:,}," if verdict.beyond else ""
    return (
        "Not shown: whether lines before the last break were written again, since there is no audit.key."
        f" Only lines after it{until} are bound to the .head file."
    )


@audit_log.command("tail", epilog="Example: tokenauth audit tail --since 2h --user ann")
@config_option
@click.option("-n", "--lines", metavar="N", type=click.IntRange(0), help="At most N acts. Default: 20, or all --since.")
@click.option("-f", "--follow", is_flag=True, help="Then show new acts, until Ctrl-C.")
@click.option("--user", "username", metavar="NAME", help="Only acts by this user, or on what is this user's.")
@click.option("--since", metavar="DURATION", help="Only the last 2h, 30m, 7d.")
@click.option(
    "--action",
    "actions",
    multiple=True,
    metavar="ACTION",
    type=click.Choice(ACTIONS),
    help="Only this action, such as login. Repeat for several.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are in the file.")
@click.pass_context
def audit_tail(
    context: click.Context,
    config_file: str | None,
    lines: int | None,
    follow: bool,
    username: str | None,
    since: str | None,
    actions: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show the last acts, oldest first. Times are in UTC.

    On a terminal, details are in lines of their own; otherwise each act is one line. Exit with 1 if a file cannot be
    read, after those that can.
    """
    from tokenauth.settings import durations

    oldest = 0.0
    if since is not None:
        seconds = durations.parse(since)
        if seconds is None:
            raise click.BadParameter("must be a duration such as '2h', '30m' or '7d'.", param_hint="--since")
        oldest = time.time() - seconds
    wanted = _Filter(None if username is None else utf8(username), oldest, actions)
    chain = _chain(config_file)
    growing = _Growing(chain.path)
    found, unread = _last(chain, growing, wanted, (None if since else _LINES) if lines is None else lines)
    for problem, position in unread:
        click.echo(printable(f"Warning: acts may be missing here. {position}: {problem}"), err=True)
    if as_json:
        _print_lines(found)
    elif found or not follow:
        click.echo("\n".join(_describe(json.loads(line)) for line in found) or "No acts.")
    if unread and not follow:
        context.exit(1)
    while follow:
        time.sleep(_POLL)
        new = [*filter(wanted.matches, growing.new_lines())]
        if as_json:
            _print_lines(new)
        else:
            for line in new:
                click.echo(_describe(json.loads(line)))


class _Filter:
    def __init__(self, username: str | None, oldest: float, actions: Sequence[str]) -> None:
        from tokenauth.settings.model import canonical

        self._canonical = canonical
        self._username = None if username is None else canonical(username)
        self._since = oldest
        self._oldest = datetime.fromtimestamp(oldest, UTC).isoformat(timespec="milliseconds")
        self._actions = actions

    def is_older(self, path: Path) -> bool:
        """Return whether a file was not changed since the time that is asked for."""
        try:
            return path.stat().st_mtime < self._since
        except OSError:  # it was deleted since it was listed: `read` reports that
            return False

    def matches(self, line: bytes) -> bool:
        """Return whether a line is a record that is asked for. A line that a crash has cut is none."""
        try:
            record = json.loads(line.decode())  # bytes could also be UTF-16
            names = {self._canonical(str(record[key])) for key in ("by", "user") if key in record}
            return (
                record["time"] >= self._oldest
                and (not self._actions or record["action"] in self._actions)
                and (self._username is None or self._username in names)
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return False


class _Growing:
    """The file that is being written, also after it was renamed and a new one has begun."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._skipped = False
        self._file = self._open()

    def new_lines(self) -> Iterator[bytes]:
        """Yield the lines since the last call that have an end."""
        yield from self._rest()
        current = self._open()
        if current is None or (self._file is not None and os.path.sameopenfile(current.fileno(), self._file.fileno())):
            if current is not None:
                current.close()
            return
        yield from self._rest()  # what was written before it was renamed
        if self._file is not None:
            self._file.close()
        self._file, self._skipped = current, False
        yield from self._rest()

    def _rest(self) -> Iterator[bytes]:
        while self._file is not None and (line := self._file.readline(LONGEST)):
            ended = line.endswith(b"\n")
            if not ended and len(line) < LONGEST:
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            if ended and not self._skipped:
                yield line
            self._skipped = not ended  # a longer line is no record

    def _open(self) -> Any:
        try:
            return open_file(self._path)
        except FileNotFoundError:
            return None


def _last(
    chain: "Chain", growing: _Growing, wanted: _Filter, most: int | None
) -> tuple[Sequence[bytes], Sequence["Break"]]:
    """Return the last lines that are asked for, and why files could not be read.

    Older files are read only if the newer ones do not have enough.
    """
    found = deque(filter(wanted.matches, growing.new_lines()), most)
    if most is not None and len(found) >= most:
        return list(found), []
    unread: list[Break] = []
    for path in reversed(chain.files(unread.append)):
        if path == chain.path or wanted.is_older(path):
            continue
        if most is not None and len(found) >= most:
            break
        lines = filter(wanted.matches, read(path, unread.append))
        older = deque(lines, None if most is None else most - len(found))
        found.extendleft(reversed(older))
    missed = [one for one in unread if one.problem != EMPTY and one.position and not wanted.is_older(one.position.file)]
    return list(found), missed


def _chain(config_file: str | None, other_files: bool = False) -> "Chain":
    """Return the audit log of the configuration. Raises ConfigError if it has none, unless `other_files` are read."""
    from tokenauth.audit.log import open_chain
    from tokenauth.settings import loader
    from tokenauth.settings.model import AuditSettings

    path = loader.find(config_file)
    settings = AuditSettings() if other_files and not (config_file or path.exists()) else loader.load(path).audit
    if not settings.file and not other_files:
        raise ConfigError(f"{path}: audit.file: is not set, so there is no audit log")
    return open_chain(settings)


def _describe(record: Mapping[str, Any]) -> str:
    """Return an act for people: what a person looks for first, and the details."""
    by, user = record.get("by"), record.get("user")
    fields = {
        "by": by,
        "user": None if user == by else user,
        "target": record.get("target"),
        "from": record.get("address", record.get("via")),
    }
    at = printable(f"{record['time'][:19].replace('T', ' ')}  ")
    act = ", ".join([f"{record.get('action', '')} {record.get('result', '')}".strip(), *_named(fields)])
    details = ", ".join(_named(record.get("details")))
    if not sys.stdout.isatty():
        return at + printable(f"{act}; {details}" if details else act)
    width, indent = shutil.get_terminal_size().columns, " " * len(at)
    lines = textwrap.wrap(printable(act), width, initial_indent=at, subsequent_indent=indent)
    lines += textwrap.wrap(printable(details), width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _named(fields: object) -> Sequence[str]:
    """Return each field that has a value as its name and its value. Anyone may have written the line: see `verify`."""
    if not isinstance(fields, dict):
        return []
    shown = {key: _value(key, it) for key, it in fields.items() if it is not None and it is not False}
    return [f"{key.replace('_', ' ')} {it}" for key, it in shown.items() if it != ""]


def _value(key: str, value: object) -> str:
    if isinstance(value, list):
        items = [*map(str, value)]
        return ("; " if any(" " in item for item in items) else " ").join(items) or "none"
    if isinstance(value, int | float) and (key == "until" or key.endswith("_at")):
        with suppress(ValueError, OverflowError, OSError):
            return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S}"
    seconds = key in _DURATIONS or (key == "held" and isinstance(value, float))  # elsewhere it is a count
    return f"{value} s" if seconds else str(value)


def _print_lines(lines: Sequence[bytes]) -> None:
    for line in lines:
        text = line.decode().removesuffix("\n")
        click.echo(text if text.isprintable() else json_text(json.loads(text)))  # tokenauth has not written such a line
