"""Pools against their model, for longer."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import Phase

from tests.contract.conftest import STORES, build
from tests.contract.test_pool_model import hold_to_the_model

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", STORES)
def test_what_is_promised_of_pools_holds_for_long(tmp_path: Path, name: str) -> None:
    asyncio.run(build(STORES[name], tmp_path))
    hold_to_the_model(STORES[name], tmp_path, 250, 120, Phase.shrink)
