"""A long run of tests/contract/test_pool_model.py."""

import pytest

from tests.contract.conftest import STORES, Templates, templates
from tests.contract.test_pool_model import hold_to_the_model

__all__ = ["templates"]


SCRIPTS = {"sqlite": 100, "postgres": 30}
"""A step on PostgreSQL takes four times as long."""


@pytest.mark.parametrize("name", STORES)
def test_the_pool_model_holds_in_a_long_run(templates: Templates, name: str) -> None:
    hold_to_the_model(templates, name, SCRIPTS[name], 120)
