"""The benchmark of distillation in its quick form: a way of each kind trains and is measured."""

import json

from benchmarks import distillation

ROWS = ("r8_plain", "r8_kl", "r8_hint", "r8_self_taught", "free")


def test_ways_train_and_are_tested(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    asked = [part for name in (*ROWS, "test") for part in ("--only", name)]
    line = distillation.main(["--quick", "--results", str(tmp_path), *asked])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["minutes"] == distillation.MINUTES
    for name in ROWS:
        assert 0 <= line[name] <= 100
    assert set(line["gain"]) == {"resnet8"}
    assert set(line["curves"]) == {"r8_kl", "r8_plain"}
    assert line["rows"]["free"]["values"]["notes"][0].startswith("learned from 8 inputs drawn")
    assert set(line["rows"]["test"]["values"]) >= {"teacher_all", "r8_kl_test"}
