"""Where integers pay, in its quick form: every network is judged and timed."""

import pytest
from benchmarks.harness import Bench

from benchmarks import integers_where
from laconic.reports import front


@pytest.mark.data
@pytest.mark.slow
def test_every_network_is_judged_and_timed(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    bench = Bench("mixed_precision")
    bench.parse(["--quick", "--results", str(tmp_path)])
    row = integers_where.rows(bench)["vit_where"]
    for label in ("float", "int8", "where_0"):
        assert 0 <= row[f"{label}_validation"] <= 100
        assert row[f"{label}_ms_b1"] > 0
    assert len(row["where_0_front"]) == 2


def test_the_chart_sets_what_was_chosen_beside_one_precision_for_all(tmp_path):
    row = {"float_ms_b1": 3.0, "float_validation": 80.0, "int8_ms_b1": 2.0, "int8_validation": 79.0,
           "where_0_ms_b1": 1.5, "where_0_validation": 79.5, "where_0_front": []}  # fmt: skip
    made = integers_where.page("vit", row)
    names = {kind: [point.name for point in points] for kind, points in made.series.items()}
    assert names == {"one precision for all": ["float", "int8"],
                     "integers where they pay": ["where_0"]}  # fmt: skip
    every = [point for points in made.series.values() for point in points]
    assert [point.name for point in front.best(every)] == ["where_0", "float"]
    assert "batch 1, ms" in front.write(made, tmp_path / "p.html").read_text(encoding="utf-8")
