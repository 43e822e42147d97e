"""What differs between two configurations, and whether files have changed."""

import os
from pathlib import Path

import pytest

from tokenauth.settings import loader
from tokenauth.settings.differences import find_differences
from tokenauth.settings.files_read import FilesRead

BEFORE = """
[server]
workers = 2
[oauth]
issuer = "https://auth.example.com/s3cret"
[pools.a]
capacity = 1
[pools.b]
[dialects.token-pool]
pool = "b"
[[users]]
username = "Ann"
password = "s3cret"
[[users]]
username = "bob"
password = "s3cret"
"""


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("", "", {}),
        ("workers = 2", "workers = 3", {"settings_changed": ["server.workers"]}),
        (
            "workers = 2",
            'docs = false\nworkers = 2\n[tokens]\nttl = "2h"',
            {"settings_changed": ["server.docs", "tokens.ttl"]},
        ),
        ("/s3cret", "/s3cret2", {"settings_changed": ["oauth.issuer"]}),
        ("capacity = 1", "capacity = 2", {"pools_changed": ["a"]}),
        ("capacity = 1", "capacity = 1\n[pools.c]", {"pools_added": ["c"]}),
        ("[pools.a]\ncapacity = 1", "", {"pools_removed": ["a"]}),
        ('pool = "b"', 'pool = "b"\nprefix = "/x"', {"settings_changed": ["dialects.token-pool.prefix"]}),
        ('[dialects.token-pool]\npool = "b"', "", {"settings_changed": ["dialects.token-pool"]}),
        ('"bob"\npassword = "s3cret"', '"bob"\npassword = "s3cret2"', {"passwords_changed": ["bob"]}),
        ('username = "bob"', 'username = "bob"\nscopes = ["a", "b"]', {"scopes_changed": ["bob: none -> a b"]}),
        ('username = "bob"', 'username = "eve"', {"users_added": ["eve"], "users_removed": ["bob"]}),
        ('username = "Ann"', 'username = "ann"', {}),
    ],
)
def test_names_of_what_differs_and_no_value(old: str, new: str, found: dict[str, list[str]]) -> None:
    changed = find_differences(loader.parse(BEFORE, {}), loader.parse(BEFORE.replace(old, new, 1), {}))
    assert changed == found
    assert "s3cret" not in str(changed)


def test_of_many_names_the_rest_is_counted() -> None:
    users = "".join(f'[[users]]\nusername = "u{number}"\npassword = "x"\n' for number in range(60))
    changed = find_differences(loader.parse("", {}), loader.parse(users, {}))
    assert changed == {"users_added": [*(f"u{number}" for number in range(50)), "and 10 more"]}


@pytest.fixture
def mounted(tmp_path: Path) -> tuple[Path, Path]:
    """Return a file as Kubernetes mounts it, behind two links, and the directory of the first link."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "file").write_text("one")
    (tmp_path / "data").symlink_to("1")
    (tmp_path / "file").symlink_to("data/file")
    return tmp_path / "file", tmp_path


def changes(files: FilesRead) -> list[bool]:
    return [files.changed() for _ in range(3)]


def test_a_change_is_seen_when_it_has_settled(mounted: tuple[Path, Path]) -> None:
    path, directory = mounted
    files = FilesRead()
    files.note(path)
    assert changes(files) == [False] * 3
    path.write_text("another")
    assert changes(files) == [False, True, True]
    path.write_text("a third one")
    assert files.changed() is False, "it has changed again"
    files = FilesRead()
    files.note(path)
    (directory / "2").mkdir()
    (directory / "2" / "file").write_text("a third one")
    (directory / "new").symlink_to("2")
    os.replace(directory / "new", directory / "data")
    assert changes(files) == [False, True, True]


def test_a_renamed_file_and_a_missing_one_are_seen(tmp_path: Path) -> None:
    path, other, files = tmp_path / "file", tmp_path / "other", FilesRead()
    path.write_text("one")
    files.note(path)
    files.note(tmp_path / "none")
    other.write_text("two")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))  # same size, same time
    os.replace(other, path)
    assert changes(files) == [False, True, True]
    path.unlink()
    assert changes(files) == [False, True, True]


def test_a_copy_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    """As `cp -p` writes it: into the file that is there."""
    path, files = tmp_path / "file", FilesRead()
    path.write_text("one")
    os.utime(path, (1, 1))
    files.note(path)
    path.write_text("two")
    os.utime(path, (1, 1))
    assert changes(files) == [False, True, True]


def test_all_files_of_a_configuration_are_noted(tmp_path: Path) -> None:
    config, secret = tmp_path / "config.toml", tmp_path / "secret"
    config.write_text("[oauth]\nissuer = '${ISSUER}'")
    secret.write_text("https://auth.example.com\n")
    for path in (config, secret):
        files = FilesRead()
        loader.load(config, {"ISSUER_FILE": str(secret)}, files)
        assert not files.changed()
        os.utime(path, (1, 1))
        assert changes(files) == [False, True, True]
