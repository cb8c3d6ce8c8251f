"""One graph that branches: `torch.cond` around what no row of the batch needs.

ONNX Runtime, OpenVINO and Inductor all run it (ONNX has `If`). A branch is taken by the batch as a
whole: at batch 1 that saves what a chain saves, in a single file; in larger batches the body runs
for all rows as soon as one needs it, which is why chains are what ships by default.
"""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from laconic.program.chain import Chain, Step
from laconic.runtimes._export import lower_weights

Before = Callable[[fx.GraphModule], object]


def branching(chain: Chain, before: Before | None = None) -> fx.GraphModule:
    """A module for `torch.export` that gives what the Program of a chain gives, flat.

    Its pieces are lowered, with `before`, as every Program that is exported.
    """
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in chain.plan["inputs"]]
    found = graph.call_module("inner", tuple(given))
    count = len(chain.plan["outputs"])
    graph.output(tuple(graph.call_function(operator.getitem, (found, i)) for i in range(count)))
    return fx.GraphModule({"inner": _Branching(chain, before)}, graph)


class _Branching(nn.Module):
    def __init__(self, chain: Chain, before: Before | None) -> None:
        super().__init__()
        self.pieces = nn.ModuleList([lower_weights(piece, before) for piece in chain.pieces])
        self.plan = chain.plan

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.plan["inputs"], inputs, strict=True))
        self._follow(self.plan["steps"], values)
        return tuple(values[name] for name in self.plan["outputs"])

    def _follow(self, steps: Sequence[Step], values: dict[str, Tensor]) -> None:
        for step in steps:
            if "run" in step:
                found = self.pieces[step["run"]](*(values[name] for name in step["takes"]))
                values.update(zip(step["gives"], found, strict=True))
            else:
                values.update(zip(step["gives"], self._choice(step, values), strict=True))

    def _choice(self, step: Step, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        assert "rows" in step and "steps" in step and "there" in step and "otherwise" in step
        rows, steps, there, kept = step["rows"], step["steps"], step["there"], step["otherwise"]
        whole = [name for name in self.plan["whole"] if name in values]
        names = list(dict.fromkeys([rows, *kept, *step["takes"], *whole]))

        def some(*given: Tensor) -> tuple[Tensor, ...]:
            inner = dict(zip(names, given, strict=True))
            self._follow(steps, inner)
            return tuple(
                torch.where(
                    inner[rows].reshape(-1, *[1] * (inner[one].ndim - 1)), inner[one], inner[other]
                )
                for one, other in zip(there, kept, strict=True)
            )

        def none(*given: Tensor) -> tuple[Tensor, ...]:
            inner = dict(zip(names, given, strict=True))
            return tuple(inner[name].clone() for name in kept)

        operands = tuple(values[name] for name in names)
        return torch.cond(values[rows].any(), some, none, operands)
