"""Measures the figures that are promised, and prints them as one table."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench import chart, machine, report, world
from bench.figures import Figure, Row, Sample
from bench.lending import LendingRows
from bench.limit import BareServer
from bench.postgres import PostgresRows, missing
from bench.rows import Rows

_TOKENS = ("hot", "me", "auth", "introspect", "million", "issue", "revoke", "login", "flood", "start", "memory")
_LENDING = ("assign", "keep", "release", "large", "workers-2", "workers-8", "permits", "uuids", "bounded", "owned")
_POSTGRES = ("pg-hot", "pg-million", "pg-issue", "pg-revoke", "pg-assign", "pg-keep", "pg-release", "pg-news")
_NAMES = (*_TOKENS, *_LENDING, *_POSTGRES)


def main() -> int:
    """Run what the command line asks for; the exit code says only whether it could be measured."""
    options = _parser().parse_args()
    machine.require(Path(tempfile.gettempdir()))
    try:
        with tempfile.TemporaryDirectory(prefix="tokenauth-bench-") as directory:
            _run(Path(directory), options)
    except RuntimeError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    return 0


def _run(directory: Path, options: argparse.Namespace) -> None:
    names = set(options.only)
    lacking = missing() if names.intersection(_POSTGRES) else None
    if lacking:
        _say(f"without the rows of PostgreSQL: {lacking}")
        names.difference_update(_POSTGRES)
    with world.bare(directory) as server:
        bare = BareServer(server.port, 1)
        postgres = PostgresRows(directory, bare, options.seconds)
        figures = [
            *Rows(directory, bare, options.seconds).figures(),
            *LendingRows(directory, bare, options.seconds).figures(),
            *postgres.figures(),
        ]
        chosen = [figure for figure in figures if figure.name in names]
        with postgres:
            rows = measure(chosen, options.rounds, directory)
            version = postgres.version
    facts = machine.facts(directory) | ({} if version is None else {"postgres": version})
    print(report.table(facts, bare.rates, rows))
    if options.json:
        options.json.write_text(json.dumps(report.document(facts, bare.rates, rows), indent=2) + "\n", encoding="utf-8")
    if options.chart:
        chart.draw(rows, options.chart)


def measure(figures: Sequence[Figure], rounds: int, directory: Path) -> Sequence[Row]:
    """Measure in rounds, each figure once in each round; afterwards those that want to be alone.

    Before each the databases in the directory are read once: those of the other figures have had none to read them
    meanwhile, and a host that pages out what is idle would be measured with them.
    """
    found: dict[str, list[Sample]] = {figure.name: [] for figure in figures}
    together = [figure for figure in figures if figure.times is None]
    with ExitStack() as stack:
        _say("preparing")
        samplers = [(figure, stack.enter_context(figure.prepare())) for figure in together]
        for number in range(rounds if together else 0):
            for figure, sample in samplers:
                _say(f"round {number + 1} of {rounds}: {figure.name}")
                machine.page_in(directory)
                found[figure.name].append(sample())
    for figure in figures:
        if figure.times is not None:
            _say(figure.name)
            with figure.prepare() as sample:
                for _ in range(figure.times):
                    machine.page_in(directory)
                    found[figure.name].append(sample())
    return [Row(figure, found[figure.name]) for figure in figures]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=_positive, default=3, help="how often each figure is measured (default: 3)")
    parser.add_argument("--seconds", type=_positive, default=3, help="how long each time (default: 3)")
    parser.add_argument("--only", nargs="+", choices=_NAMES, default=_NAMES, metavar="NAME", help=", ".join(_NAMES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found, too")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw the ratios, too")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


_began = time.monotonic()


def _say(what: str) -> None:
    """Tell whoever waits how far it is."""
    sys.stderr.write(f"[{time.monotonic() - _began:5.0f} s] {what}\n")


if __name__ == "__main__":
    sys.exit(main())
