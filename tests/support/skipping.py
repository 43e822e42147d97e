"""Skip a test if a program or permission that it needs is missing."""

import os
from typing import NoReturn

import pytest


def skip_without(what: str, remedy: str) -> NoReturn:
    """Skip the test and name the remedy. With TOKENAUTH_TEST_ALL=1, fail instead."""
    assert os.environ.get("TOKENAUTH_TEST_ALL") != "1", f"{what} is missing: {remedy}"
    pytest.skip(f"needs {what}: {remedy}")
