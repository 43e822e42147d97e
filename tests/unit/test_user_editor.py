"""UserEditor edits the users in place and leaves the rest of the file unchanged."""

import os
from pathlib import Path

import pytest

from tests.support.servers import shipped
from tests.support.skipping import skip_without
from tokenauth.errors import ConfigError
from tokenauth.settings import loader
from tokenauth.settings.user_editor import UserEditor

FILE = """# The head of the file.

[server]            # where we listen
port   =   9000     # not 8000

# The admin.
[[users]]
username = "admin"  # first
password = "old"    # to be changed
scopes = ["admin"]

# Ann, from sales.
[[users]]
scopes = [ "read",
           "write" ]  # both
password = "hers"
username = "Ann"

[tokens]
ttl = "5m"  # short
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a file with comments and an unusual order."""
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    return path


def hashed() -> str:
    """Return the hash of a new password."""
    return "new-hash"


def refused() -> str:
    """Fail if a password is asked for."""
    raise AssertionError("must not ask for a password")


def lines(path: Path) -> list[str]:
    """Return the lines of the file, without blank ones."""
    return [line for line in path.read_text().splitlines() if line]


OLD = [line for line in FILE.splitlines() if line]


def test_adding_a_user_changes_nothing_else(path: Path) -> None:
    UserEditor(path).add("bob", hashed, ("read", "write"))
    new = ["[[users]]", 'username = "bob"', 'password = "new-hash"', 'scopes = ["read", "write"]']
    assert [line for line in lines(path) if line not in new] == [line for line in OLD if line not in new]
    bob = loader.load(path, {}).users_by_name["bob"]
    assert (bob.password_hash, bob.scopes) == ("new-hash", ("read", "write"))
    assert set(loader.load(path, {}).users_by_name) == {"admin", "ann", "bob"}


def test_a_user_without_scopes_has_no_line_about_them(path: Path) -> None:
    UserEditor(path).add("bob", hashed, ())
    assert path.read_text().count("scopes") == 2


def test_a_changed_password_is_all_that_changes(path: Path) -> None:
    UserEditor(path).change_password("admin", hashed)
    spaced = [" ".join(line.split()) for line in lines(path)]
    assert spaced == [" ".join(line.replace('"old"', '"new-hash"').split()) for line in OLD]
    assert loader.load(path, {}).users_by_name["admin"].password_hash == "new-hash"
    assert loader.load(path, {}).users_by_name["ann"].password_hash == "hers"


def test_removing_a_user_removes_nothing_else(path: Path) -> None:
    UserEditor(path).remove("admin")
    settings = loader.load(path, {})
    assert set(settings.users_by_name) == {"ann"}
    assert (settings.server.port, settings.tokens.ttl) == (9000, 300)
    for kept in (
        "# The head of the file.",
        "[server]            # where we listen",
        "# Ann, from sales.",
        'ttl = "5m"  # short',
    ):
        assert kept in path.read_text()


def test_all_users_can_be_removed_and_others_added(path: Path) -> None:
    for name in ("ann", "admin"):
        UserEditor(path).remove(name)
    assert loader.load(path, {}).users_by_name == {}
    UserEditor(path).add("eve", hashed, ())
    assert set(loader.load(path, {}).users_by_name) == {"eve"}


@pytest.mark.parametrize("name", ["ann", "ANN", "\uff21nn"])
def test_a_name_is_compared_as_logins_compare_it(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"user 'Ann' exists \(.*\); `tokenauth user passwd Ann`"):
        UserEditor(path).add(name, refused, ())
    assert path.read_text() == FILE
    UserEditor(path).change_password(name, hashed)
    assert loader.load(path, {}).users_by_name["ann"].password_hash == "new-hash"
    UserEditor(path).remove(name)
    assert set(loader.load(path, {}).users_by_name) == {"admin"}


@pytest.mark.parametrize("action", ["change_password", "remove"])
def test_an_unknown_user_name_is_an_error(path: Path, action: str) -> None:
    file = UserEditor(path)
    with pytest.raises(ConfigError, match=r"config\.toml: there is no user 'eve'; `tokenauth user list`"):
        file.remove("eve") if action == "remove" else file.change_password("eve", refused)
    assert path.read_text() == FILE


@pytest.mark.parametrize(
    ("name", "scopes", "key"),
    [
        ("", (), "username"),
        (" bob", (), "username"),
        ("bo\nb", (), "username"),
        ("b" * 257, (), "username"),
        ("bo\udcffb", (), "username"),
        ("bob", ("a b",), "scopes"),
        ("bob", ("",), "scopes"),
    ],
    ids=ascii,
)
def test_an_edit_that_would_be_invalid_is_not_written(path: Path, name: str, scopes: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"users\[2\]\.{key}(\[0\])?: ") as refusal:
        UserEditor(path).add(name, hashed, scopes)
    assert "\n" not in str(refusal.value)
    assert path.read_text() == FILE
    assert os.listdir(path.parent) == ["config.toml"]


@pytest.mark.parametrize(
    "text", ["[server]\nprot = 1\n", "[server]\nport = 99999\n", "[server]\nhost = '${NO_SUCH}'\n"]
)
def test_a_file_that_is_broken_already_is_not_edited(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match="server"):
        UserEditor(path).add("bob", hashed, ())
    assert path.read_text() == text


@pytest.mark.parametrize(
    "text", [b"[server", b"\xff", b"users = 1", b"users = []", b"[users]", b"users = [{username = 'a'}]"]
)
def test_a_file_that_cannot_be_edited_is_a_mistake(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    with pytest.raises(ConfigError) as refusal:
        UserEditor(path).add("bob", refused, ())
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == text


def test_a_missing_file_cannot_be_edited(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be edited"):
        UserEditor(tmp_path / "config.toml")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_the_files_mode_stays(path: Path, mode: int) -> None:
    path.chmod(mode)
    UserEditor(path).add("bob", hashed, ())
    assert path.stat().st_mode & 0o777 == mode


def test_the_files_owner_stays(path: Path) -> None:
    """Root edits a file that the service must be able to read."""
    if os.geteuid() != 0:
        skip_without("root", "run the tests as root: only root can change a file's owner")
    os.chown(path, 12345, 23456)
    path.chmod(0o600)
    UserEditor(path).add("bob", hashed, ())
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


def test_a_byte_order_mark_is_accepted(path: Path) -> None:
    path.write_text(path.read_text(), encoding="utf-8-sig")
    UserEditor(path).add("bob", hashed, ())
    assert "bob" in loader.load(path, {}).users_by_name


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "linked" / "config.toml"
    link.parent.mkdir()
    link.symlink_to(path)
    UserEditor(link).add("bob", hashed, ())
    assert link.is_symlink()
    assert "bob" in loader.load(path, {}).users_by_name


def test_no_other_file_is_left_in_the_directory(path: Path) -> None:
    UserEditor(path).add("bob", hashed, ())
    UserEditor(path).remove("bob")
    assert os.listdir(path.parent) == ["config.toml"]


def test_references_to_the_environment_stay_references(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNS_HASH", "from-the-environment")
    path.write_text(FILE.replace('"hers"', '"${ANNS_HASH}"'))
    UserEditor(path).add("bob", hashed, ())
    assert '"${ANNS_HASH}"' in path.read_text()
    assert loader.load(path).users_by_name["ann"].password_hash == "from-the-environment"


def test_the_shipped_file_can_be_edited(path: Path) -> None:
    path.write_text(shipped())
    UserEditor(path).add("bob", hashed, ("read",))
    UserEditor(path).change_password("admin", hashed)
    edited = loader.load(path, {})
    assert {name: user.password_hash for name, user in edited.users_by_name.items()} == dict.fromkeys(
        ("admin", "bob"), "new-hash"
    )
    assert edited.server == loader.parse(shipped(), {}).server
    comments = [line for line in shipped().splitlines() if "#" in line and "password" not in line]
    assert [line for line in comments if line not in path.read_text().splitlines()] == []
