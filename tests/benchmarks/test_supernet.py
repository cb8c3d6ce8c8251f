"""The benchmark of the supernet in its quick form: every row runs, is stored and is measured."""

import json

from benchmarks import supernet


def test_every_row_runs(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    line = supernet.main(["--quick", "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["targets"] == supernet.TARGETS
    small, whole = line["front"]
    assert small["part"] <= 0.3 and whole["part"] <= 1.0
    assert small["macs"] < whole["macs"] and small["parameters"] < whole["parameters"]
    assert all(0 <= point["acc"] <= 100 for point in line["front"])
    rows = {name: row["values"] for name, row in line["rows"].items()}
    assert rows["alone_random_0.3"]["macs"] == rows["alone_cut_0.3"]["macs"] == small["macs"]
    assert rows["supernet"]["members"] > 1000
    for found in (line["cells"]["search"], line["cells"]["random"]):
        assert found["macs"] > 0 and 0 <= found["acc"] <= 100
    assert line["cells"]["random"]["price"] >= line["cells"]["search"]["price"]
