"""An hour of mixed load: memory, descriptors, the write-ahead log and latencies stay flat, and no answer is wrong.

Progress is in soak.txt of the test's directory. Latencies and CPU time are compared with a bare server's and a bare
disk's at the same time. Times in which the machine was suspended are not measured.
"""

from pathlib import Path

import pytest

from tests.support.journal import serving, until
from tests.support.length import LENGTH, scaled
from tests.support.servers import write_config
from tests.support.soak import SETTINGS, Soak, check_flat

RATE = 60


def test_an_hour_of_mixed_load_stays_flat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = scaled(3600, 60)
    with serving(write_config(tmp_path, SETTINGS), "--workers", "2") as server:
        until(lambda: len(server.events("started")) == 2, "both workers serve")
        soak = Soak(server, tmp_path / "tokenauth.db-wal", RATE, max(seconds / 120, 10))
        with (tmp_path / "soak.txt").open("w") as report:
            soak.run(seconds, lambda line: print(line, file=report, flush=True))
        assert server.errors() == []
        assert {event["level"] for event in server.events()} == {"info"}
    with capsys.disabled():
        quarter = len(soak.samples) // 4
        print(f"\n{soak.samples[quarter]}\n{soak.samples[-1]}\n{dict(soak.counts)}, {soak.pauses} pauses ({LENGTH=})")
    assert soak.counts["hot"] > RATE * seconds / 10
    check_flat(soak.samples, complete=LENGTH >= 1)
