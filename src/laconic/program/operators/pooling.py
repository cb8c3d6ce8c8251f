"""Pooling and resampling: they mix positions in space and leave the other axes alone."""

from torch import fx

from laconic.program.axes import Atom, product
from laconic.program.equations import Arguments, Dims, Equations, Row


def _over(space: int) -> Row:
    def row(see: Equations, node: fx.Node, a: Arguments) -> Dims | list[Dims]:
        del a
        x = see.dims(node.args[0])
        see.freeze(node, "positions in space are mixed", *x[-space:])
        several = isinstance(node.meta["dtype"], tuple)
        shape = node.meta["shape"][0] if several else node.meta["shape"]
        places = see.rigid(node, "positions in space", *shape[-space:])
        result = (*x[:-space], *places)
        return [result, result] if several else result

    return row


def im2col(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """[n, c, h, w] → [n, c k k, places]."""
    x = see.dims(a["self"])
    see.freeze(node, "positions in space are mixed", *x[-2:])
    window = see.rigid(node, "positions in a window", *a["kernel_size"])
    return (x[0], product(x[1], *window), *see.rigid(node, "windows", node.meta["shape"][-1]))


def col2im(see: Equations, node: fx.Node, a: Arguments) -> Dims:
    """[n, c k k, places] → [n, c, h, w]: windows are added up where they overlap."""
    x = see.dims(a["self"])
    channels = Atom(node.meta["shape"][-3])
    window = see.rigid(node, "positions in a window", *a["kernel_size"])
    see.same(x[-2], product(channels, *window), node)
    see.freeze(node, "positions in space are mixed", x[-1])
    return (*x[:-2], channels, *see.rigid(node, "positions", *node.meta["shape"][-2:]))


_KINDS = (
    "max_pool{}d avg_pool{}d adaptive_avg_pool{}d adaptive_max_pool{}d max_pool{}d_with_indices "
    "_adaptive_avg_pool{}d upsample_nearest{}d _upsample_nearest_exact{}d lp_pool{}d "
    "reflection_pad{}d replication_pad{}d"
)
ROWS: dict[str, Row] = {
    f"aten.{name.format(space)}": _over(space) for name in _KINDS.split() for space in (1, 2, 3)
}
ROWS.update({f"aten.upsample_{name}": _over(2) for name in ("bilinear2d", "bicubic2d")})
ROWS.update({"aten._upsample_bilinear2d_aa": _over(2), "aten._upsample_bicubic2d_aa": _over(2)})
ROWS.update({"aten.upsample_linear1d": _over(1), "aten.upsample_trilinear3d": _over(3)})
ROWS.update({"aten.im2col": im2col, "aten.col2im": col2im})
