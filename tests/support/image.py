"""Builds the image of the Dockerfile, and runs it as a container engine does, with buildah and unshare instead of one.

Its base has the name of the real one, and is made of Debian's packages.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.journal import until
from tests.support.servers import ROOT
from tests.support.skipping import skip_without

_BASE = "python:3.13-slim"

# Mounts all as a read-only root needs, and becomes the command. $1: the root file system, $2: /data, $3: the user.
_ENTER = """
set -e
root=$1 data=$2 user=$3 directory=$4
shift 4
ip link set lo up
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --bind "$data" "$root/data"
mount -t tmpfs tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot --userspec="$user" "$root" /usr/bin/env --chdir="$directory" -- "$@"
"""


def _run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return str(done.stdout)


class Image:
    """A built image."""

    def __init__(self, directory: Path) -> None:
        self._buildah = [
            "buildah", "--root", f"{directory}/store", "--runroot", f"{directory}/run", "--storage-driver", "vfs",
        ]  # fmt: skip
        try:
            self._build(directory)
        except BaseException:
            self.close()
            raise

    def _build(self, directory: Path) -> None:
        _make_base(directory / "base")
        container = self._call("from", "scratch").strip()
        self._call("add", container, directory / "base", "/")
        self._call("commit", "--rm", container, _BASE)
        shutil.rmtree(directory / "base")
        self.build_log = self._call(
            *("bud", "--isolation", "chroot", "--pull-never", "--format", "docker", "--tag", "tokenauth"), ROOT
        )
        self.config: dict[str, Any] = json.loads(self._call("inspect", "--type", "image", "tokenauth"))["Docker"][
            "config"
        ]
        self.root = Path(self._call("mount", self._call("from", "--pull-never", "tokenauth").strip()).strip())

    def _call(self, *arguments: str | Path) -> str:
        return _run(*self._buildah, *arguments, cwd="/")

    def close(self) -> None:
        self._call("umount", "--all")
        self._call("rm", "--all")
        self._call("rmi", "--all", "--force")

    def command(self, *arguments: str) -> list[str]:
        return [*self.config["Entrypoint"], *(arguments or self.config["Cmd"])]


def _make_base(base: Path) -> None:
    _run("debootstrap", "--variant=minbase", "--include=python3,python3-venv", "bookworm", base)
    (base / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    version = _run("chroot", base, "python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    _run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--only-binary=:all:"),
        *("--python-version", version, "--dest", base / "wheels", "--requirement", ROOT / "requirements-serve.lock"),
    )
    (base / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")


class Container:
    """A running container: PID 1 in namespaces of its own, without a network."""

    def __init__(self, image: Image, data: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self._image = image
        self._env = {**dict(line.split("=", 1) for line in image.config["Env"]), **env}
        enter = ["unshare", "--mount", "--pid", "--net", "--fork", "sh", "-c", _ENTER, "sh"]
        self.process = subprocess.Popen(
            [*enter, image.root, data, image.config["User"], image.config["WorkingDir"], *image.command(*arguments)],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _environment(self) -> dict[str, str]:
        return {**self._env, "PATH": f"{self._env['PATH']}:/usr/sbin:/sbin"}

    @property
    def pid(self) -> int:
        """The process that is PID 1 inside."""
        return int(self._children()[0])

    def _children(self) -> list[str]:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()

    def execute(self, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in it, as `docker exec` does."""
        user = self._image.config["User"].split(":")
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--root", "--wd"]
        return subprocess.run(
            [*enter, "--setgid", user[1], "--setuid", user[0], *command],
            env=self._environment(), input=given, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def healthy(self) -> bool:
        test = self._image.config["Healthcheck"]["Test"]
        assert test[0] == "CMD"
        return self._children() != [] and self.execute(*test[1:]).returncode == 0

    def kill(self) -> None:
        if self.process.poll() is None:  # a process that changes its user outlives unshare's --kill-child
            for pid in (*self._children(), str(self.process.pid)):
                os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> tuple[int, str]:
        """Stop it as an engine does. Return its exit status and its output."""
        os.kill(self.pid, signal.SIGTERM)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@contextmanager
def running(image: Image, data: Path, *arguments: str, **env: str) -> Iterator[Container]:
    """Run a container until it is healthy."""
    container = Container(image, data, arguments, env)
    try:
        until(lambda: container.process.poll() is not None or container.healthy(), "it is healthy")
        yield container
    finally:
        container.kill()
        container.process.communicate(timeout=60)


def require() -> None:
    """Skip the test where the image cannot be built."""
    for name in ("buildah", "debootstrap"):
        if shutil.which(name) is None:
            skip_without(name, f"apt-get install {name}")
    if os.geteuid() != 0:
        skip_without("root", "sudo make faults")
