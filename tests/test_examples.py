"""What stands in `examples` works as it says."""

from collections.abc import Iterator

import httpx
import pytest

from examples import fencing
from tests.servers import HandClock, Server, log_in


@pytest.fixture(scope="module")
def settings() -> str:
    """Have the pool of the examples, with its one permit, as `config.toml` has it."""
    return "[pools.permits]\ncapacity = 1\nprefill = true\nlease_ttl = 1800"


@pytest.fixture
def pool(server: Server) -> Iterator[httpx.Client]:
    """Connect to the pool as a user who is logged in."""
    with server.client() as client:
        token = log_in(client)
    with httpx.Client(base_url=f"{server.url}/api/pools/permits/", headers={"X-Token": token}) as connected:
        yield connected


def test_a_holder_that_slept_past_its_lease_is_refused_by_a_resource_that_looks_at_fences(
    pool: httpx.Client, clock: HandClock
) -> None:
    notebook = fencing.FencedNotebook()
    assert not fencing.run(notebook, pool, clock.advance)
    assert [line.partition(":")[0] for line in notebook.lines] == ["Ann", "Bob"]


def test_without_that_look_the_late_write_goes_through(pool: httpx.Client, clock: HandClock) -> None:
    notebook = fencing.Notebook()
    assert fencing.run(notebook, pool, clock.advance)
    assert [line.partition(":")[0] for line in notebook.lines] == ["Ann", "Bob", "Ann"]


def test_the_example_runs_as_it_says(server: Server, clock: HandClock, capsys: pytest.CaptureFixture[str]) -> None:
    fencing.main(["--url", server.url], clock.advance)
    told = capsys.readouterr().out
    assert "FencedNotebook: Ann's late write was refused." in told
    assert "\nNotebook: Ann's late write was taken." in told
