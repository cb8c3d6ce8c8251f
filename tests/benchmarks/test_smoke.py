"""Every benchmark runs in its quick form, keeps its rows and prints the keys it promises."""

import importlib
import json

import pytest

pytestmark = [pytest.mark.data, pytest.mark.slow]

RESNET = [
    "base_acc", "macs_ratio", "acc_before_training", "acc_after_recovery", "acc_int8", "minutes",
    "latency_ms_b1", "latency_ms_b32", "best_peer_ms_b1", "best_peer_ms_b32",
    "acc_before_training_torch_pruning",
]  # fmt: skip
MINILM = ["cosine", "cosine_min", "latency_ms", "latency_ms_nncf", "cosine_nncf"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, data_dir):
    """Call a benchmark's `main` in its quick form; returns its last line, and says what is kept."""
    monkeypatch.setenv("LACONIC_DATA", str(data_dir))

    def call(name, *arguments):
        module = importlib.import_module(f"benchmarks.{name}")
        module.main(["--quick", "--results", str(tmp_path), *arguments])
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        kept = [json.loads(path.read_text()) for path in (tmp_path / "quick").glob("*.json")]
        assert line in kept
        return line

    return call


@pytest.mark.filterwarnings("default")  # the peers' own warnings are theirs
def test_resnet_main_on_the_smaller_sister(run, data_dir):
    pytest.importorskip("nncf")
    pytest.importorskip("torch_pruning")
    weights = data_dir / "resnet_cifar10" / "resnet20.safetensors"
    line = run("resnet56_main", "--weights", str(weights), "--depth", "20")
    assert all(isinstance(line[key], float) for key in RESNET)
    assert 2.0 <= line["macs_ratio"] <= 2.6
    assert line["acc_before_training"] > line["acc_before_training_torch_pruning"]
    assert line["acc_after_recovery"] > 50
    assert abs(line["acc_int8"] - line["acc_after_recovery"]) < 5
