"""The benchmark of early exits in its quick form: exits are trained, limits set, chains timed."""

import json

from benchmarks import early_exit


def test_rows_are_made_and_one_is_measured(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    line = early_exit.main(["--quick", "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["chosen"] == line["chosen"]
    rows = {name: row["values"] for name, row in line["rows"].items()}
    assert {*early_exit.QUICK, "test", "latency"} == set(rows)
    assert line["chosen"] == early_exit.chosen(rows) is not None
    assert line["acc"] > 80 >= line["acc_exit"] >= 0  # everybody may leave after two steps
    assert line["held"] == (max(rows["test"]["lost"].values()) <= line["promised"])
    for size in early_exit.SIZES:
        ratio = rows["latency"][f"same_precision_b{size}"]
        assert line[f"latency_ratio_b{size}"] > 0
        assert all(value > 0 for value in ratio.values())
