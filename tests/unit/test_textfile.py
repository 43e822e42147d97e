"""TextFile and UserEditor: an edit is atomic, keeps concurrent edits, and leaves no other file behind."""

import itertools
import os
import re
import resource
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.skipping import skip_without
from tokenauth.errors import ConfigError
from tokenauth.settings import loader
from tokenauth.settings.text_file import TextFile
from tokenauth.settings.user_editor import UserEditor

FILE = '# Жанна\n[tokens]\nttl = "5m"\n\n# Ann.\n[[users]]\nusername = "ann"\npassword = "a"\n\n[throttle]\nfree = 3\n'
BOM = b"\xef\xbb\xbf"


def written(newline: str, bom: bool) -> bytes:
    """Write the file with these line endings, with or without a byte order mark."""
    return (BOM if bom else b"") + FILE.replace("\n", newline).encode()


@contextmanager
def no_room(directory: Path) -> Iterator[None]:
    """Make each write fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(directory: Path, file_too: bool = True) -> Iterator[None]:
    """Become a user without the permission to write there."""
    directory.chmod(0o555)
    path = directory / "config.toml"
    path.chmod(0o444 if file_too else 0o666)
    root = os.geteuid() == 0
    outer = [parent for parent in directory.parents if root and not parent.stat().st_mode & 1]
    modes = [(parent, parent.stat().st_mode & 0o777) for parent in outer]
    for parent in outer:  # pytest's directories are private
        parent.chmod(0o711)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for parent, mode in modes:
            parent.chmod(mode)
        directory.chmod(0o755)
        path.chmod(0o640)


@contextmanager
def only_the_directory_read_only(directory: Path) -> Iterator[None]:
    """Become a user who can write only the file."""
    with read_only(directory, file_too=False):
        yield


@contextmanager
def mounted(directory: Path) -> Iterator[None]:
    """Make the file a mount point, as in containers. It cannot be replaced by renaming then."""
    elsewhere = directory.parent / "elsewhere.toml"
    elsewhere.write_bytes((directory / "config.toml").read_bytes())
    command = ["mount", "--bind", str(elsewhere), str(directory / "config.toml")]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        skip_without("the right to mount", "run the tests as root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory / "config.toml")], check=True)
    os.replace(elsewhere, directory / "config.toml")


@contextmanager
def two_names(directory: Path) -> Iterator[None]:
    """Give the file a second name, which must not keep the old text."""
    other = directory.parent / "second"
    os.link(directory / "config.toml", other)
    yield
    assert other.read_bytes() == (directory / "config.toml").read_bytes()


@contextmanager
def nothing_wrong(directory: Path) -> Iterator[None]:
    """Change nothing."""
    yield


@contextmanager
def a_leftover(directory: Path) -> Iterator[None]:
    """Create the file that a killed command leaves."""
    (directory / ".config.toml.new").write_text("half of all has")
    yield


FAILS = [no_room, read_only]
WORKS = [nothing_wrong, only_the_directory_read_only, mounted, two_names, a_leftover]
EDITS: dict[str, Callable[[UserEditor], object]] = {
    "add": lambda file: file.add("bob", lambda: "b", ("read",)),
    "passwd": lambda file: file.change_password("ann", lambda: "new"),
    "remove": lambda file: file.remove("ann"),
}
TABLE = '[[users]]\nusername = "bob"\npassword = "b"\nscopes = ["read"]\n\n'
EDITED = {
    "add": FILE.replace("[throttle]", f"{TABLE}[throttle]"),
    "passwd": FILE.replace('"a"', '"new"'),
    "remove": FILE.replace('# Ann.\n[[users]]\nusername = "ann"\npassword = "a"\n', ""),
}


@pytest.mark.parametrize("state", [*WORKS, *FAILS], ids=lambda state: state.__name__)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("bom", [False, True], ids=["plain", "bom"])
@pytest.mark.parametrize("linked", [False, True], ids=["file", "link"])
def test_an_edit_is_complete_or_has_no_effect(
    tmp_path: Path,
    state: Callable[[Path], AbstractContextManager[None]],
    edit: str,
    newline: str,
    bom: bool,
    linked: bool,
) -> None:
    """The file has exactly the old text or the new one, the same link and mode, and no new file beside it."""
    directory = tmp_path / "etc"
    directory.mkdir()
    path = directory / "config.toml"
    path.write_bytes(written(newline, bom))
    path.chmod(0o640)
    if linked:
        (tmp_path / "link.toml").symlink_to(path)
    file = UserEditor(tmp_path / "link.toml" if linked else path)
    with state(directory):
        mode = path.stat().st_mode
        if state in FAILS:
            with pytest.raises(ConfigError, match=r"cannot be edited: (File too large|Permission denied)$"):
                EDITS[edit](file)
        else:
            EDITS[edit](file)
        assert path.stat().st_mode == mode
    wanted = FILE if state in FAILS else EDITED[edit]
    assert path.read_bytes() == (BOM if bom else b"") + wanted.replace("\n", newline).encode()
    assert os.listdir(directory) == ["config.toml"]
    assert (tmp_path / "link.toml").is_symlink() == linked


def overwritten(path: Path) -> None:
    """Save as some editors do."""
    path.write_bytes(path.read_bytes() + b"# more\n")


def replaced(path: Path) -> None:
    """Save as other editors do."""
    path.with_name("new").write_text("# another\n")
    os.replace(path.with_name("new"), path)


def removed(path: Path) -> None:
    """Remove the file, as some editors do for an instant."""
    path.unlink()


def linked_elsewhere(path: Path) -> None:
    """Point the name at another file."""
    path.with_name("other").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to("other")


@pytest.mark.parametrize("save", [overwritten, replaced, removed, linked_elsewhere], ids=lambda save: save.__name__)
@pytest.mark.parametrize("links", [1, 2])
def test_an_edit_aborts_if_the_file_changes_meanwhile(tmp_path: Path, save: Callable[[Path], None], links: int) -> None:
    """Both when the file is replaced and when it is written in place."""
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    if links == 2:
        os.link(path, tmp_path / "second")

    def change(text: str) -> str:
        save(path)
        return text + "# of the command\n"

    with pytest.raises(ConfigError, match=r"has changed|No such file"):
        TextFile(path).edit(change)
    assert "of the command" not in "".join(found.read_text() for found in tmp_path.iterdir())
    assert ".config.toml.new" not in os.listdir(tmp_path)


NAMES = ("ann", "bob")
MEANWHILE = [*itertools.product(["add", "passwd", "remove"], NAMES), ("by hand", ""), ("nothing", "")]


def done(users: dict[str, str], operation: str, name: str, password: str) -> dict[str, str] | None:
    """Return the users after a command; None if it must fail."""
    if (operation == "add") == (name in users):
        return None
    return {other: users[other] for other in users if other != name} | (
        {} if operation == "remove" else {name: password}
    )


def command(path: Path, operation: str, name: str, password: Callable[[], str]) -> bool:
    """Run a command. Return whether it succeeded."""
    file = UserEditor(path)
    try:
        if operation == "add":
            file.add(name, password, ())
        elif operation == "passwd":
            file.change_password(name, password)
        else:
            file.remove(name)
    except ConfigError as error:
        return re.search("there is no user|user '.*' exists", str(error)) is None
    return True


@pytest.mark.parametrize("outer", list(itertools.product(["add", "passwd"], NAMES)), ids="-".join)
@pytest.mark.parametrize("first", MEANWHILE, ids=" ".join)
@pytest.mark.parametrize("second", [("add", "ann"), ("remove", "bob"), ("by hand", "")], ids=" ".join)
def test_edits_while_a_password_is_typed_are_kept(
    tmp_path: Path, outer: tuple[str, str], first: tuple[str, str], second: tuple[str, str]
) -> None:
    """A slow command behaves as if it had started when the password was entered: it makes its change or fails."""
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    model = {"ann": "a"}
    asked = False

    def typed() -> str:
        nonlocal model, asked
        asked = True
        for operation, name in (first, second):
            if operation == "by hand":
                path.write_text(path.read_text() + "# by hand\n")
            elif operation != "nothing":
                after = done(model, operation, name, "quick")
                assert command(path, operation, name, lambda: "quick") == (after is not None)
                model = model if after is None else after
        return "slow"

    granted = command(path, *outer, typed)
    after = done(model, *outer, "slow") if asked else None
    assert granted == (after is not None)
    users = loader.load(path, {}).users
    assert {user.username: user.password for user in users} == (model if after is None else after)
    assert path.read_text().count("# by hand") == ([first, second].count(("by hand", "")) if asked else 0)
    assert path.read_text().startswith("# Жанна")


PIECES = st.sampled_from(
    ["# a comment\n", "\n", "  \n", "[tokens]\nttl = 60 # short\n", "[throttle]\n\nfree = 3\n", "[pools.p]\n",
     "[oauth]\n", "#\u2028[[users]]\n", "#\x85[[users]]\n", "#[[users]]\n"]
)  # fmt: skip
USER_TABLES = st.lists(
    st.tuples(
        st.sampled_from(["[[users]]", "[[ users ]]", '[["users"]]', "  [[users]]  # who"]),
        st.permutations(['username = "{}"', 'password = "old" # a hash', 'scopes = ["a",\n  "b"]']),
    ),
    max_size=3,
)


@settings(max_examples=40)
@given(st.lists(PIECES, min_size=1, max_size=5, unique=True), USER_TABLES, st.booleans(), st.booleans())
def test_an_edit_changes_no_other_line(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[str],
    tables: list[tuple[str, list[str]]],
    crlf: bool,
    bom: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "generated.toml"
    users = ["\n".join([head, *keys]).format(f"u{number}") + "\n" for number, (head, keys) in enumerate(tables)]
    text = "".join([*pieces[:1], *users[:1], *pieces[1:2], *users[1:], *pieces[2:]])
    path.write_bytes((BOM if bom else b"") + text.replace("\n", "\r\n" if crlf else "\n").encode())

    def lines() -> Counter[str]:
        data = path.read_bytes()
        assert data.startswith(BOM) == bom
        assert data.count(b"\r\n") == (data.count(b"\n") if crlf else 0)
        return Counter(line for line in data.removeprefix(BOM).decode().replace("\r", "").split("\n") if line.strip())

    before = lines()
    UserEditor(path).add("eve", lambda: "new", ())
    assert lines() - before == Counter(["[[users]]", 'username = "eve"', 'password = "new"'])
    assert before - lines() == Counter()
    for number in range(len(users)):
        UserEditor(path).change_password(f"u{number}", lambda: "changed")
    assert lines()['password = "changed" # a hash'] == before['password = "old" # a hash'] == len(users)
    for name in ("eve", *(f"u{number}" for number in range(len(users)))):
        UserEditor(path).remove(name)
    assert lines() - before == Counter()
    own = Counter(line for user in users for line in user.split("\n") if line)
    assert all(line.startswith("#") for line in before - lines() - own), "only the comment right above goes, too"
    assert loader.load(path, {}).users == ()
