"""Products with one matrix of a stack for every run of rows, as mixtures of experts have them.

Multiply-adds: every row meets one matrix; how rows are shared out does not matter.
"""

from torch import fx

from laconic.program.equations import Arguments, Dims, Equations, Row


def grouped(see: Equations, node: fx.Node, _: Arguments) -> Dims:
    """Rows [tokens, in] in runs, weight [experts, in, out] → [tokens, out]."""
    rows, weight = see.dims(node.args[0]), see.dims(node.args[1])
    see.freeze(node, "experts are looked up by number", weight[0])
    see.freeze(node, "order along it matters", rows[0])
    see.same(rows[1], weight[1], node)
    see.role(node.args[1], 1, "consumer")
    see.role(node.args[1], 2, "producer")
    see.count(node, rows[0], weight[1], weight[2])
    return (rows[0], weight[2])


def histogram(see: Equations, node: fx.Node, _: Arguments) -> Dims:
    """Counts of values in bins: neither the values nor the bins can shrink."""
    see.freeze(node, "values are counted", *see.dims(node.args[0]))
    return see.rigid(node, "bins", *node.meta["shape"])


ROWS: dict[str, Row] = {
    "aten._grouped_mm": grouped,
    "aten.grouped_mm": grouped,
    "transformers.grouped_mm_fallback": grouped,
    "aten.histc": histogram,
    "aten.bincount": histogram,
    "aten.one_hot": lambda see, node, a: (
        *see.dims(a["self"]),
        *see.rigid(node, "one place for each value", node.meta["shape"][-1]),
    ),
}
