import pytest

from laconic.reports.rows import best_latency, humane, rows, text


def test_sides_are_paired_by_their_conditions(result):
    by = {(row.name, row.where): row for row in rows(result)}
    size = by["size", "model.onnx"]
    assert (size.before.value, size.after.value, size.ratio) == (80_000, 8_000, 10.0)
    assert by["latency", "openvino, bf16, batch 64"].after is None
    assert by["accuracy", "test"].ratio is None


def test_best_latency_compares_each_side_at_its_fastest_precision(result):
    (row,) = best_latency(result)
    assert (row.before.value, row.after.value, row.ratio) == (1.0, 0.25, 4.0)
    assert text(row.before) == "1 ms [0.9–1.2] bf16"
    assert text(row.after).endswith("int8")


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1_234_567.0, "B", ("1.23", "MB")),
        (999.0, "B", ("999", "B")),
        (2e6, "MAC", ("2", "MMAC")),
        (97.456, "%", ("97.46", "%")),
        (0.12345, "ms", ("0.123", "ms")),
        (1500.0, "ms", ("1,500", "ms")),
    ],
)
def test_units_for_people(value, unit, shown):
    assert humane(value, unit) == shown
