"""The benchmark of trained bits in its quick form: every row trains, is stored and is measured."""

import json

from benchmarks import qat


def test_every_row_trains_and_is_tested(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    line = qat.main(["--quick", "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["targets"] == qat.TARGETS
    rows = {name: row["values"] for name, row in line["rows"].items()}
    for name in qat.ROWS:
        assert 0 <= line[name] <= 100
        assert rows[name]["bytes"] < 0.5 * rows["base"]["bytes"]
    assert rows["w1"]["bytes"] < rows["w2a2"]["bytes"] < rows["w3a3"]["bytes"]
    assert rows["w4a4"]["val"] > 40  # three steps from a trained network
