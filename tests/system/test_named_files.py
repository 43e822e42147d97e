"""Settings that name files, and options that replace settings: an error names what was written, and what to do."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate
from tests.support.servers import USERS, serve, write_config
from tests.system.test_cli import mistake, output, run
from tokenauth.settings import loader
from tokenauth.settings.model import Settings

WRITTEN = {
    "database.url": "sqlite+aiosqlite:///{}",
    "server.tls_certificate": "{}'\nserver.tls_key = '/k",
    "server.tls_key": "{}'\nserver.tls_certificate = '{pair}",
}
"""How a path is written where that alone is no setting."""


@pytest.mark.parametrize("key", loader.find_paths(Settings()))
def test_a_relative_path_begins_in_the_working_directory(tmp_path: Path, key: str) -> None:
    """For each setting that is a path: the error has the whole path, or asks for it."""
    here, config = tmp_path / "here", tmp_path / "there" / "config.toml"
    for directory in (here, config.parent):
        directory.mkdir()
    value = WRITTEN.get(key, "{}").format("none/file", pair=make_certificate(tmp_path).certificate)
    config.write_text(f"{key} = '{value}'\n{USERS}")
    config.chmod(0o600)
    done = run(here, "check", "--config", str(config))
    assert done.returncode == 1
    where = "must be the full path of a file" if key == "audit.file" else str(here / "none")
    assert f"{key}: " in done.stderr
    assert where in done.stderr
    assert "; " in done.stderr or key == "audit.file", "it says what to do"


def test_check_and_doctor_say_where_relative_paths_begin(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(USERS)
    path.chmod(0o600)
    where = f"elative paths begin in {tmp_path}: database.url"
    assert where in output(run(tmp_path, "check"))
    doctor = json.loads(run(tmp_path, "doctor", "--json").stdout)
    assert where in doctor["checks"][0]["text"]
    path.write_text(f"database.url = 'sqlite+aiosqlite:///{tmp_path}/t.db'\n{USERS}")
    assert "elative" not in output(run(tmp_path, "check"))


@pytest.mark.parametrize("broken", ["tls_certificate", "tls_key"])
def test_a_cut_file_is_named_wherever_it_is_read(tmp_path: Path, broken: str) -> None:
    """By `check`, `doctor`, a reload and a start: a certificate that is being copied, or was copied in part."""
    made = make_certificate(tmp_path)
    file = made.certificate if broken == "tls_certificate" else made.key
    config = write_config(tmp_path, f"[server]\n{made.settings()}")
    what = "certificate" if broken == "tls_certificate" else "private key"
    says = f"server.{broken}: {file} has a {what} that is cut off"
    fix = "copy the whole file again, or renew certificate and key"
    with serve(config) as server:
        file.write_bytes(file.read_bytes()[:-10])
        server.process.send_signal(signal.SIGHUP)
        assert server.wait("reload_refused")["detail"] == f"{config}: {says}; {fix}"
        assert f"{says}; {fix}" in mistake(run(tmp_path, "reload"))
    assert mistake(run(tmp_path, "check")) == f"config.toml: {says}; {fix}"
    found = json.loads(run(tmp_path, "doctor", "--json").stdout)["checks"]
    assert [(one["text"], one["fix"]) for one in found if one["check"] == "certificate"] == [(says, fix)]
    refused = json.loads(run(tmp_path, "serve").stderr)
    assert (refused["event"], refused["detail"]) == ("configuration_refused", f"config.toml: {says}; {fix}")


REFUSED_OPTIONS = {
    "--host nosuch.invalid": "--host: 'nosuch.invalid' cannot be resolved: ",
    "--host 192.0.2.7": "--host: '192.0.2.7' cannot be listened on: ",
    "--host 0.0.0.0": "--host: '0.0.0.0' can be reached by others, and this risk is not accepted: 'no_tls'; fix it",
    "--host [::1] --workers 2": "--host: '[::1]' cannot be resolved: ",
    "--port 70000": "--port: must be an integer from 0 to 65535, not 70000",
    "--workers 0": "--workers: must be an integer from 1 to 64, not 0",
}


@pytest.mark.parametrize("options", REFUSED_OPTIONS)
def test_an_option_is_named_and_not_the_file(tmp_path: Path, options: str) -> None:
    write_config(tmp_path, '[server]\naccept_risks = ["weak_hash"]')
    done = run(tmp_path, "serve", *options.split())
    assert done.returncode == 3
    *risks, refused = map(json.loads, done.stderr.splitlines())
    assert refused["detail"].startswith(REFUSED_OPTIONS[options])
    assert "server.host" not in done.stderr
    assert all(risk["detail"].startswith("--host: ") for risk in risks if risk["risk"] == "no_tls")


def test_a_host_in_the_file_is_refused_before_its_risks(tmp_path: Path) -> None:
    write_config(tmp_path, '[server]\nhost = "nosuch.invalid"')
    says = "config.toml: server.host: 'nosuch.invalid' cannot be resolved: "
    assert json.loads(run(tmp_path, "serve").stderr)["detail"].startswith(says)
    assert run(tmp_path, "check").stderr.startswith(f"Error: {says}")


def test_a_variable_that_names_the_file_is_named(tmp_path: Path) -> None:
    none = str(tmp_path / "none.toml")
    says = f"{none}: no such file; write one with `tokenauth init`, or "
    variable = "change TOKENAUTH_CONFIG in the environment, which names it"
    assert mistake(run(tmp_path, "check", TOKENAUTH_CONFIG=none)) == says + variable
    assert mistake(run(tmp_path, "check", "-c", none)) == f"{says}name another one with --config"
    os.mkdir(none)
    assert mistake(run(tmp_path, "check", TOKENAUTH_CONFIG=none)).endswith(f"Is a directory; {variable}")


def test_a_variable_for_other_servers_changes_nothing(tmp_path: Path) -> None:
    """Of uvicorn, which would fail."""
    with serve(write_config(tmp_path), env={"WEB_CONCURRENCY": "many"}) as server:
        assert server.stop() == 0
