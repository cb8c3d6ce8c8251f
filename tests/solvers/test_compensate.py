"""Identities: what is redundant is made up for exactly; what is not cut is not touched."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laconic.program.capture import capture
from laconic.program.surgery import cut
from laconic.solvers.channels.compensate import compensate, drift
from laconic.solvers.recalibrate import norms, recalibrate
from laconic.statistics.convoy import affordable, sample_bytes
from laconic.testing import zoo


class Residual(nn.Module):
    """Two residual blocks; the inner channels 4..7 of each are copies of 0..3."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "a": nn.Conv2d(6, 8, 3, padding=1, bias=False),
                    "na": nn.BatchNorm2d(8),
                    "b": nn.Conv2d(8, 6, 3, padding=1, bias=False),
                    "nb": nn.BatchNorm2d(6),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            y = F.relu(block["na"](block["a"](x)))
            x = F.relu(block["nb"](block["b"](y)) + x)
        return self.head(x.mean((2, 3)))


def twin_channels(model):
    with torch.no_grad():
        for block in model.blocks:
            norm = block["na"]
            for tensor in (
                block["a"].weight,
                norm.weight,
                norm.bias,
                norm.running_mean,
                norm.running_var,
            ):
                tensor[4:] = tensor[:4]
    return model


@pytest.fixture
def setting():
    model = twin_channels(zoo.shake(Residual()))
    program = capture(model, torch.randn(2, 3, 6, 6))
    batches = [(torch.randn(40, 3, 6, 6),) for _ in range(2)]
    recalibrate(program, batches)  # as after training: statistics that are true of the data
    return program, batches


KEEP = {f"blocks.{i}.a.out": [0, 1, 2, 3] for i in range(2)}


@pytest.mark.parametrize("consumers_only", [True, False])
def test_duplicates_are_made_up_for_exactly(setting, consumers_only):
    program, batches = setting
    small, changes = cut(program, KEEP)
    x = torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        before = (small(x) - program(x)).abs().max()
        report = compensate(program, small, changes, batches, consumers_only=consumers_only)
        after = (small(x) - program(x)).abs().max()
    assert float(before) > 0.1
    assert float(after) < 1e-3 * float(before)  # the smallest ridge on the grid is 1e-5
    assert len(report.errors) == (2 if consumers_only else 4)
    assert all(error < 1e-6 for error in report.errors.values())
    assert not report.notes


def test_batch_norms_are_true_of_their_inputs_afterwards(setting):
    program, batches = setting
    small, changes = cut(program, {name: [0, 1, 5] for name in KEEP})
    compensate(program, small, changes, batches)
    expressed = small.clone()
    recalibrate(expressed, batches)
    for norm in norms(small):
        for name in (norm.mean, norm.variance):
            assert torch.allclose(small.tensor(name), expressed.tensor(name), atol=1e-3), name


def test_compensation_lowers_the_error_on_other_data(setting):
    program, batches = setting
    keep = {name: [0, 1, 5] for name in KEEP}
    x = torch.randn(64, 3, 6, 6)

    def error(**options):
        small, changes = cut(program, keep)
        with torch.no_grad():
            compensate(program, small, changes, batches, **options)
            return float((small(x) - program(x)).square().mean())

    nothing = error(refit=False, recalibrate=False)
    only_norms = error(refit=False)
    consumers = error(consumers_only=True)
    everything = error()
    assert max(consumers, everything) < 0.7 * min(nothing, only_norms)


def test_nothing_upstream_of_a_cut_changes(setting):
    program, batches = setting
    small, changes = cut(program, {"blocks.1.a.out": [0, 1, 2]})
    drifted = {node.name for node in drift(program, small, changes)}
    assert "relu_1" not in drifted
    compensate(program, small, changes, batches)
    for name in ("stem.weight", "blocks.0.b.weight", "blocks.0.nb.running_mean"):
        assert torch.equal(small.tensor(name), program.tensor(name))
    kept = program.tensor("blocks.1.a.weight")[:3]
    assert torch.equal(small.tensor("blocks.1.a.weight"), kept)


def test_the_dense_program_is_not_touched(setting):
    program, batches = setting
    before = {name: tensor.clone() for name, tensor in program.tensors()}
    small, changes = cut(program, KEEP)
    compensate(program, small, changes, batches)
    assert all(torch.equal(before[name], tensor) for name, tensor in program.tensors())


def test_a_residual_stream_can_be_cut_too(setting):
    program, batches = setting
    small, changes = cut(program, {"stem.out": [0, 1, 3, 4]})
    x = torch.randn(64, 3, 6, 6)
    with torch.no_grad():
        before = float((small(x) - program(x)).square().mean())
        compensate(program, small, changes, batches)
        after = float((small(x) - program(x)).square().mean())
    assert after < 0.8 * before


def test_constant_data_keep_the_weights(setting):
    program, _ = setting
    small, changes = cut(program, KEEP)
    before = small.tensor("blocks.0.b.weight").clone()
    report = compensate(program, small, changes, [(torch.zeros(4, 3, 1, 1).expand(4, 3, 6, 6),)])
    assert bool(torch.isfinite(small(torch.randn(2, 3, 6, 6))).all())
    assert report.notes or torch.allclose(small.tensor("blocks.0.b.weight"), before, atol=0.5)


class Mixer(nn.Module):
    """[batch, 5, 6] -> [batch, 3]: over tokens, over channels, and over both."""

    def __init__(self):
        super().__init__()
        self.first, self.stem, self.tokens = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(5, 5)
        self.channels, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem(F.relu(self.first(x))))
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head(F.relu(self.channels(x)).mean(1))


def test_a_layer_that_runs_over_what_was_cut_keeps_its_weights(generator):
    torch.manual_seed(0)
    dense = capture(Mixer().eval(), torch.randn(2, 5, 6))
    small, changes = cut(dense, {"first.out": range(1, 9), "stem.out": [0, 2, 3, 5, 6, 7]})
    x = torch.randn(64, 5, 6, generator=generator)
    before = (small(x) - dense(x)).square().mean()
    report = compensate(dense, small, changes, [(x,)])
    assert "tokens.weight: what it runs over was cut as well, keeps its weights" in report.notes
    assert torch.equal(small.tensor("tokens.weight"), dense.tensor("tokens.weight"))
    assert {"channels.weight", "head.weight"} <= set(report.errors)
    assert (small(x) - dense(x)).square().mean() < 0.5 * before


def test_fewer_rows_than_columns_are_noted():
    model = zoo.shake(nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)))
    program = capture(model, torch.randn(2, 6))
    small, changes = cut(program, {"0.out": list(range(30))})
    report = compensate(program, small, changes, [(torch.randn(12, 6),)])
    assert any("12 calibration rows for 30 columns" in note for note in report.notes)
    assert bool(torch.isfinite(small(torch.randn(5, 6))).all())


@pytest.mark.parametrize("model", ["mobilenet", "grouped", "per_head", "densenet"])
def test_awkward_networks_stay_finite_and_get_closer(model):
    from laconic.program.groups import groups

    module, inputs = zoo.make(model)
    program = capture(module, inputs)
    found = groups(program)
    keep = {g.name: list(range(max(1, g.size * 3 // 4))) for g in found}
    small, changes = cut(program, keep, found)
    generator = torch.Generator().manual_seed(0)

    def draw():
        return tuple(
            torch.randn((32, *t.shape[1:]), generator=generator) if t.is_floating_point()
            else t[torch.randint(len(t), (32,), generator=generator)]
            for t in inputs
        )  # fmt: skip

    batches, fresh = [draw(), draw()], draw()
    with torch.no_grad():
        dense = program.run_flat(*fresh)[0]
        before = float((small.run_flat(*fresh)[0] - dense).square().mean())
        compensate(program, small, changes, batches)
        after = float((small.run_flat(*fresh)[0] - dense).square().mean())
    assert after < before


def test_recalibration_is_one_training_mode_pass_over_everything():
    model = zoo.shake(
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        )
    )
    program = capture(model, torch.randn(2, 2, 6, 6))
    x = torch.randn(12, 2, 6, 6)
    kept = program.clone()
    names = recalibrate(program, [(x[:5],), (x[5:],)])
    assert names == ["1.running_mean", "4.running_mean"]
    with torch.no_grad():
        hidden = model[0](x)
        mean, var = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), unbiased=False)
        normed = (hidden - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        second = model[3](
            F.relu(normed * model[1].weight[:, None, None] + model[1].bias[:, None, None])
        )
    assert torch.allclose(program.tensor("1.running_var"), var, rtol=1e-5)
    assert torch.allclose(program.tensor("4.running_mean"), second.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(
        program.tensor("4.running_var"), second.var((0, 2, 3), unbiased=False), rtol=1e-4
    )
    assert torch.equal(kept.tensor("1.running_var"), model[1].running_var)


def test_memory_estimate_counts_what_is_alive_together():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    program = capture(model, torch.randn(2, 10))
    assert sample_bytes(program) == 4 * 40  # hidden and its relu
    assert affordable(program, walks=2, memory=4 * 40 * 2 * 100) == 100
    assert affordable(program, memory=1) == 8
