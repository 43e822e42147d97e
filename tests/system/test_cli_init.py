"""`tokenauth init`: a configuration of one's own."""

import json
import re
import sys
from pathlib import Path

import pytest
from passlib.hash import argon2

from tests.support.servers import log_in, serve
from tests.system.test_cli import WORD, mistake, output, run, script
from tests.system.test_terminal import on_terminal
from tokenauth.settings import loader
from tokenauth.settings.model import Settings

STDIN = ("--yes", "--password-stdin")


def test_a_script_gets_a_configuration_without_risks(tmp_path: Path) -> None:
    done = run(tmp_path, "init", "--username", "Ann", *STDIN, stdin=WORD)
    assert (done.returncode, done.stdout) == (0, "")
    path = tmp_path / "tokenauth.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    user = loader.load(path).users_by_name["ann"]
    assert (user.scopes, argon2.verify(WORD.rstrip("\n"), user.password_hash)) == (("admin",), True)
    report = json.loads(output(run(tmp_path, "check", "--json")))
    assert (report["ok"], report["risks"]) == (True, [])
    event = json.loads(done.stderr.splitlines()[0])
    assert (event["event"], event["file"], event["user"]) == ("configuration_written", "tokenauth.toml", "Ann")


def test_a_made_password_is_shown_once_and_logs_in(tmp_path: Path) -> None:
    done = run(tmp_path, "init", "--yes")
    match = re.fullmatch(r"Password of admin: ([\w-]{20})\n", done.stdout)
    assert match is not None, done
    assert match[1] not in done.stderr + (tmp_path / "tokenauth.toml").read_text()
    with serve(tmp_path / "tokenauth.toml") as server, server.client() as client:
        assert log_in(client, "admin", match[1])


def test_the_configuration_differs_from_the_defaults_only_in_its_user(tmp_path: Path) -> None:
    run(tmp_path, "init", *STDIN, stdin=WORD)
    written = loader.load(tmp_path / "tokenauth.toml")
    assert written == Settings(users=written.users)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none/x.toml", "cannot be created: create its directory, or name another file with --config"),
        ("file/x.toml", "cannot be created: file is not a directory; name another file with --config"),
        ("/proc/x.toml", "cannot be created: No such file or directory"),
    ],
    ids=["missing", "a_file", "not_writable"],
)
def test_a_place_where_no_file_can_be_is_named(tmp_path: Path, path: str, problem: str) -> None:
    """Before it asks for a password, if it can be known then."""
    (tmp_path / "file").touch()
    assert mistake(run(tmp_path, "init", "--yes", "-c", path)) == f"{path}: {problem}"


def test_settings_can_be_named(tmp_path: Path) -> None:
    named = ["server.port=8001", 'server.trusted_proxies=["10.0.0.1"]', "browser.url=https://auth.example.com"]
    options = [word for setting in named for word in ("--set", setting)]
    run(tmp_path, "init", *STDIN, *options, stdin=WORD)
    settings = loader.load(tmp_path / "tokenauth.toml")
    assert (settings.server.port, settings.server.trusted_proxies) == (8001, ("10.0.0.1",))
    assert settings.browser.url == "https://auth.example.com"
    text = (tmp_path / "tokenauth.toml").read_text()
    assert "port = 8001" in text
    assert text.count("[server]") == 1


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("port=8001", "must have the form TABLE.KEY=VALUE"),
        ("server.prot=8001", "server.prot: there is no such key; did you mean port?"),
        ("server.port=x", "server.port: must be an integer"),
        ("users.name=x", "users"),
    ],
)
def test_a_wrong_setting_writes_nothing(tmp_path: Path, setting: str, problem: str) -> None:
    assert problem in mistake(run(tmp_path, "init", *STDIN, "--set", setting, stdin=WORD))
    assert list(tmp_path.iterdir()) == []


def test_what_is_commented_out_is_valid(tmp_path: Path) -> None:
    run(tmp_path, "init", *STDIN, stdin=WORD)
    path = tmp_path / "tokenauth.toml"
    text, count = re.subn(r"^# (?=\[|\w+ = )", "", path.read_text(), flags=re.MULTILINE)
    settings = loader.parse(text, {})
    assert count == 8
    assert settings.browser.domain == "example.com"
    assert settings.pools["licences"].capacity == 3


@pytest.mark.parametrize("named", ["tokenauth.toml", "other.toml"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_existing_file_is_never_overwritten(tmp_path: Path, named: str, kind: str) -> None:
    path = tmp_path / named
    if kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to("nowhere")
    error = mistake(run(tmp_path, "init", *STDIN, "-c", named, stdin=WORD))
    assert error.startswith(f"{named}: exists, and init overwrites nothing")
    assert path.is_symlink() or path.read_text() == "precious"
    assert [one.name for one in tmp_path.iterdir()] == [named]


def test_without_a_terminal_it_says_how_to_pass_the_password(tmp_path: Path) -> None:
    assert "Pass --yes" in mistake(run(tmp_path, "init"))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_name_or_password_writes_nothing(tmp_path: Path) -> None:
    assert "8 to 1,024 characters" in mistake(run(tmp_path, "init", *STDIN, stdin="short\n"))
    assert "username: " in mistake(run(tmp_path, "init", *STDIN, "--username", " x ", stdin=WORD))
    assert list(tmp_path.iterdir()) == []


def test_an_own_file_is_used_before_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("users = []")
    done = run(tmp_path, "init", *STDIN, stdin=WORD)
    assert "Commands in this directory now use it instead of config.toml.\n" in done.stderr
    assert "tokenauth.toml: ok, 1 user" in output(run(tmp_path, "check"))
    assert "config.toml: ok, 0 users" in output(run(tmp_path, "check", "-c", "config.toml"))


def test_on_a_terminal_it_asks_for_name_and_password(tmp_path: Path) -> None:
    with on_terminal(tmp_path, '"$TOKENAUTH" init 2>&1; echo "exit $?"') as found:
        found.expect("User name [admin]: ")
        found.type("ann")
        for prompt in ("Password (8 to 1,024 characters): ", "The same again: "):
            found.expect(prompt)
            found.type("a long password")
        found.expect("Wrote tokenauth.toml.")
        found.expect(" serve")
        found.expect("exit 0")
        assert "a long password" not in found.shown
    assert list(loader.load(tmp_path / "tokenauth.toml").users_by_name) == ["ann"]


@pytest.mark.extended
def test_python_m_tokenauth_is_the_command(tmp_path: Path) -> None:
    assert output(script(tmp_path, "-m", "tokenauth", "-V", program=sys.executable)).startswith("tokenauth, version ")
    assert "Usage: python -m tokenauth " in output(script(tmp_path, "-m", "tokenauth", "-h", program=sys.executable))
