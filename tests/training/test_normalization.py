"""Batch statistics of a step with several batches."""

import torch
from torch import nn

from laconic.program.capture import capture
from laconic.training.normalization import LoneValues, MergedStatistics
from laconic.training.processes import Processes


def captured(*layers):
    return capture(nn.Sequential(*layers).eval(), (torch.randn(2, 3, 5, 5),)).clone().train()


def run(program, batches):
    merged = MergedStatistics()
    for batch in batches:
        merged.start()
        with merged:
            program.run_flat(batch)
    merged.finish(Processes())


def test_one_batch_is_what_batch_norm_does(generator):
    x = torch.randn(6, 3, 5, 5, generator=generator) * 3 + 2
    ours, native = (
        captured(nn.BatchNorm2d(3, momentum=0.3)),
        captured(nn.BatchNorm2d(3, momentum=0.3)),
    )
    run(ours, [x])
    native.run_flat(x)
    # the variance is made biased and unbiased again in float64, rounded once to float32
    for name in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(ours.tensor(name), native.tensor(name), rtol=3e-7, atol=1e-7)


def test_batches_of_different_size_merge_to_the_moments_of_all(generator):
    x = torch.randn(11, 3, 5, 5, generator=generator) * 3 + 2
    ours, native = captured(nn.BatchNorm2d(3)), captured(nn.BatchNorm2d(3))
    run(ours, x.split([2, 8, 1]))
    native.run_flat(x)  # the first layer sees the same values, whatever the batches
    for name in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(ours.tensor(name), native.tensor(name), rtol=1e-6, atol=1e-6)
    blind = sum(part.var((0, 2, 3)) for part in x.split([2, 8, 1])) / 3
    assert not torch.allclose(0.9 + 0.1 * blind, ours.tensor("0.running_var"), rtol=1e-4)


def test_outputs_and_gradients_are_those_of_each_batch(generator):
    x = torch.randn(6, 3, 5, 5, generator=generator)
    ours, native = captured(nn.BatchNorm2d(3), nn.ReLU()), captured(nn.BatchNorm2d(3), nn.ReLU())
    merged = MergedStatistics()
    merged.start()
    with merged:
        mine = ours.run_flat(x)[0]
    other = native.run_flat(x)[0]
    assert torch.equal(mine, other)
    mine.square().sum().backward()
    other.square().sum().backward()
    assert torch.equal(ours.tensor("0.weight").grad, native.tensor("0.weight").grad)


def test_a_shared_layer_moves_once_for_each_call(generator):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(torch.relu(self.bn(x)) * 2)

    def fresh():
        return capture(Twice().eval(), (torch.randn(2, 3, 5, 5),)).clone().train()

    x = torch.randn(6, 3, 5, 5, generator=generator)
    ours, native = fresh(), fresh()
    run(ours, [x])
    native.run_flat(x)
    for name in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(ours.tensor(name), native.tensor(name), rtol=1e-6, atol=1e-6)


def test_eval_mode_is_left_alone(generator):
    x = torch.randn(6, 3, 5, 5, generator=generator)
    program = captured(nn.BatchNorm2d(3)).eval()
    before = program.tensor("0.running_mean").clone()
    run(program, [x, x])
    assert torch.equal(program.tensor("0.running_mean"), before)


def test_instance_norm_statistics_are_averaged_over_instances(generator):
    x = torch.randn(6, 3, 5, 5, generator=generator) + 1
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    ours, native = captured(layer), captured(layer)
    run(ours, x.split([4, 2]))
    native.run_flat(x)
    names = [n for n, _ in native.tensors() if "running" in n]
    assert names
    for name in names:
        torch.testing.assert_close(ours.tensor(name), native.tensor(name), rtol=1e-6, atol=1e-6)


def test_a_lone_value_is_normalised_by_the_running_statistics(generator):
    x = torch.randn(7, 3, 1, 1, generator=generator) * 3 + 2
    alone, merged, native = (captured(nn.BatchNorm2d(3)) for _ in range(3))
    held = native.clone().eval()
    with LoneValues():
        assert torch.equal(alone.run_flat(x[:1])[0], held.run_flat(x[:1])[0])
        assert torch.equal(alone.tensor("0.running_var"), held.tensor("0.running_var"))
        assert torch.equal(alone.run_flat(x)[0], native.run_flat(x)[0])
    assert torch.equal(alone.tensor("0.running_var"), native.tensor("0.running_var"))
    run(merged, [x[:1], x])  # what stands alone does not count
    for name in ("0.running_mean", "0.running_var"):
        torch.testing.assert_close(merged.tensor(name), native.tensor(name), rtol=1e-6, atol=1e-6)
