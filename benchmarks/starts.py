"""How a small network may begin: with what a large one knows, or with random numbers.

start = apply(net.program, transferred(layers=1 / 3), context).program   # or
start = fresh(start, seed=0)                                             # the same, drawn anew
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from laconic.program.program import Program
from laconic.statistics.layers import layers

_NORMS = (
    torch.ops.aten.batch_norm.default,
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.group_norm.default,
)


def transferred(**options: Any) -> dict[str, Any]:
    """The step of a recipe that makes the small network: `width`, `layers`, `select`, `student`."""
    return {"method": "transfer.weights", **options}


def fresh(program: Program, seed: int, keep: Sequence[str] = ()) -> Program:
    """A copy that knows nothing: weights as He et al. (2015) draw them, norms that change nothing.

    Matrices that no layer multiplies with (embeddings) keep their spread, other vectors become
    zero. All draws come from one generator of `seed`. Tensors that a glob of `keep` names stay.
    """
    made = program.clone()
    made.propagate()
    generator = torch.Generator().manual_seed(seed)
    fans = {
        layer.weight: layer.matrix(made.tensor(layer.weight)).shape[1] for layer in layers(made)
    }
    ones = _scales(made)
    for name, tensor in list(made.tensors()):
        held = any(fnmatchcase(name, pattern) for pattern in keep)
        if tensor.is_floating_point() and not held:
            made.set_tensor(name, _drawn(tensor, fans.get(name), name in ones, generator))
    return made


def _drawn(tensor: Tensor, fan: int | None, one: bool, generator: torch.Generator) -> Tensor:
    if tensor.ndim < 2:
        return torch.full_like(tensor, 1.0 if one else 0.0)
    deviation = (2 / fan) ** 0.5 if fan else float(tensor.detach().std())
    return torch.randn(tensor.shape, generator=generator).to(tensor) * deviation


def _scales(program: Program) -> set[str]:
    """Names of the weights and running variances of norms."""
    found: set[str] = set()
    for node in program.graph.nodes:
        if node.target in _NORMS:
            places = (1, 4) if node.target is _NORMS[0] else (2,)
            held = [node.args[place] for place in places]
            found |= {str(x.target) for x in held if isinstance(x, torch.fx.Node)}
    return {program.aliases.get(name, name) for name in found}
