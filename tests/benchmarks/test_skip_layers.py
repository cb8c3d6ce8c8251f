"""The benchmark of skipped layers in its quick form: gates are trained, deployed and timed."""

import json

from benchmarks import skip_layers


def test_gates_are_trained_and_deployed(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    line = skip_layers.main(["--quick", "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["spent"] == line["spent"]
    rows = {name: row["values"] for name, row in line["rows"].items()}
    assert len(rows["gated"]["executed"]) == 1 and 0 <= line["spent"] <= 1
    assert rows["fixed"]["macs_ratio"] > 1.2
    assert 0 < line["cosine_gated"] <= 1 and line["latency_ratio_gated_fp32_b2"] > 0
    assert rows["test"]["original_fp32"] > 0.999
