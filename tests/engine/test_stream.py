"""What decides by input is measured as a chain, on real inputs, beside whatever it is compared to."""

import pytest
import torch
from torch import nn

from laconic.core.task import classification
from laconic.engine.deploy import Deployed, Yard
from laconic.engine.store import Store
from laconic.engine.stream import stream
from laconic.measuring.latency import Plan
from laconic.program.capture import capture


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        small = self.small(x)
        return torch.ops.laconic.choose(small[:, 0] < 0.0, self.large(x), small)


@pytest.fixture
def task():
    draw = torch.Generator().manual_seed(0)
    return classification(
        validation=[(torch.randn(10, 3, generator=draw), torch.zeros(10).long()) for _ in range(9)]
    )


def test_a_stream_has_the_samples_in_their_order(task):
    program = capture(Pair().eval(), (torch.randn(2, 3),))
    for batch, expected in ((1, 64), (4, 16), (10, 7)):
        found = stream(program, task, batch)
        assert len(found) == expected
        assert {len(arrays[0]) for arrays in found} == {batch}
    rows = torch.cat([x for x, _ in task.validation])
    assert torch.equal(torch.from_numpy(stream(program, task, 1)[11][0]), rows[11:12])
    assert stream(program, task, 11) == []


def test_the_chain_is_what_is_scored_and_timed(task, tmp_path):
    torch.manual_seed(0)
    program = capture(Pair().eval(), (torch.randn(2, 3),))
    plain = capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    yard = Yard(tmp_path, Store(), threads=1, task=task, plan=Plan(rounds=1, seconds=0.0, calls=1))
    ways = {n: Deployed(p, "onnxruntime", "fp32") for n, p in (("a", program), ("b", plain))}
    found = yard.latencies(ways, 1)
    assert all("64 batches" in each.conditions["stream"] for each in found.values())
    assert found["a"].conditions["pieces"] == 2
    assert "stream" not in yard.latencies({"b": ways["b"]}, 1)["b"].conditions
    scores = yard.scores(ways["a"], task, "validation")
    with torch.no_grad():
        wanted = torch.cat([(program(x).argmax(1) == y) for x, y in task.validation])
    assert torch.equal(scores, wanted.double())
