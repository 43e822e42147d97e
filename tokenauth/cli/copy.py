"""`tokenauth copy`: moves everything from one database to another."""

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tokenauth.cli.base import config_option, count, json_option, load_settings, print_json
from tokenauth.errors import ConfigError, CopyError
from tokenauth.logs import printable

if TYPE_CHECKING:
    from tokenauth.settings.model import DatabaseSettings
    from tokenauth.stores.copying import CopyReport, OnProgress

_IN_USE = 3
"""Exit status of a copy that is not finished, since the source is in use."""

_SHOWN = 5
"""Number of tables of another program that a message names."""

_INTERVAL = 10.0
"""Seconds between two lines about a table without a terminal."""


@click.command(
    epilog="Example: tokenauth copy --from sqlite+aiosqlite:////var/lib/tokenauth/tokenauth.db"
    " --to postgresql+asyncpg://tokenauth@db.example.com/tokenauth"
)
@config_option
@click.option("--from", "source", metavar="URL", help="What to copy. Default: database.url of the configuration.")
@click.option("--to", "target", metavar="URL", required=True, help="An empty database, or one that does not exist yet.")
@json_option
def copy(config_file: str | None, source: str | None, target: str, as_json: bool) -> None:
    """Copy everything to another database.

    It copies tokens, pools, leases, places in line and throttled logins, so nobody has to log in again. It copies
    between SQLite and PostgreSQL, in both directions, or to another database of the same kind.

    Run it while the server runs, then stop the server and run it again: it copies what has changed, and compares all
    rows. It exits with 3 while the source is in use. After an interruption, run it again: it goes on. The source and
    the configuration are not changed: set database.url before you start the server.

    A URL can have variables of the environment, as database.url can: write '${DATABASE_PASSWORD}' in place of a
    password, in single quotes, so that no other user sees it in the list of processes.
    """
    origin = load_settings(config_file).database if source is None else _database("--from", source)
    destination = _database("--to", target)
    began = time.monotonic()
    with _progress() as on_progress:
        try:
            report = asyncio.run(copy_database(origin, destination, on_progress))
        except KeyboardInterrupt:
            click.echo("Interrupted. Run the same command again: it goes on, unless the copy has finished.", err=True)
            raise
    seconds = time.monotonic() - began
    if as_json:
        tables = [
            {
                "name": each.name,
                "rows": each.rows,
                "added": each.added,
                "changed": each.corrected,
                "sha256": each.digest,
            }
            for each in report.tables
        ]
        done = {"finished": report.in_use is None, "in_use": report.in_use, "seconds": round(seconds, 1)}
        print_json({"from": report.source, "to": report.target, **done, "tables": tables})
    else:
        _show(report, seconds)
    if report.in_use is not None:
        click.echo(
            printable(
                f"Not finished: {report.source} is in use: {report.in_use}{_hint(report)}. Stop the server and run the"
                " same command again: it copies what has changed."
            ),
            err=True,
        )
        click.get_current_context().exit(_IN_USE)


def _database(option: str, url: str) -> "DatabaseSettings":
    from tokenauth.settings import loader
    from tokenauth.settings.model import DatabaseSettings

    with loader.naming(option):
        return DatabaseSettings(url=loader.fill_in(url))


def _hint(report: "CopyReport") -> str:
    """Say how to find out which programs have the file of the source open."""
    return f" (`fuser -v {report.source}` shows which)" if report.source.startswith("/") else ""


async def copy_database(
    source: "DatabaseSettings", target: "DatabaseSettings", on_progress: "OnProgress"
) -> "CopyReport":
    from tokenauth.stores import copying
    from tokenauth.stores.open import is_same, open_side

    await _check_source(source)
    if is_same(source, target):
        raise CopyError("--from and --to are the same database")
    await _prepare_target(target)
    return await copying.copy(open_side(source), open_side(target), on_progress)


async def _check_source(settings: "DatabaseSettings") -> None:
    """Raise CopyError or ConfigError if there is nothing to copy, or not with this release."""
    from tokenauth.stores import schema
    from tokenauth.stores.open import check_files, examine

    with _naming("--from"):
        check_files(settings)
        report = await examine(settings)
    if not report.exists:
        raise CopyError(f"--from: there is no database at {report.name}")
    if report.schema is None:
        problem = report.problem or "it has no tables of tokenauth: there is nothing to copy"
        raise CopyError(f"--from: {report.name}: {problem}")
    if report.schema == schema.COPYING:
        raise CopyError(f"--from: {report.name} is {schema.UNFINISHED_COPY}; {schema.FINISH_COPY}")
    if report.schema != schema.HEAD:
        todo = "upgrade it with `tokenauth migrate`" if schema.is_older(report.schema) else "use the release it is of"
        raise CopyError(
            f"--from: {report.name} has schema {report.schema}, and this release copies {schema.HEAD}; {todo}"
        )


async def _prepare_target(settings: "DatabaseSettings") -> None:
    """Create the tables of the target, as those of an unfinished copy, unless it has some.

    Raises CopyError or ConfigError.
    """
    from tokenauth.errors import StartError
    from tokenauth.stores import schema
    from tokenauth.stores.open import check_files, examine, open_store

    with _naming("--to"):
        check_files(settings)
        report = await examine(settings)
        if report.network is not None:
            raise CopyError(f"--to: {report.name} is on {report.network}, on which SQLite's locks are not reliable")
        if report.schema in {schema.HEAD, schema.COPYING} and not report.others:
            return
        if report.problem is not None:
            raise CopyError(f"--to: {report.name}: {report.problem}")
        if report.schema not in {schema.HEAD, schema.COPYING, None}:
            raise CopyError(f"--to: {report.name} has tables of another release; copy to a new database")
        if report.others:
            tables = ", ".join(report.others[:_SHOWN]) + (", ..." if len(report.others) > _SHOWN else "")
            raise CopyError(f"--to: {report.name} has tables of another program, {tables}; {schema.OWN_DATABASE}")
        store = open_store(settings, 1, copying=True)
        try:
            await store.start()
        except StartError as error:
            raise CopyError(f"--to: {error}") from None
        await store.stop(0)


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Have a ConfigError name the option."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("database.url", option)) from None


@contextmanager
def _progress() -> Iterator["OnProgress"]:
    """Show progress on standard error: a bar for each step on a terminal, else lines."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        steps: dict[tuple[str, str], TaskID] = {}

        def show(what: str, table: str, done: int, total: int) -> None:
            if total == 0:
                return
            step = steps.get((what, table))
            if step is None:
                step = steps[what, table] = progress.add_task(f"{what} {table}", total=total)
            progress.update(step, completed=done, total=total)

        yield show


class _Lines:
    """Prints a line when a table is begun, and then every 10 seconds."""

    def __init__(self) -> None:
        self._shown: tuple[str, str] | None = None
        self._shown_at = 0.0

    def __call__(self, what: str, table: str, done: int, total: int) -> None:
        now = time.monotonic()
        if total and ((what, table) != self._shown or now > self._shown_at + _INTERVAL):
            self._shown, self._shown_at = (what, table), now
            click.echo(f"{what} {table}: {done:,} of {total:,}", err=True)


def _show(report: "CopyReport", seconds: float) -> None:
    """Print what was copied, table by table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False, file=sys.stdout)
    if not console.is_terminal:
        console.width = 120
    finished = report.in_use is None
    table = Table(box=None, pad_edge=False)
    table.add_column("table")
    for heading in ("rows", "added", "changed"):
        table.add_column(heading, justify="right")
    if finished:
        table.add_column("SHA-256 of both")
    for each in report.tables:
        row = [each.name, f"{each.rows:,}", f"{each.added:,}", f"{each.corrected:,}"]
        table.add_row(*row, *([each.digest[:16]] if finished and each.digest else []))
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))
    if finished:
        rows = count(sum(table.rows for table in report.tables), "row")
        click.echo(
            printable(f"{report.target} has the {rows} of {report.source}: both are equal. It took {seconds:.1f} s.")
        )
        click.echo("Set database.url before you start the server.")
