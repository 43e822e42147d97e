"""Measures the promised figures, and prints them as one table."""

import argparse
import compileall
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

from bench import chart, far, machine, mixed, report, workers, world
from bench.figures import Row, log_progress, measure
from bench.growth import SIZES, GrowthRows, PostgresDatabases, SqliteDatabases
from bench.leasing import LeaseRows
from bench.limit import BareServer
from bench.mixed import LoginRows, MixedRows
from bench.postgres import PostgresRows, missing
from bench.tokens import TokenRows
from bench.waiting import TABLES, WaitRows

_TOKENS = (
    *("hot", "metered", "me", "auth", "cookie", "introspect", "million"),
    *("issue", "oauth", "revoke", "login", "flood", "start", "memory"),
)
_LEASES = ("assign", "keep", "release", "large", "workers-2", "workers-8", "permits", "uuids", "bounded", "owned")
_POSTGRES = ("pg-hot", "pg-million", "pg-issue", "pg-revoke", "pg-assign", "pg-keep", "pg-release", "pg-refuse")
_WAITING = ("hand-over", "hand-over-far", "behind", "waiters", "consoles")
_POSTGRES_WAITING = tuple(f"pg-{name}" for name in _WAITING)
_USUAL = (*_TOKENS, *_LEASES, *_WAITING, *_POSTGRES, *_POSTGRES_WAITING)

_GROWN = tuple(
    f"grown-{name}" for name in ("probe", "issue", "revoke", "lease", "start", "sweep", "backlog", "memory", "disk")
)
_GROUPS = {
    "pg-far": far.NAMES,
    "growth": _GROWN,
    "pg-growth": tuple(f"pg-{name}" for name in _GROWN),
    "workers": (*(f"cpu-{kind}-{count}" for kind in workers.KINDS for count in workers.WORKERS), "worker-start"),
    "mixed": (*(f"mixed-{name}" for name in ("probes", *mixed.WEIGHTS)), "login-p99", "login-poisson"),
}
"""Rows that take long: they are measured only if they, or their group, are named."""

_NAMES = (*_GROUPS, *_USUAL, *chain(*_GROUPS.values()))


def main() -> int:
    """Measure what the command line asks for. The exit status says only whether anything was measured."""
    options = _parser().parse_args()
    grown = {name for group in ("growth", "pg-growth") for name in (group, *_GROUPS[group])}
    machine.require(Path(tempfile.gettempdir()), 10 if grown.intersection(options.only) else 2)
    # An installation has bytecode. Where Python may write none, each start would compile the sources.
    compileall.compile_dir(world.ROOT / "tokenauth", quiet=2)
    try:
        with tempfile.TemporaryDirectory(prefix="tokenauth-bench-") as directory:
            rows = _run(Path(directory), options)
    except RuntimeError as error:
        sys.exit(f"bench: {error}")
    return 0 if any(row.samples for row in rows) else 1


def _run(directory: Path, options: argparse.Namespace) -> Sequence[Row]:
    names = {name for chosen in options.only for name in _GROUPS.get(chosen, (chosen,))}
    of_postgres = {name for name in names if name.startswith("pg-")}
    lacking = missing() if of_postgres else None
    if lacking:
        log_progress(f"without the rows of PostgreSQL: {lacking}")
        names -= of_postgres
    with ExitStack() as stack:
        bare = BareServer(stack.enter_context(world.bare(directory)).port, 1)
        postgres = stack.enter_context(PostgresRows(directory, bare, options.seconds))
        figures = [
            *TokenRows(directory, bare, options.seconds).figures(),
            *LeaseRows(directory, bare, options.seconds).figures(),
            *WaitRows("", "", lambda: _waiting_config(directory), 50, options.seconds).figures(),
            *postgres.figures(),
            *WaitRows("pg-", "PostgreSQL: ", postgres.waiting_config, 100, options.seconds).figures(),
            *stack.enter_context(far.FarRows(directory, postgres.cluster)).figures(),
            *MixedRows("", "", lambda: mixed.sqlite_config(directory), options.seconds).figures(),
            *GrowthRows(SqliteDatabases(directory), options.seconds).figures(),
            *GrowthRows(PostgresDatabases(directory, postgres.cluster), options.seconds).figures(),
            *workers.WorkerRows(directory, options.seconds).figures(),
            *LoginRows(directory, options.seconds).figures(),
        ]
        deadline = time.monotonic() + options.minutes * 60
        chosen = [figure for figure in figures if figure.name in names]
        rows = [measure(figure, options.rounds, deadline, directory) for figure in chosen]
        version = postgres.version
    facts = machine.facts(directory) | ({} if version is None else {"postgres": version})
    print(report.table(facts, bare.rates, rows))
    if options.json:
        options.json.write_text(json.dumps(report.document(facts, bare.rates, rows), indent=2) + "\n", encoding="utf-8")
    if options.charts:
        chart.draw(rows, list(SIZES), options.charts)
    return rows


def _waiting_config(directory: Path) -> Path:
    return world.write_config(Path(tempfile.mkdtemp(dir=directory)), tables=TABLES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=_positive, default=3, help="number of rounds for each figure (default: 3)")
    parser.add_argument("--seconds", type=_positive, default=3, help="length of a round (default: 3)")
    parser.add_argument("--minutes", type=_positive, default=20, help="start no round after this time (default: 20)")
    parser.add_argument("--only", nargs="+", choices=_NAMES, default=_USUAL, metavar="NAME", help=", ".join(_NAMES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results as JSON")
    parser.add_argument("--charts", type=Path, metavar="DIRECTORY", help="also draw the charts of the measured rows")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
