"""Methods on a classifier with a recurrent layer, in which most of its weights are."""

import pytest
import torch
from torch import nn

from laconic import storage
from laconic.core.task import classification
from laconic.methods.base import Context, method_class
from laconic.program.capture import capture
from laconic.program.freezing import freeze
from laconic.program.sites import Sites
from laconic.runtimes.onnxruntime import OnnxRuntime
from laconic.runtimes.openvino import OpenVino

WEIGHTS = {f"rnn.weight_{part}_l0{way}" for part in ("ih", "hh") for way in ("", "_reverse")}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.rnn = nn.LSTM(12, 20, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40, 5)

    def forward(self, ids):
        return self.head(self.rnn(self.table(ids))[0].mean(1))


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (48, 7))
    program = capture(Classifier().eval(), (ids[:2],))
    return program, Context(task=classification(calibration=[ids]), original=program)


def apply(setting, method, **options):
    program, context = setting
    return method_class(method)(**options).apply(program, Sites(), context)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prune.magnitude", {"ratio": 0.8}),
        ("prune.fisher", {"ratio": 0.8}),
        ("share.cluster", {"bits": 3}),
        ("share.hash", {}),
        ("quantize.weights", {}),
    ],
)
def test_the_weights_of_the_recurrent_layer_get_smaller(setting, method, options, tmp_path):
    program, _ = setting
    made = freeze(apply(setting, method, **options).program)
    sizes = [storage.save(p, tmp_path / "x.laconic") for p in (program, made)]
    assert sizes[1] < 0.5 * sizes[0]
    read = storage.load(tmp_path / "x.laconic")
    assert torch.equal(read.run_flat(*program.example)[0], made.run_flat(*program.example)[0])
    changed = {n for n in WEIGHTS if not torch.equal(made.tensor(n).float(), program.tensor(n))}
    assert changed == WEIGHTS


@pytest.mark.parametrize("runtime", [OnnxRuntime, OpenVino])
def test_a_narrower_recurrent_layer_ships(setting, runtime, tmp_path):
    outcome = apply(setting, "prune.channels", ratio=0.4, block=1)
    width = outcome.program.tensor("rnn.weight_hh_l0").shape[1]
    assert width < 20
    path = runtime().write(outcome.program, tmp_path / f"model{runtime.suffix}", "fp32")
    ids = torch.randint(0, 30, (3, 7))
    (given,) = runtime().load(path, "fp32", 1).run([ids.numpy()])
    torch.testing.assert_close(torch.as_tensor(given), outcome.program(ids), atol=1e-5, rtol=1e-4)


def test_methods_that_need_rows_of_columns_say_that_it_stays(setting):
    outcome = apply(setting, "prune.wanda", ratio=0.5)
    said = " ".join(outcome.notes)
    assert all(f"{name}: stays" in said for name in WEIGHTS)


def test_no_runtime_computes_recurrent_layers_in_integers(setting):
    notes = " ".join(apply(setting, "quantize.weights").notes)
    assert "rnn.weight_ih_l0" in notes and "decoded to floats" in notes
