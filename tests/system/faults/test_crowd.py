"""10,000 connections that send nothing, or slowly, or never read, when the workers run out of file descriptors."""

from pathlib import Path

from tests.support.crowded import survive_a_crowd
from tests.support.length import scaled


def test_10_000_silent_connections_hold_up_nobody(tmp_path: Path) -> None:
    count = scaled(10_000, 400)
    survive_a_crowd(tmp_path, count, descriptors=count // 4)
