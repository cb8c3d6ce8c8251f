import pytest
import torch

from laconic.core.measurement import Measurement
from laconic.engine.deploy import Yard
from laconic.engine.pays import Pays, skeleton
from laconic.engine.store import Store
from laconic.program.groups import groups
from laconic.program.surgery import cut


@pytest.fixture
def yard(tmp_path, monkeypatch):
    made = Yard(tmp_path, Store())
    times = {}

    def latencies(ways, batch, eager=None):
        return {
            label: Measurement(
                name="latency", value=9.0, low=times[label.split()[0]], high=9.0, unit="ms",
                conditions={"precision": way.precision},
            )
            for label, way in ways.items()
        }  # fmt: skip

    monkeypatch.setattr(made, "latencies", latencies)
    return made, times


@pytest.mark.parametrize(
    ("before", "after", "pays"), [(1.0, 0.5, True), (1.0, 1.0, True), (1.0, 1.1, False)]
)
def test_faster_or_as_fast_and_smaller_pays(program, yard, before, after, pays):
    made, times = yard
    times |= {"without": before, "with": after}
    smaller, _ = cut(program, {groups(program)[0].name: [0, 1]})
    judge = Pays("latency", "openvino", 1, made)
    assert (judge(program, smaller) == "") is pays


def test_as_fast_but_larger_does_not_pay(program, yard):
    made, times = yard
    times |= {"without": 1.0, "with": 1.0}
    smaller, _ = cut(program, {groups(program)[0].name: [0, 1]})
    why = Pays("latency", "openvino", 1, made)(smaller, program)
    assert "is no gain over 1 ms" in why


def test_macs_and_size_are_counted_not_timed(program, yard):
    made, _ = yard
    smaller, _ = cut(program, {groups(program)[0].name: [0, 1]})
    for objective in ("macs", "size"):
        judge = Pays(objective, "openvino", 1, made)
        assert judge(program, smaller) == ""
        assert judge(smaller, program) != ""


def test_steps_that_leave_the_operators_alone_are_not_judged(program, yard):
    made, _ = yard
    trained = program.clone()
    trained.set_tensor("2.weight", torch.zeros(3, 8))
    assert skeleton(trained) == skeleton(program)
    judge = Pays("latency", "openvino", 1, made)
    assert not judge.concerns(program, trained)
    smaller, _ = cut(program, {groups(program)[0].name: [0, 1]})
    assert judge.concerns(program, smaller)
