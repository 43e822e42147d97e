"""A short form of the soak in `make faults`, and that its check notices what grows."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.journal import serving, until
from tests.support.servers import write_config
from tests.support.soak import MIX, SETTINGS, Sample, Soak, check_flat

pytestmark = pytest.mark.extended


def test_a_mixed_load_gets_right_answers_and_stays_flat(tmp_path: Path) -> None:
    """Latencies and CPU time are measured, but its windows are too short to compare them."""
    with serving(write_config(tmp_path, SETTINGS), "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        soak = Soak(server, tmp_path / "tokenauth.db-wal", rate=150, window=0.1)
        soak.run(3, lambda _: None)
        assert {event["level"] for event in server.events()} == {"info"}
    assert min(soak.counts[kind] for kind in MIX) > 0
    assert {kind for sample in soak.samples for kind, taken in sample.latencies.items() if taken} == {
        *MIX,
        "bare",
        "sync",
    }
    assert any(sample.cpu for sample in soak.samples)
    assert any(sample.bare_cpu for sample in soak.samples)
    check_flat(soak.samples)


TIMES = {"hot": [0.001] * 1000, "bare": [0.0005] * 1000, "login": [0.003] * 50, "sync": [0.001] * 50}
FLAT = Sample(0, memory=100_000, descriptors=50, wal=0, latencies=TIMES, cpu=0.0003, bare_cpu=0.0001)


@pytest.mark.parametrize(
    ("grown", "said"),
    [
        (replace(FLAT, memory=110_000), "memory grows"),
        (replace(FLAT, descriptors=60), "descriptors grow"),
        (replace(FLAT, wal=10 << 20), "log grows"),
        (replace(FLAT, cpu=0.0005), "more CPU"),
        (replace(FLAT, latencies={**TIMES, "hot": [0.002] * 1000}), "hot gets slower"),
        (replace(FLAT, latencies={**TIMES, "hot": [0.001] * 980 + [0.01] * 20}), "hot gets slower"),
        (replace(FLAT, latencies={**TIMES, "login": [0.006] * 50}), "login gets slower"),
    ],
    ids=["memory", "descriptors", "log", "cpu", "median", "p99", "write"],
)
def test_the_soak_notices_what_grows(grown: Sample, said: str) -> None:
    check_flat([FLAT] * 16)
    with pytest.raises(AssertionError, match=said):
        check_flat([FLAT] * 12 + [grown] * 4)


def test_a_machine_that_gets_busy_is_no_growth() -> None:
    slower = {kind: [3 * seconds for seconds in taken] for kind, taken in TIMES.items()}
    busy = replace(FLAT, latencies=slower, cpu=2 * FLAT.cpu, bare_cpu=2 * FLAT.bare_cpu)
    interrupted = replace(FLAT, latencies={**TIMES, "hot": [0.01] * 1000})
    check_flat([FLAT] * 12 + [busy, busy, busy, interrupted])
