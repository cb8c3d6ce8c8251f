import pytest
import torch
from torch import nn

from laconic.core.measurement import Measurement
from laconic.core.recipe import Recipe, Step
from laconic.engine.result import Candidate, Layer, Result, StepRecord
from laconic.program.capture import capture


def _latency(value: float, precision: str, batch: int) -> Measurement:
    return Measurement(
        name="latency",
        value=value,
        unit="ms",
        low=value * 0.9,
        high=value * 1.2,
        repeats=5,
        conditions={"runtime": "openvino", "precision": precision, "batch": batch, "threads": 2},
    )


def _plain(name: str, value: float, unit: str, **conditions: object) -> Measurement:
    return Measurement(name=name, value=value, unit=unit, conditions=conditions)


@pytest.fixture(scope="session")
def result() -> Result:
    """A result with every part filled in, numbers chosen so that ratios are easy to check."""
    program = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.ones(2, 4))
    accuracy = {"split": "test"}
    drop = Measurement(name="drop", value=0.2, unit="%", low=-0.1, high=0.45, repeats=800)
    recipe = Recipe(steps=(Step(method="prune.channels", options={"ratio": 0.5}),), name="half")
    return Result(
        program=program,
        original=program,
        recipe=recipe,
        measurements={
            "original": [
                Measurement(
                    name="accuracy", value=97.5, unit="%", low=96, high=98.4, conditions=accuracy
                ),
                _latency(2.0, "fp32", 64),
                _latency(1.0, "bf16", 64),
                _plain("size", 80_000.0, "B", file="model.onnx"),
                _plain("macs", 2_000_000.0, "MAC"),
            ],
            "compressed": [
                Measurement(
                    name="accuracy", value=97.3, unit="%", low=95.8, high=98.2, conditions=accuracy
                ),
                _latency(0.8, "fp32", 64),
                _latency(0.25, "int8", 64),
                _plain("size", 8_000.0, "B", file="model.onnx"),
                _plain("macs", 500_000.0, "MAC"),
            ],
        },
        parity={"model.onnx (onnxruntime, fp32)": {"max_abs": 1.2e-6, "agreement": 1.0}},
        steps=[
            StepRecord(
                method="prune.channels",
                sites=("*",),
                kept=True,
                seconds=3.2,
                before={"macs": 2e6, "bytes": 80_000, "score": 97.5},
                after={"macs": 5e5, "bytes": 20_000, "score": 97.1},
                options={"ratio": 0.5},
                notes=["group <head> is frozen: it is an output"],
            ),
            StepRecord(
                method="quantize.static",
                sites=("*",),
                kept=False,
                seconds=1.0,
                before={"macs": 5e5},
                after={"macs": 5e5},
                reason="int8 was not faster than bf16",
            ),
        ],
        candidates=[
            Candidate(
                name="half",
                recipe=recipe,
                drop=drop,
                objective=_latency(0.25, "int8", 64),
                accepted=True,
                chosen=True,
                reason="strongest within the budget",
                seconds=12.0,
            ),
            Candidate(
                name="three quarters",
                recipe=recipe,
                drop=Measurement(name="drop", value=2.0, unit="%", low=1, high=3.1, repeats=800),
                objective=_latency(0.2, "int8", 64),
                accepted=False,
                chosen=False,
                reason="drop of up to 3.1 points",
                seconds=11.0,
            ),
        ],
        layers=[
            Layer(
                name="0.weight",
                operator="linear",
                shape_before=(8, 4),
                shape_after=(4, 4),
                macs_before=32,
                macs_after=16,
                bytes_before=128,
                bytes_after=16,
                form="affine",
            )
        ],
        verdict="4.00x faster at batch 64 for 0.2 points.",
        refused=["onnxruntime has no bf16 on a CPU"],
        provenance={"name": "tiny </script> net", "torch": "2.13", "seconds": 31.5},
    )
