"""Shapes and dtypes of a graph's values, by fake execution: no data are touched."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from laconic.core.errors import LaconicError, SurgeryError, first_line

if TYPE_CHECKING:
    from laconic.program.program import Program

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError)


class Shapes(fx.Interpreter):
    """Writes `meta["shape"]` and `meta["dtype"]` into every node of a Program's graph."""

    def __init__(self, program: "Program", mode: FakeTensorMode) -> None:
        super().__init__(program, graph=program.graph)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        held = {target: program.tensor(target).detach() for target in targets}
        # `mode.from_tensor` would follow views and storages, which takes longer than all the rest
        self._held = {
            target: FakeTensor(mode, tensor.to("meta"), tensor.device)
            for target, tensor in held.items()
        }

    @classmethod
    def write(cls: type[Self], program: "Program", example: Sequence[Tensor]) -> None:
        """Those that `example`, the flat inputs, gives.

        Raises:
            LaconicError: an operator refuses its inputs; names the node.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        shapes = cls(program, mode)
        with mode, torch.no_grad():
            shapes.run(*(mode.from_tensor(tensor) for tensor in example))

    def refusal(self, n: fx.Node, error: Exception) -> LaconicError:
        """What an operator that refuses its inputs is reported as."""
        return SurgeryError(
            f"{n.target} does not fit its inputs: {first_line(error)}",
            where=f"{n.name} ({n.meta.get('origin') or 'top level'})",
        )

    def fetch_attr(self, target: str) -> Any:
        return self._held[target]

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except REFUSALS as error:
            raise self.refusal(n, error) from error
        if isinstance(value, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(value.shape), value.dtype
        elif isinstance(value, (tuple, list)):
            n.meta["shape"] = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in value)
            n.meta["dtype"] = tuple(v.dtype if isinstance(v, Tensor) else None for v in value)
        else:
            n.meta["shape"], n.meta["dtype"] = value, None
        return value
