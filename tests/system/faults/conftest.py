"""Tests of this package take longer than others may."""

import faulthandler

import pytest

from tests.support.length import scaled

HANGS = 3 * 3600
"""Seconds after which a test counts as hanging."""


@pytest.fixture(autouse=True)
def _time_to_run() -> None:
    faulthandler.dump_traceback_later(scaled(HANGS, 3600), exit=True, file=2)
