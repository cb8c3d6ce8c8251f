import pytest

from laconic.core.errors import ExportError
from laconic.core.measurement import Measurement
from laconic.engine.deploy import fastest


def timed(**milliseconds: float) -> dict[str, Measurement]:
    return {
        name: Measurement(name="latency", value=2 * value, unit="ms", low=value)
        for name, value in milliseconds.items()
    }


def test_fastest_compares_least_disturbed_turns():
    assert fastest(timed(a=2.0, b=1.9, c=3.0)) == "b"


def test_a_tie_goes_to_the_first():
    found = timed(openvino=1.1, onnxruntime=1.0)
    assert fastest(found, tie=1.15) == "openvino"
    assert fastest(found, tie=1.05) == "onnxruntime"


def test_nothing_measured_is_an_error():
    with pytest.raises(ExportError, match="no runtime"):
        fastest({})
