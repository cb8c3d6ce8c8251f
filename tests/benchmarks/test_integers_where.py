"""Where integers pay, in its quick form: every network is judged and timed."""

import pytest
from benchmarks.harness import Bench

from benchmarks import integers_where

pytestmark = [pytest.mark.data, pytest.mark.slow]


def test_every_network_is_judged_and_timed(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    bench = Bench("mixed_precision")
    bench.parse(["--quick", "--results", str(tmp_path)])
    row = integers_where.rows(bench)["vit_where"]
    for label in ("float", "int8", "where_0"):
        assert 0 <= row[f"{label}_validation"] <= 100
        assert row[f"{label}_ms_b1"] > 0
    assert len(row["where_0_front"]) == 2
