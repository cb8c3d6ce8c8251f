"""The one operator that stands for whatever is decided by input at run time.

`laconic.choose(rows, there, otherwise)`: rows of the batch that are True take `there`, the others
take `otherwise`. It computes both and picks, so a Program with it is still one static graph: exact,
trainable, storable, exportable. It then saves nothing; what feeds only `there` has to be computed
for the True rows alone, and `program.chain` takes the graph apart so that this is all that is.

    early exit   choose(unsure(early), late, early)
    skipping     choose(gate(x), x + branch(x), x)
    cascade      choose(unsure(small), large, small)
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from laconic.program.program import Program


def choose(rows: Tensor, there: Tensor, otherwise: Tensor) -> Tensor:
    """`there` where `rows` `[batch]` bool is True, else `otherwise`; both `[batch, ...]`, alike.

    Gradients go to whichever was taken, row by row. Exporters see `aten.where`.
    """
    if rows.dtype != torch.bool or rows.ndim != 1:
        raise ValueError(f"rows of {rows.dtype} {list(rows.shape)}, expected bool [batch]")
    alike = there.shape == otherwise.shape and there.dtype == otherwise.dtype
    if not alike or there.shape[:1] != rows.shape:
        found = f"{there.dtype} {list(there.shape)} and {otherwise.dtype} {list(otherwise.shape)}"
        raise ValueError(f"{found} for {rows.shape[0]} rows, expected two alike of [rows, ...]")
    return torch.where(rows.reshape(-1, *[1] * (there.ndim - 1)), there, otherwise)


torch.library.define("laconic::choose", "(Tensor rows, Tensor there, Tensor otherwise) -> Tensor")
torch.library.impl("laconic::choose", "CompositeImplicitAutograd", choose)
CHOOSE = torch.ops.laconic.choose.default


def choices(program: "Program") -> list[fx.Node]:
    """The `choose` nodes of a Program, in order."""
    return [node for node in program.graph.nodes if node.target is CHOOSE]


def spell_out(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Replace a `choose` by ATen operators, which every runtime has; the new node."""
    rows, there, otherwise = node.args
    assert isinstance(there, fx.Node)
    shape = [-1, *[1] * (len(there.meta["shape"]) - 1)]
    with graph.inserting_before(node):
        column = graph.call_function(torch.ops.aten.reshape.default, (rows, shape))
        made = graph.call_function(torch.ops.aten.where.self, (column, there, otherwise))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made
