"""The machine: what the benchmark needs, and a description."""

import mmap
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import uvicorn

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]

_MAP_LOCKED = 0x2000
"""A flag of Linux that Python has no name for."""

_PACKAGES = {"wrk": "wrk", "taskset": "util-linux"}


def require(directory: Path, gigabytes: int) -> None:
    """Exit with one line if something that the benchmark needs is missing, such as free disk space."""
    missing = [package for program, package in _PACKAGES.items() if shutil.which(program) is None]
    if missing:
        sys.exit(f"make bench needs {' and '.join(missing)}: apt-get install {' '.join(missing)}")
    if len(CORES) < 2:
        sys.exit("make bench needs two cores: one for the server, one for the load")
    if shutil.disk_usage(directory).free < gigabytes * 10**9:
        sys.exit(
            f"make bench needs {gigabytes} GB in {directory} for its databases: name another directory with TMPDIR"
        )


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Run this process, and the processes that it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def facts(directory: Path) -> dict[str, str | int]:
    """Return a description of the machine and its software."""
    return {
        "cpu": _cpu(),
        "cores": len(CORES),
        "python": platform.python_version(),
        "uvicorn": uvicorn.__version__,
        "sqlite": sqlite3.sqlite_version,
        "filesystem": _filesystem(directory),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _filesystem(directory: Path) -> str:
    """Return the type of the file system: in memory, durable writes cost nothing."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    under = [(point, kind) for point, kind in mounts if directory.resolve().is_relative_to(point)]
    return max(under, key=lambda mount: len(mount[0]))[1]


@contextmanager
def in_memory(files: Iterable[Path]) -> Iterator[None]:
    """Keep files in the page cache. Some virtual machines take pages out of it that no process has mapped."""
    with ExitStack() as stack:
        for path in files:
            if path.stat().st_size:
                with path.open("rb") as opened:
                    stack.enter_context(_mapped(opened.fileno()))
        yield


def _mapped(number: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    try:
        return mmap.mmap(number, 0, flags | _MAP_LOCKED, mmap.PROT_READ)
    except OSError:  # without the right to lock so much memory: see `ulimit -l`
        return mmap.mmap(number, 0, flags, mmap.PROT_READ)


def page_in(directory: Path) -> None:
    """Read all databases below a directory, so that they are in the page cache."""
    for database in directory.rglob("*.db"):
        with database.open("rb", buffering=0) as opened:
            while opened.read(2**20):
                pass
