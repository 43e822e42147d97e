"""The wheel is complete, with its migrations, when it is installed outside the checkout."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.servers import ROOT, write_config
from tokenauth import build
from tokenauth.stores.schema import HEAD

pytestmark = pytest.mark.extended


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without this process's environment. Return its output."""
    done = subprocess.run(
        command, cwd=cwd, env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory), cwd=ROOT)
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_holds_only_package_and_migrations(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tokenauth").rglob("*.py")}
    migrations = {f"tokenauth/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "migrations").rglob("*.py")}
    assert package | migrations <= names
    assert {"tokenauth/web/pages/tokenauth.js", "tokenauth/web/pages/tokenauth.d.ts"} <= names
    assert {f"tokenauth/migrations/versions/{name}.py" for name in ("1_1_tokens", "1_2_pools")} <= names
    assert {name.partition("/")[0] for name in names} == {"tokenauth"}
    assert not [name for name in names if name.endswith((".pyc", ".db", ".toml"))]


def test_the_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Its virtual environment can import the dependencies of the checkout, but not the checkout itself."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install",
        "--no-deps", "--no-index", "--no-compile", "--quiet", wheel, cwd=tmp_path)  # fmt: skip
    (library,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (library / "dependencies.pth").write_text(
        sysconfig.get_paths()["purelib"] + "\n"
    )  # .pth files in there are not read
    home = tmp_path / "home"
    home.mkdir()
    write_config(home)

    assert run(python, "-m", "tokenauth", "-V", cwd=home) == f"tokenauth, version {build()}\n", "as in the checkout"
    found = run(python, "-c", "import tokenauth.cli as it; print(it.__file__)", cwd=home).strip()
    assert Path(found).is_relative_to(library)
    command = tmp_path / "venv/bin/tokenauth"
    assert run(command, "check", cwd=home).endswith("config.toml: ok, 3 users, 0 pools, 0 risks\n")
    assert run(command, "migrate", cwd=home) == f"The database has schema {HEAD}.\n"
    assert run(command, "tokens", "list", "--json", cwd=home) == '{\n  "tokens": []\n}\n'
