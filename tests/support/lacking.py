"""What tests do without a program, or a right, that only they need."""

import os
from typing import NoReturn

import pytest


def lack(what: str, remedy: str) -> NoReturn:
    """Skip the test, with the remedy; where everything must run (TOKENAUTH_TEST_ALL=1), fail."""
    assert os.environ.get("TOKENAUTH_TEST_ALL") != "1", f"{what} is missing: {remedy}"
    pytest.skip(f"needs {what}: {remedy}")
