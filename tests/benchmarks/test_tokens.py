"""The benchmark of tokens in its quick form: every way is made, recovered, measured and timed."""

import json

from benchmarks import tokens


def test_every_way_is_measured(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    line = tokens.main(["--quick", "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["acc"] == line["acc"]
    rows = {name: row["values"] for name, row in line["rows"].items()}
    for name in tokens.ways(quick=True):
        assert rows[name]["macs_ratio"] > 1 and rows[f"{name}_recovered"]["macs_ratio"] > 1
        assert line[f"latency_ratio_{name}_fp32_b1"] > 0
        for end in ("_before_training", ""):
            assert 0 <= line[f"acc_{name}{end}"] <= 100
