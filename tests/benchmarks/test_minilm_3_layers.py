"""The benchmark of a MiniLM with half its layers in its quick form: begins, trains, is probed."""

import json

from benchmarks import minilm_3_layers


def test_every_row_is_there(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    monkeypatch.setattr(minilm_3_layers, "BEGINNINGS", {})  # `random` is tried in any case
    monkeypatch.setattr(minilm_3_layers, "RATES", ())
    line = minilm_3_layers.main(["--quick", "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cosine"] == line["cosine"]
    rows = {name: row["values"] for name, row in line["rows"].items()}
    assert line["macs_ratio"] > 1.9
    assert rows["start"]["cosine"] > rows["begin_random"]["cosine"]
    for key in ("sst2_teacher", "sst2_student"):
        assert 0 <= line[key] <= 100
