"""Laconic's own operators: a form in front of the operator that uses the weight."""

from torch import fx

from laconic.program.equations import Arguments, Dims, Equations, Row


def quantized(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """Axes pass; scale and zero point go with the axis they stand on, if there is one."""
    dims = see.dims(node.args[0])
    for name in ("scale", "zero_point"):
        side = see.dims(a[name])
        if a["axis"] is not None and side and side[0].size > 1:
            see.same(dims[a["axis"]], side[0], node)
    return dims


ROWS: dict[str, Row] = {
    "laconic.fake_quantize": quantized,
    "laconic.dequantize": quantized,
}
