from io import StringIO

from rich.console import Console

from laconic.reports import console


def test_tables_say_all_that_matters(result):
    screen = Console(record=True, width=140, file=StringIO())
    console.show(result, screen)
    printed = screen.export_text()
    for piece in ("97.50 %", "4.00x", "10.00x", "-0.20", "int8 was not faster than bf16"):
        assert piece in printed
    assert "refused onnxruntime has no bf16 on a CPU" in printed
    assert printed.rstrip().endswith(result.verdict)
