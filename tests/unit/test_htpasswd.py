"""Users from an htpasswd file: which are accepted, and what is said of the others."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.certificates import make_certificate
from tokenauth.errors import ConfigError
from tokenauth.passwords import Passwords
from tokenauth.risks import find_risks
from tokenauth.server import tls
from tokenauth.settings import loader
from tokenauth.settings.model import PasswordSettings, ServerSettings, Settings
from tokenauth.settings.user_editor import UserEditor

BCRYPT = "$2y$04$kygwPyB9qU5JU7ZUsCgEDujcV4EpglcwXIBVqx6/PURWdhUZt/gHC"
"""The hash of WORD, as htpasswd -B writes it."""

WORD = "correct horse battery staple"
ARGON = "$argon2id$v=19$m=8,t=1,p=1$ACCE8N47B2DMOYfw/p/zng$ZwQLf+PKlO3PPaSNi0ba7hmCNp5dHfkyEhJ16bQr+KQ"
BOB = f'[[users]]\nusername = "Bob"\npassword = "{ARGON}"\nscopes = ["own"]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "htpasswd"


def parsed(file: Path, content: str | bytes, more: str = "") -> Settings:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return loader.parse(f'[users_file]\npath = "{file}"\n{more}\n{BOB}', {})


async def test_users_of_both_can_log_in(file: Path) -> None:
    content = f"# made by htpasswd\n\nann:{BCRYPT}\r\nEve:{ARGON}:a comment\n"
    settings = parsed(file, content, 'scopes = ["read"]')
    users = settings.users_by_name
    assert {name: user.scopes for name, user in users.items()} == {"bob": ("own",), "ann": ("read",), "eve": ("read",)}
    assert (users["bob"].origin, str(users["ann"].origin)) == (None, f"{file}, line 3")
    passwords = Passwords(PasswordSettings(memory_kib=8, time_cost=1, threads=1), users)
    try:
        found, _ = await passwords.verify([("ann", WORD)])
        assert found.username == "ann"
        found, _ = await passwords.verify([("eve", "ann-secret")])
        assert found.username == "eve"
    finally:
        passwords.close()


def test_by_default_they_have_no_scopes(file: Path) -> None:
    assert parsed(file, f"ann:{BCRYPT}").users_by_name["ann"].scopes == ()


def test_the_short_form_names_the_file(file: Path) -> None:
    file.write_text(f"ann:{BCRYPT}\n")
    assert list(loader.parse(f'users_file = "{file}"\n{BOB}', {}).users_by_name) == ["bob", "ann"]
    assert list(loader.parse('users_file = "${FILE}"', {"FILE": str(file)}).users_by_name) == ["ann"]


REFUSED = {
    "$apr1$salt$qJH7.N4xYta3aEG/dfqo/0": "an MD5 hash (apr1), which is guessed in seconds",
    "$1$salt$qJH7.N4xYta3aEG/dfqo/0": "an MD5 hash (apr1), which is guessed in seconds",
    "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=": "a SHA-1 hash, which is guessed in seconds",
    "$6$salt$hash": "a hash of the system's crypt, which tokenauth cannot check",
    "$5$salt$hash": "a hash of the system's crypt, which tokenauth cannot check",
    "rl0uE0jEJYmYY": "a hash of DES crypt, which uses 8 characters only, or plain text",
    "hunter2": "in plain text, or a hash that tokenauth does not know",
    "": "in plain text, or a hash that tokenauth does not know",
}


def mistake(file: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as refusal:
        parsed(file, content)
    assert "\n" not in str(refusal.value)
    return str(refusal.value).removeprefix("users_file.path: ")


@pytest.mark.parametrize("hashed", REFUSED)
def test_weak_hashes_are_refused_with_line_and_reason(file: Path, hashed: str) -> None:
    found = mistake(file, f"eve:{BCRYPT}\nann:{hashed}\n")
    fix = f"run `htpasswd -B -C 12 {file} ann`"
    assert found == f"{file}, line 2: the password of 'ann' is {REFUSED[hashed]}; {fix}"
    assert not hashed or hashed not in found


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("ann", "line 1: has no colon between a name and a hash"),
        (f":{BCRYPT}", "line 1: username must have 1 to 256 characters"),
        (f"a\u200bnn:{BCRYPT}", "line 1: username must not have control characters"),
        (f"BOB:{BCRYPT}", "line 1: 'BOB' is in [[users]], too: remove one of the two"),
        (f"ann:{BCRYPT}\n\nANN:{BCRYPT}", "line 3: 'ANN' is in line 1, too: remove one of the two"),
        (b"ann:\xff", "line 1 is not UTF-8"),
    ],
)
def test_other_mistakes_have_their_line(file: Path, content: str | bytes, problem: str) -> None:
    assert f"{file}, {problem}" in mistake(file, content)


def test_a_missing_file_is_a_mistake(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^users_file\.path: .*htpasswd cannot be read: No such file or directory; put"
    ):
        loader.parse(f'users_file = "{file}"', {})
    assert "cannot be read" in loader.examine(f'users_file = "{file}"', {})[1][0]


def test_an_empty_file_may_be_half_written(file: Path) -> None:
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty; if it is to have no users, write # into it"):
        loader.parse(f'users_file = "{file}"', {})
    assert len(parsed(file, "#\n").users_by_name) == 1


@pytest.mark.parametrize("setting", ["users_file.path", "server.tls_certificate", "server.tls_key", "a secret"])
def test_no_file_that_is_a_pipe_is_opened(tmp_path: Path, setting: str) -> None:
    """Opening it would block the main process until someone writes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    certificate = make_certificate(tmp_path).certificate
    pair = [pipe, certificate] if setting == "server.tls_certificate" else [certificate, pipe]
    with pytest.raises(ConfigError, match="it is not a regular file"):  # noqa: PT012  (one of three)
        if setting == "users_file.path":
            loader.parse(f'users_file = "{pipe}"', {})
        elif setting == "a secret":
            loader.parse('[database]\nurl = "${URL}"', {"URL_FILE": str(pipe)})
        else:
            tls.read(ServerSettings(tls_certificate=str(pair[0]), tls_key=str(pair[1])))


def test_a_hash_that_is_cut_off_names_its_line(file: Path) -> None:
    settings = parsed(file, f"ann:{BCRYPT[:-1]}\n")
    with pytest.raises(ConfigError) as refusal:
        Passwords(PasswordSettings(), settings.users_by_name)
    assert str(refusal.value).startswith(f"users_file.path: {file}, line 1: the password of 'ann' is not a hash")
    assert str(refusal.value).endswith(f"; run `htpasswd -B -C 12 {file} ann`")


def test_risks_of_the_file_are_found(file: Path) -> None:
    settings = parsed(file, f"ann:{BCRYPT}\n")
    file.chmod(0o644)
    config = file.with_name("config.toml")
    config.touch(0o600)
    risks = find_risks(settings, Passwords(PasswordSettings(memory_kib=8, time_cost=1), settings.users_by_name), config)
    found = {risk.name: risk.text for risk in risks}
    assert f"run `htpasswd -B -C 12 {file} ann`" in found["weak_hash"], "its cost is 4"
    assert f"chmod o-r {file}" in found["readable_config"]


def test_the_user_commands_edit_their_own_file_only(file: Path) -> None:
    file.write_text(f"ann:{BCRYPT}\n")
    config = file.with_name("config.toml")
    config.write_text(f'users_file = "{file}"\n{BOB}')
    before = config.read_text(), file.read_text()
    edited = UserEditor(config)

    def no_password() -> str:
        raise AssertionError("must not ask for a password")

    edits: list[Callable[[], object]] = [
        lambda: edited.add("ANN", no_password, ()),
        lambda: edited.change_password("ann", no_password),
        lambda: edited.change_scopes("ann", ("x",)),
        lambda: edited.remove("ann"),
    ]
    for edit in edits:
        with pytest.raises(ConfigError) as refusal:
            edit()
        assert f"'ann' is in line 1 of the users_file {file}, and `tokenauth user` edits this file only" in str(
            refusal.value
        )
        assert f"`htpasswd -D {file} ann` to remove the user" in str(refusal.value)
    assert (config.read_text(), file.read_text()) == before
