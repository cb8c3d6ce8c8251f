"""The composition benchmark keeps its rows and tells pairs, what passed and what failed."""

import json

from benchmarks import composition


def test_quick_form(tmp_path, capsys):
    for _ in range(2):  # the second time the stored row is taken
        line = composition.main(["--quick", "--results", str(tmp_path)])
        assert line["pairs"] == line["passed"] + len(line["failed"]) == 9
        assert line["failed"] == {}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line


def test_a_pair_that_breaks_is_told_with_the_reason(monkeypatch):
    def wrong(_):
        raise AssertionError("not so")

    monkeypatch.setattr(composition.contracts, "PAIR_CHECKS", (wrong,))
    found = composition.row("no_bias", ["simplify.fold"])
    assert found["pairs"] == 1 and found["passed"] == 0
    assert found["failed"] == {"simplify.fold > simplify.fold": "wrong: AssertionError: not so"}
